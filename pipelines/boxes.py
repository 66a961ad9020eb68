"""Boxes: what a data set says of its images, and where an epoch plan puts them on the canvas.

Coordinates are edges and not numbers of pixels: a box around all of an image of 4 x 3 pixels (width
4) is 0, 0, 4, 3. So a box keeps its place in the picture when the picture is resized.

Words: N images with K boxes in all; a box is (left, top, right, bottom), a window or a place is
(top, left, height, width), as in plan.py. A crowd box is around many objects at once: it is never
trained, and what a detector finds there counts neither for nor against it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipelines.plan import PADDING, EpochPlan

NO_BOX = -1  # the class of a row of `plan_boxes` that holds no box
LEAST_SIDE = 1.0  # source pixels that must be left of a box in the window, along both sides

BOX_FIELDS = {
    "boxes": np.float32,
    "classes": np.int32,
    "crowd": np.bool_,
    "area": np.float32,
}  # of Annotations: one row per box


@dataclass(frozen=True, eq=False)
class Annotations:
    """The boxes of N images; those of image i are the rows [first[i], first[i + 1]).

    Nobody writes to the arrays. `check` holds them against the images.

    Raises:
        ValueError: the arrays are of other types or shapes, or a box that is none.
    """

    # int64 (N + 1,), ascending from 0 to K.
    first: np.ndarray
    # float32 (K, 4): left, top, right, bottom in pixels of the stored image.
    boxes: np.ndarray
    # int32 (K,): places in the store's `classes`.
    classes: np.ndarray
    # bool (K,).
    crowd: np.ndarray
    # float32 (K,), square pixels of the stored image, by which a scorer calls an object small.
    area: np.ndarray

    def __post_init__(self) -> None:
        if self.first.dtype != np.int64 or self.first.ndim != 1 or not len(self.first):
            raise ValueError("first: must be int64 (N + 1,)")
        n = len(self.classes)
        for name, dtype in BOX_FIELDS.items():
            values = getattr(self, name)
            shape = (n, 4) if name == "boxes" else (n,)
            if values.dtype != dtype or values.shape != shape:
                raise ValueError(
                    f"{name}: {values.dtype} {values.shape}, must be {np.dtype(dtype)} {shape}"
                )
        if self.first[0] != 0 or self.first[-1] != n or (np.diff(self.first) < 0).any():
            raise ValueError(f"first: must ascend from 0 to the number of boxes, {n:,}")
        left, top, right, bottom = self.boxes.T
        # Written so that NaN fails.
        upright = (left >= 0) & (top >= 0) & (right > left) & (bottom > top)
        self._require(upright & np.isfinite(self.boxes).all(1), "is no box")
        self._require((self.area >= 0) & np.isfinite(self.area), "has an area that is none")

    def check(
        self,
        heights: np.ndarray,  # (N,) pixels
        widths: np.ndarray,  # (N,) pixels
        n_classes: int,
    ) -> None:
        """ValueError unless these are boxes of those images, inside them, of those classes."""
        if len(self) != len(heights):
            raise ValueError(f"boxes of {len(self):,} images, and there are {len(heights):,}")
        _, _, right, bottom = self.boxes.T
        inside = (right <= widths[self.image]) & (bottom <= heights[self.image])
        self._require(inside, "reaches outside its image")
        known = (self.classes >= 0) & (self.classes < n_classes)
        self._require(known, f"is of none of the {n_classes:,} classes")

    def _require(self, ok: np.ndarray, what: str) -> None:
        """`ok`: bool (K,). The message names the first box that is not."""
        if ok.all():
            return
        at = int(np.argmin(ok))
        image = int(self.image[at])
        number = at - int(self.first[image])
        raise ValueError(f"image {image}, box {number}: {self.boxes[at].tolist()} {what}")

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.first) - 1

    @cached_property
    def image(self) -> np.ndarray:
        """int64 (K,): the image of every box."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    def trained_per_image(self) -> np.ndarray:
        """int64 (N,): the boxes of every image without its crowd boxes."""
        before = np.concatenate([[0], np.cumsum(~self.crowd)])
        return np.diff(before[self.first])

    def beyond(self, most_boxes: int) -> tuple[int, int]:
        """What an image may have at most, `most_boxes`, leaves out: boxes, and images of these.

        Crowd boxes do not count. A crop that shows fewer of an image's boxes leaves out fewer.
        """
        too_many = np.maximum(self.trained_per_image() - most_boxes, 0)
        return int(too_many.sum()), int(np.count_nonzero(too_many))

    def crc32(self, crc32: int = 0) -> int:
        """Continue a checksum with all that is said of the boxes."""
        crc32 = zlib.crc32(self.first.tobytes(), crc32)
        for name in BOX_FIELDS:
            crc32 = zlib.crc32(getattr(self, name).tobytes(), crc32)
        return crc32


# ------------------------------------------------------------------ source <-> canvas


def canvas_boxes(
    boxes: np.ndarray,  # (n, 4) pixels of the stored image
    window: np.ndarray,  # (n, 4) top, left, height, width, pixels of the stored image
    place: np.ndarray,  # (n, 4) top, left, height, width, pixels of the canvas
    flip: np.ndarray,  # bool (n,)
) -> np.ndarray:
    """The boxes in pixels of the canvas, float64 (n, 4), clipped to the place.

    A box outside the window becomes one without area. The flip mirrors the window inside its place.
    """
    left, top, right, bottom = np.asarray(boxes, np.float64).T
    window_top, window_left, window_height, window_width = _columns(window)
    place_top, place_left, place_height, place_width = _columns(place)

    x_scale = place_width / np.maximum(window_width, 1)  # a padding row's window is empty
    y_scale = place_height / np.maximum(window_height, 1)
    x_first = (left - window_left) * x_scale
    x_last = (right - window_left) * x_scale
    y_first = (top - window_top) * y_scale
    y_last = (bottom - window_top) * y_scale
    mirrored_first = np.where(flip, place_width - x_last, x_first)
    mirrored_last = np.where(flip, place_width - x_first, x_last)

    found = np.stack(
        [
            place_left + np.clip(mirrored_first, 0, place_width),
            place_top + np.clip(y_first, 0, place_height),
            place_left + np.clip(mirrored_last, 0, place_width),
            place_top + np.clip(y_last, 0, place_height),
        ],
        axis=1,
    )
    return found


def source_boxes(
    boxes: np.ndarray,  # (n, 4) pixels of the canvas
    window: np.ndarray,  # (4,) or (n, 4) top, left, height, width, pixels of the stored image
    place: np.ndarray,  # (4,) or (n, 4) top, left, height, width, pixels of the canvas
) -> np.ndarray:
    """The opposite of `canvas_boxes` without flip: float64 (n, 4), clipped to the window."""
    left, top, right, bottom = np.asarray(boxes, np.float64).T
    window_top, window_left, window_height, window_width = _columns(window)
    place_top, place_left, place_height, place_width = _columns(place)

    x_scale = window_width / np.maximum(place_width, 1)  # a padding row's place is empty
    y_scale = window_height / np.maximum(place_height, 1)
    found = np.stack(
        [
            window_left + np.clip((left - place_left) * x_scale, 0, window_width),
            window_top + np.clip((top - place_top) * y_scale, 0, window_height),
            window_left + np.clip((right - place_left) * x_scale, 0, window_width),
            window_top + np.clip((bottom - place_top) * y_scale, 0, window_height),
        ],
        axis=1,
    )
    return found


def _columns(rows: np.ndarray) -> np.ndarray:
    """Columns of (4,) or (n, 4), as float64: the plan's int16 would overflow."""
    return np.moveaxis(np.asarray(rows, np.float64), -1, 0)


# ------------------------------------------------------------------ a whole epoch


def plan_boxes(plan: EpochPlan, annotations: Annotations, most_boxes: int) -> np.ndarray:
    """The boxes to train on the canvases of an epoch: float32 (steps, B, most_boxes, 5).

    A row is class, left, top, right, bottom in pixels of the canvas. Rows without a box have class
    NO_BOX and zeros, and follow the others. Left out are crowd boxes, boxes of which less than
    LEAST_SIDE is left in the window, and what a canvas has beyond the first `most_boxes`.

    Raises:
        ValueError: `most_boxes` is below 1, or the plan was drawn for more images.
    """
    if most_boxes < 1:
        raise ValueError(f"most_boxes = {most_boxes}: must be at least 1")
    index = plan.index.reshape(-1)
    holds_image = index != PADDING
    image = np.where(holds_image, index, 0).astype(np.int64)
    if len(image) and image.max() >= len(annotations):
        raise ValueError(
            f"a plan for more than the {len(annotations):,} images that there are boxes of"
        )

    # Every box of every row of the plan, one behind the other: of which row, and which box.
    trained = np.flatnonzero(~annotations.crowd)
    first = np.searchsorted(trained, annotations.first)  # (N + 1,) places in `trained`
    n = np.where(holds_image, first[image + 1] - first[image], 0)
    row = np.repeat(np.arange(len(n)), n)
    number = np.arange(len(row)) - np.repeat(np.cumsum(n) - n, n)  # of a box within its row
    box = trained[first[image[row]] + number]

    window = plan.window.reshape(-1, 4)[row]
    boxes = annotations.boxes[box].astype(np.float64)
    keep = (_sides_inside(boxes, window) >= LEAST_SIDE).all(1)
    row, box, boxes, window = row[keep], box[keep], boxes[keep], window[keep]
    place = plan.place.reshape(-1, 4)[row]
    found = canvas_boxes(boxes, window, place, plan.flip.reshape(-1)[row])

    # The rows are in order, so a row's first box is where the row would be inserted.
    number = np.arange(len(row)) - np.searchsorted(row, row)
    fits = number < most_boxes
    targets = np.zeros((len(n), most_boxes, 5), np.float32)
    targets[:, :, 0] = NO_BOX
    targets[row[fits], number[fits], 0] = annotations.classes[box[fits]]
    targets[row[fits], number[fits], 1:] = found[fits]
    return targets.reshape(*plan.index.shape, most_boxes, 5)


def _sides_inside(
    boxes: np.ndarray,  # float64 (n, 4)
    window: np.ndarray,  # (n, 4)
) -> np.ndarray:
    """(n, 2): width and height, in source pixels, of what the window shows of the boxes."""
    left, top, right, bottom = boxes.T
    window_top, window_left, window_height, window_width = _columns(window)
    width = np.minimum(right, window_left + window_width) - np.maximum(left, window_left)
    height = np.minimum(bottom, window_top + window_height) - np.maximum(top, window_top)
    return np.stack([width, height], 1)
