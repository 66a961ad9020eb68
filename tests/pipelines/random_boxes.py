"""Random annotations, and random plans that put them on a canvas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.boxes import Annotations
from pipelines.plan import PADDING


@dataclass
class RandomPlan:
    """The fields of an `EpochPlan` that say where images land; places as a letterbox has them."""

    index: np.ndarray  # uint32 (steps, B)
    window: np.ndarray  # int16 (steps, B, 4)
    place: np.ndarray  # int16 (steps, B, 4)
    flip: np.ndarray  # bool (steps, B)


def random_annotations(
    rng: np.random.Generator,
    heights: np.ndarray,  # (N,) pixels
    widths: np.ndarray,  # (N,) pixels
    n_classes: int = 5,
    most: int = 9,  # boxes of an image
) -> Annotations:
    """Some images have no boxes; some boxes are crowds, touch the edges, or are very small."""
    n = rng.integers(0, most + 1, len(heights)) * (rng.random(len(heights)) < 0.8)
    image = np.repeat(np.arange(len(heights)), n)
    low = rng.random((len(image), 2))
    high = low + (1 - low) * rng.random((len(image), 2)) ** rng.integers(1, 9, (len(image), 1))
    at_edge = rng.random(len(image)) < 0.2
    low[at_edge] = 0
    high[at_edge] = 1
    sides = np.stack([widths, heights], 1)[image]
    boxes = np.concatenate([low * sides, high * sides], 1).astype(np.float32)
    boxes[:, 2:] = np.minimum(np.maximum(boxes[:, 2:], boxes[:, :2] + np.float32(0.01)), sides)
    boxes[:, :2] = np.minimum(boxes[:, :2], boxes[:, 2:] - np.float32(0.005))
    boxes = np.maximum(boxes, 0)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return Annotations(
        first=np.concatenate([[0], np.cumsum(n)]).astype(np.int64),
        boxes=boxes,
        classes=rng.integers(0, n_classes, len(image), dtype=np.int32),
        crowd=rng.random(len(image)) < 0.1,
        area=(area * np.float32(0.7)).astype(np.float32),
    )


def random_plan(
    rng: np.random.Generator,
    heights: np.ndarray,  # (N,) pixels
    widths: np.ndarray,  # (N,) pixels
    canvas: tuple[int, int],  # height, width
    steps: int,
    rows: int,
) -> RandomPlan:
    """Windows inside the image, around or beside it, on any places; padding rows come last."""
    n = steps * rows
    index = rng.integers(0, len(heights), n).astype(np.uint32)
    sides = np.stack([heights[index], widths[index]], 1)
    whole = rng.random((n, 1)) < 0.3
    corner = np.where(whole, 0, np.floor((rng.random((n, 2)) * 1.2 - 0.2) * sides))
    extent = np.where(whole, sides, 1 + np.floor(rng.random((n, 2)) * sides))
    room = np.array(canvas)
    size = 1 + np.floor(rng.random((n, 2)) * room)
    at = np.floor(rng.random((n, 2)) * (room - size + 1))
    window = np.concatenate([corner, extent], 1).astype(np.int16)
    place = np.concatenate([at, size], 1).astype(np.int16)
    n_padding = int(rng.integers(0, rows))
    if n_padding:
        index[-n_padding:] = PADDING
        window[-n_padding:] = 0
        place[-n_padding:] = 0
    return RandomPlan(
        index=index.reshape(steps, rows),
        window=window.reshape(steps, rows, 4),
        place=place.reshape(steps, rows, 4),
        flip=rng.random((steps, rows)) < 0.5,
    )
