"""A detector that nobody trained, and photos whose boxes are those that it finds in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fap import checkpoint
from fap.config import Config, make_config
from fap.nets import dual
from fap.tasks import make_task
from fap.tasks.base import Result
from fap.tasks.boxes_out import detections
from fap.tasks.coco import average_precisions
from pipelines.boxes import Annotations, source_boxes
from pipelines.images import decode
from pipelines.loaders.reference import crop_resize
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.store import JPG, Store
from tests.hostile_meta import valid_meta
from tests.pipelines.samples import encoded, picture

CHECKPOINT = "detector.safetensors"
DATA = "val.beton"
WHERE = {"model": CHECKPOINT, "data": DATA}  # of `run`: what is evaluated
CLASSES = ("ant", "bee", "cat", "dog")
CANVAS = (64, 96)
# COCO's images have any shape. None is so large that an object in it could be large.
SIDES = [(33, 120), (120, 33), (64, 96), (50, 50), (90, 71), (48, 100)]
MOST_TRUE = 4  # boxes of an image


def config(size: tuple[int, int] = CANVAS, **paper: float) -> Config:
    return make_config({
        "name": "detector",
        "task": "detection",
        "paper": paper,
        "model": {"name": "retinanet_tiny", "num_classes": len(CLASSES)},
        "data": {"size": size, "crop": "letterbox"},
    })  # fmt: skip


def detector(seed: int = 0) -> nn.Module:
    """Its weights are random, but large enough that it prefers some places and classes."""
    torch.manual_seed(seed)
    model = make_task(config()).plain_model()
    with torch.no_grad():
        for name, weight in model.head.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_normal_(weight)
            elif "cls_logits" in name:
                weight.fill_(-3.0)
        model.head.classification_head.cls_logits.weight.mul_(4)
    return model.eval()


def write_checkpoint(path: Path, seed: int = 0, classes: Sequence[str] = CLASSES) -> Path:
    """Its auxiliary norms are others than the main ones."""
    model = dual.convert(detector(seed), aux=True)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name in state:
        if name.endswith("aux.running_var"):
            state[name] = state[name] * 2
    meta = valid_meta(config(map=36.5, coco_c=18.25), classes)
    checkpoint.save(path, state, meta)
    return path


def jpegs() -> list[bytes]:
    return [
        encoded(picture(i, height, width), "JPEG", quality=92)
        for i, (height, width) in enumerate(SIDES)
    ]


def write_data(
    path: Path,
    annotations: Annotations,
    classes: Sequence[str] = CLASSES,
    contents: Sequence[bytes] | None = None,
) -> Path:
    """A detection `.beton` of the photos."""
    with BetonWriter(path, len(SIDES)) as writer:
        for i, data in enumerate(contents or jpegs()):
            writer.add(Sample(data, JPG, *SIDES[i]), i)
        writer.commit(classes, {}, annotations=annotations)
    return path


# ---------------------------------------------------------------------- the twin


def photos(store: Store) -> list[np.ndarray]:
    return [np.asarray(decode(store.read(i).tobytes())) for i in range(len(store))]


def found_one_by_one(
    model: nn.Module,  # plain
    images: Sequence[np.ndarray],
    keep: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> np.ndarray:  # float64 (m, 7): image, class, score, box
    """What a plain model finds, shown one image at a time."""
    rows = [np.zeros((0, 7))]
    settings = config()
    task = make_task(settings)
    n_anchors = sum(task.per_level)
    mean = torch.tensor(settings.data.mean).view(3, 1, 1)
    std = torch.tensor(settings.data.std).view(3, 1, 1)
    for number, image in enumerate(images):
        height, width = image.shape[:2]
        factor = min(CANVAS[0] / height, CANVAS[1] / width)
        sides = (round(height * factor), round(width * factor))
        canvas = np.zeros((*CANVAS, 3), np.uint8)
        whole = np.array([0, 0, height, width])
        canvas[: sides[0], : sides[1]] = crop_resize(image, whole, sides, "bilinear")
        x = (torch.from_numpy(canvas).permute(2, 0, 1) / 255 - mean) / std
        with torch.inference_mode():
            outputs = model(x[None])[0]
        logits = outputs[: n_anchors * len(CLASSES)].view(n_anchors, -1)
        regressions = outputs[n_anchors * len(CLASSES) :].view(n_anchors, 4)
        place = [0, 0, *sides]
        boxes, scores, classes = detections(
            keep(logits), regressions, task._anchors[torch.device("cpu")], task.per_level, place
        )
        shown = source_boxes(boxes.numpy().astype(np.float64), whole, np.array(place))
        columns = [np.full(len(shown), number), classes.numpy(), scores.double().numpy(), shown]
        rows.append(np.column_stack(columns))
    return np.concatenate(rows)


def scored_one_by_one(
    model: nn.Module, images: Sequence[np.ndarray], annotations: Annotations
) -> Result:
    numbers = np.arange(len(images))
    found = found_one_by_one(model, images)
    return average_precisions(annotations, annotations.classes, numbers, found)


def plain_annotations(model: nn.Module, images: Sequence[np.ndarray]) -> Annotations:
    """Some of the best that a model finds, moved a little, so that it is right but not always."""
    rng = np.random.default_rng(0)
    found = found_one_by_one(model, images)
    first = [0]
    chosen = []
    for number in range(len(images)):
        own = found[found[:, 0] == number]
        wide = own[(own[:, 5:] - own[:, 3:5]).min(1) > 4]
        chosen.append(wide[::3][:MOST_TRUE])
        first.append(first[-1] + len(chosen[-1]))
    rows = np.concatenate(chosen)
    boxes = rows[:, 3:]
    sides = boxes[:, 2:] - boxes[:, :2]
    boxes = boxes + np.tile(sides, 2) * rng.uniform(0, 0.12, boxes.shape) * [1, 1, -1, -1]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Annotations(
        first=np.array(first, np.int64),
        boxes=boxes.astype(np.float32),
        classes=rows[:, 1].astype(np.int32),
        crowd=np.arange(len(rows)) % 7 == 6,
        area=area.astype(np.float32),
    )


def write_world(at: Path) -> Path:
    """Checkpoint and data in a folder."""
    model = detector()
    images = [np.asarray(decode(content)) for content in jpegs()]
    write_checkpoint(at / CHECKPOINT)
    write_data(at / DATA, plain_annotations(model, images))
    return at


def pictures(out: Path) -> list[Path]:
    return sorted((out / "pictures").iterdir())
