"""The slow, plain twin of the other loaders: Pillow decodes, two matrices resize, one row at a
time.
"""

from collections.abc import Generator

import numpy as np
import torch

from pipelines.images import UNREADABLE, open_image, reason
from pipelines.loaders.base import Loader
from pipelines.plan import PADDING, EpochPlan
from pipelines.store import JPG, DamagedData


def area_matrix(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in): how much of each output pixel's box every input pixel covers. Shrinks and
    enlarges.

    Rows sum to 1: the resize of all loaders is `area_matrix @ image @ area_matrix.T`, rounded to
    nearest.
    """
    edges = np.arange(n_out + 1)[:, None] * (n_in / n_out)
    pixels = np.arange(n_in)
    covered = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return np.maximum(covered, 0) * (n_out / n_in)


def crop_resize(image: np.ndarray, window: np.ndarray, size: int) -> np.ndarray:
    """The window (top, left, height, width) of image (H, W, 3) at (size, size, 3); zeros outside
    the image.
    """
    top, left, height, width = map(int, window)
    margin = max(0, -top, -left, top + height - image.shape[0], left + width - image.shape[1])
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
    crop = padded[top + margin : top + margin + height, left + margin : left + margin + width]
    resized = np.einsum(
        "yh,hwc,xw->yxc", area_matrix(height, size), crop, area_matrix(width, size), optimize=True
    )
    return np.floor(resized + 0.5).astype(np.uint8)


class ReferenceLoader(Loader):
    """See `Loader`. One thread, no prefetch."""

    def _images(self, plan: EpochPlan, start_step: int) -> Generator[torch.Tensor, None, None]:
        for index, window, flip in zip(
            *(a[start_step:] for a in (plan.index, plan.window, plan.flip)), strict=True
        ):
            images = np.zeros((len(index), self.size, self.size, 3), np.uint8)
            for row in np.flatnonzero(index != PADDING):
                images[row] = crop_resize(self._decode(int(index[row])), window[row], self.size)
            images[flip] = images[flip, :, ::-1]
            yield torch.from_numpy(images).to(self.device)

    def _decode(self, index: int) -> np.ndarray:
        encoded = self.store.read(index)
        if self.store.modes[index] != JPG:
            return encoded.reshape(self.store.heights[index], self.store.widths[index], 3)
        try:
            return np.asarray(
                open_image(encoded.tobytes()).convert("RGB")
            )  # as it is stored: upright
        except UNREADABLE as error:
            raise DamagedData(
                f"{self.store.file(index)}: sample {index}: {reason(error)}"
            ) from error
