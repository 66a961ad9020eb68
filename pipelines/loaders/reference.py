"""The slow, plain twin of the other loaders: Pillow decodes, two matrices resize, row by row."""

from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from pipelines.images import UNREADABLE, open_image, reason
from pipelines.loaders.base import Loader
from pipelines.plan import PADDING, EpochPlan
from pipelines.sizes import Size, sides_of
from pipelines.store import JPG, DamagedData


def area_matrix(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in): how much of each output pixel's box every input pixel covers.

    Rows sum to 1, when it shrinks and when it enlarges. The resize of all loaders is
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
) -> np.ndarray:
    """The window at (*sides, 3), uint8; zeros outside the image."""
    out_height, out_width = sides_of(size)
    top, left, height, width = window.tolist()
    bottom_beyond = top + height - image.shape[0]
    right_beyond = left + width - image.shape[1]
    margin = max(0, -top, -left, bottom_beyond, right_beyond)
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
    crop = padded[top + margin :, left + margin :][:height, :width]
    down = area_matrix(height, out_height)
    across = area_matrix(width, out_width)
    resized = np.einsum("yh,hwc,xw->yxc", down, crop, across, optimize=True)
    return np.floor(resized + 0.5).astype(np.uint8)


class ReferenceLoader(Loader):
    """See `Loader`. One thread, nothing is decoded ahead, no options."""

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
                shown = crop_resize(image, plan.window[step, row], (height, width))
                if plan.flip[step, row]:
                    shown = shown[:, ::-1]
                images[row, top : top + height, left : left + width] = shown
            yield torch.from_numpy(images).to(self.device)

    def _decode(
        self,
        index: int,
        encoded: np.ndarray,  # uint8 (n,)
    ) -> np.ndarray:
        """One sample as it is stored, upright: uint8 (H, W, 3)."""
        if self.store.modes[index] != JPG:
            return encoded.reshape(self.store.heights[index], self.store.widths[index], 3)
        try:
            return np.asarray(open_image(encoded.tobytes()).convert("RGB"))
        except UNREADABLE as error:
            raise DamagedData(f"{self.store.name_of(index)}: {reason(error)}") from error
