"""The slow, plain twin of the other loaders: Pillow decodes, row by row.

Bilinear and bicubic are its own resize; the area filter is two matrices.
"""

from collections.abc import Generator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.back_ends import EvalFilter, Filter
from pipelines.images import UNREADABLE, open_image, reason
from pipelines.loaders.base import Loader
from pipelines.plan import PADDING, EpochPlan
from pipelines.planes import split_planes
from pipelines.sizes import Size, sides_of
from pipelines.store import PLANES, RAW, DamagedData

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
MOST_PIXELS = 1 << 24  # of a resized image that is made whole: 7 bytes each, while it is


def area_matrix(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in): how much of each output pixel's box every input pixel covers.

    Rows sum to 1, when it shrinks and when it enlarges. The area resize of all loaders is
    `area_matrix @ image @ area_matrix.T`, rounded to nearest.
    """
    edges = np.arange(n_out + 1)[:, None] * (n_in / n_out)
    pixels = np.arange(n_in)
    covered = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return np.maximum(covered, 0) * (n_out / n_in)


def crop_resize(
    image: np.ndarray,  # uint8 (H, W, 3)
    window: np.ndarray,  # top, left, height, width in pixels of the image
    size: Size,
    filter_: Filter = "area",
) -> np.ndarray:
    """The window at (*sides, 3), uint8; zeros outside the image."""
    out_height, out_width = sides_of(size)
    top, left, height, width = window.tolist()
    bottom_beyond = top + height - image.shape[0]
    right_beyond = left + width - image.shape[1]
    margin = max(0, -top, -left, bottom_beyond, right_beyond)
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
    crop = padded[top + margin :, left + margin :][:height, :width]
    if filter_ in RESAMPLING:
        picture = Image.fromarray(np.ascontiguousarray(crop))
        return np.asarray(picture.resize((out_width, out_height), RESAMPLING[filter_]))
    down = area_matrix(height, out_height)
    across = area_matrix(width, out_width)
    resized = np.einsum("yh,hwc,xw->yxc", down, crop, across, optimize=True)
    return np.floor(resized + 0.5).astype(np.uint8)


def visible_part(
    image: np.ndarray,  # uint8 (H, W, 3)
    place: tuple[int, int, int, int],  # top, left, height, width on the canvas, which it covers
    canvas: tuple[int, int],  # height, width
    filter_: EvalFilter = "bilinear",
) -> np.ndarray:
    """What the canvas shows of the whole image, uint8 (*canvas, 3).

    Without making the rest, which of an image of 1 x 30,000 pixels would take gigabytes. Positions
    are then float32 in Pillow, and its two passes may change places: values may differ by two from
    those of the whole.
    """
    top, left, height, width = place
    down, across = image.shape[0] / height, image.shape[1] / width
    box = (-left * across, -top * down, (canvas[1] - left) * across, (canvas[0] - top) * down)
    picture = Image.fromarray(image)
    return np.asarray(picture.resize(canvas[::-1], RESAMPLING[filter_], box))


def put(
    shown: np.ndarray,  # uint8 (height, width, 3)
    top: int,
    left: int,
    canvas: np.ndarray,  # uint8 (H, W, 3)
) -> None:
    """Lay a picture on a canvas; what reaches outside is cut off."""
    above = max(0, -top)
    before = max(0, -left)
    visible = shown[above : canvas.shape[0] - top, before : canvas.shape[1] - left]
    canvas[max(0, top) :, max(0, left) :][: visible.shape[0], : visible.shape[1]] = visible


def planes_as_rgb(
    y: np.ndarray,  # uint8 (H, W)
    cb: np.ndarray,  # uint8, each side half, rounded up
    cr: np.ndarray,
) -> np.ndarray:
    """The pixels that libjpeg-turbo makes of a 4:2:0 JPEG's planes, uint8 (H, W, 3)."""
    height, width = y.shape
    light = y.astype(np.int64)
    blue = _at_full_size(cb)[:height, :width] - 128
    red = _at_full_size(cr)[:height, :width] - 128
    # JFIF's equations in 65536ths, each rounded to nearest.
    half = 1 << 15
    rgb = (
        light + (91881 * red + half >> 16),
        light + (-22554 * blue - 46802 * red + half >> 16),
        light + (116130 * blue + half >> 16),
    )
    return np.stack(rgb, -1).clip(0, 255).astype(np.uint8)


def _at_full_size(
    plane: np.ndarray,  # uint8 (h, w)
) -> np.ndarray:
    """Colours at twice the sides: 3/4 of a pixel's own value, 1/4 of the nearest other one.

    Along both axes; libjpeg's "fancy upsampling". Planes of one or two columns it merely repeats.
    """
    if plane.shape[1] < 3:
        return plane.astype(np.int64).repeat(2, 0).repeat(2, 1)
    padded = np.pad(plane.astype(np.int64), 1, mode="edge")
    rows = np.empty((2 * plane.shape[0], padded.shape[1]), np.int64)
    rows[0::2] = 3 * padded[1:-1] + padded[:-2]
    rows[1::2] = 3 * padded[1:-1] + padded[2:]
    columns = np.empty((len(rows), 2 * plane.shape[1]), np.int64)
    columns[:, 0::2] = 3 * rows[:, 1:-1] + rows[:, :-2] + 8 >> 4
    columns[:, 1::2] = 3 * rows[:, 1:-1] + rows[:, 2:] + 7 >> 4
    return columns


def decoded(
    encoded: np.ndarray,  # uint8 (n,)
    mode: int,  # of pipelines/store.py
    height: int,
    width: int,
) -> np.ndarray:
    """One sample as it is stored, upright: uint8 (H, W, 3). Raises any of UNREADABLE."""
    if mode == RAW:
        return encoded.reshape(height, width, 3)
    if mode == PLANES:
        return planes_as_rgb(*split_planes(encoded, height, width))
    return np.asarray(open_image(encoded.tobytes()).convert("RGB"))


class ReferenceLoader(Loader):
    """See `Loader`. One thread, nothing is decoded ahead, no options."""

    shows_planes = True

    def _images(self, plan: EpochPlan, start_step: int) -> Generator[Tensor, None, None]:
        for step in range(start_step, len(plan)):
            index = plan.index[step]
            images = np.zeros((len(index), *self.sides, 3), np.uint8)
            rows = np.flatnonzero(index != PADDING)
            numbers = index[rows].tolist()
            samples = zip(rows, numbers, self.store.read_many(numbers), strict=True)
            for row, number, encoded in samples:
                image = self._decode(number, encoded)
                top, left, height, width = plan.place[step, row].tolist()
                window = plan.window[step, row]
                filter_ = plan.spec.filter
                if filter_ != "area" and height * width > MOST_PIXELS:
                    shown = visible_part(image, (top, left, height, width), self.sides, filter_)
                    top, left = 0, 0
                else:
                    shown = crop_resize(image, window, (height, width), filter_)
                if plan.flip[step, row]:
                    shown = shown[:, ::-1]
                put(shown, top, left, images[row])
            yield torch.from_numpy(images).to(self.device)

    def _decode(
        self,
        index: int,
        encoded: np.ndarray,  # uint8 (n,)
    ) -> np.ndarray:
        """One sample as it is stored, upright: uint8 (H, W, 3)."""
        height = int(self.store.heights[index])
        width = int(self.store.widths[index])
        try:
            return decoded(encoded, int(self.store.modes[index]), height, width)
        except UNREADABLE as error:
            raise DamagedData(f"{self.store.name_of(index)}: {reason(error)}") from error
