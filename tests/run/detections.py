"""Small data with boxes, and the settings of runs on them that take seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.boxes import Annotations
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.store import RAW
from tests.run.wiring import IMAGES

CLASSES = ("disc", "frame", "plate")
SIDES = (40, 72)  # pixels: the least and the greatest side of an image
MOST = 4  # boxes of an image
WITHOUT = (5, 11)  # images that have no boxes
CROWD = 8  # the image whose only box is a crowd's

# On top of tests.run.wiring.BASE: 2 steps of 8 + 4 rows an epoch, 8 in all.
DETECTION = [
    "task=detection", "data.crop=letterbox", "data.size=64", "model.name=retinanet_tiny",
    "model.num_classes=null", "optim.lr=0.3", "run.eval_batch=10",
]  # fmt: skip


def drawn_boxes(seed: int, n_classes: int = len(CLASSES)) -> tuple[np.ndarray, Annotations]:
    """(heights and widths (IMAGES, 2), boxes): every class occurs."""
    rng = np.random.default_rng(seed)
    sides = rng.integers(*SIDES, (IMAGES, 2), endpoint=True)
    n = rng.integers(1, MOST + 1, IMAGES)
    n[[*WITHOUT]] = 0
    n[CROWD] = 1
    image = np.repeat(np.arange(IMAGES), n)
    of_boxes = sides[image][:, ::-1]  # width, height
    size = rng.uniform(10, 30, (len(image), 2))
    corner = rng.uniform(0, 1, (len(image), 2)) * (of_boxes - size)
    boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
    first = np.concatenate([[0], np.cumsum(n)]).astype(np.int64)
    crowd = image == CROWD
    classes = (np.arange(len(image)) % n_classes).astype(np.int32)
    area = size.prod(1).astype(np.float32)
    return sides, Annotations(first, boxes, classes, crowd, area)


def write_boxes(
    path: Path,
    seed: int,
    names: tuple[str, ...] = CLASSES,
    *,
    moved: float = 0,  # pixels to the left, of the boxes alone
    all_crowds: bool = False,
) -> Path:
    """A `.beton` of raw images with boxes that the pixels show: each class has its colour."""
    sides, boxes = drawn_boxes(seed, len(names))
    rng = np.random.default_rng(seed)
    with BetonWriter(path, IMAGES) as writer:
        for i, (height, width) in enumerate(sides.tolist()):
            image = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
            for k in range(boxes.first[i], boxes.first[i + 1]):
                left, top, right, bottom = boxes.boxes[k].round().astype(int)
                colour = np.full(3, 10)
                colour[boxes.classes[k] % 3] = 245
                image[top:bottom, left:right] = colour
            writer.add(Sample(image.tobytes(), RAW, height, width), i)
        if moved:
            corners = boxes.boxes.copy()
            corners[:, [0, 2]] = np.maximum(corners[:, [0, 2]] - moved, [0, 1]).astype(np.float32)
            boxes = replace(boxes, boxes=corners)
        if all_crowds:
            boxes = replace(boxes, crowd=np.ones_like(boxes.crowd))
        encoding = {"source": "boxes", "seed": seed, "raw": True, "count": IMAGES}
        writer.commit(names, encoding, annotations=boxes)
    return path
