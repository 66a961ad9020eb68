"""Small images of one size, all of them in the memory of the training device.

For sets such as CIFAR-10, which decoding on CPU cores would hold up on a GPU: 150 MB, from which a
step is one gather. It shows the pixels of `reference`, as nothing is resized.
"""

from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from pipelines.files import readable
from pipelines.loaders.base import Batch, Loader
from pipelines.plan import PADDING, EpochPlan
from pipelines.sizes import Size
from pipelines.store import RAW, Store

IMAGES_AT_A_TIME = 1 << 14  # that are read


class MemoryLoader(Loader):
    """See `Loader`. The images are read once, when the loader is opened; no options.

    Raises ValueError for images that are not raw or not of one size, DamagedData; and in `load`
    ValueError for a plan that resizes them.
    """

    def __init__(self, store: Store, *, size: Size, device: torch.device | str = "cpu") -> None:
        super().__init__(store, size=size, device=device)
        self.pixels = _read(store).to(self.device)  # uint8 (N, H, W, 3)

    @classmethod
    def refusal(cls, store: Store) -> str:
        if (store.modes != RAW).any():
            return (
                "holds JPEGs or decoded planes, and data.pipeline = memory shows raw pixels alone:"
                " choose another, or convert the images with --raw"
            )
        if len(set(zip(store.heights.tolist(), store.widths.tolist(), strict=True))) > 1:
            return "holds images of several sizes, and data.pipeline = memory those of one size"
        return ""

    def load(self, plan: EpochPlan, start_step: int = 0) -> Generator[Batch, None, None]:
        batches = super().load(plan, start_step)
        real = plan.index != PADDING
        resizes = (plan.place[..., 2:] != plan.window[..., 2:])[real].any()
        if resizes or plan.spec.crop == "letterbox":
            raise ValueError(
                f"{readable(self.store.path)}: data.pipeline = memory does not resize images: it "
                "needs data.crop = pad, and a data.resize of the images' own size for validation; "
                "choose another"
            )
        return batches

    def _images(self, plan: EpochPlan, start_step: int) -> Generator[Tensor, None, None]:
        # The whole plan at once: then no step waits for a copy from the host.
        index, top, left, flip = self._on_device(plan)
        height, width = self.pixels.shape[1:3]
        y = torch.arange(self.sides[0], device=self.device)
        x = torch.arange(self.sides[1], device=self.device)
        for step in range(start_step, len(plan)):
            rows = top[step, :, None] + y  # (B, canvas height): lines of the images
            from_left = torch.where(flip[step, :, None], self.sides[1] - 1 - x, x)
            columns = left[step, :, None] + from_left  # (B, canvas width)
            seen = ((rows >= 0) & (rows < height))[:, :, None]
            seen = seen & ((columns >= 0) & (columns < width))[:, None, :]
            is_sample = index[step] != PADDING
            seen &= is_sample[:, None, None]
            shown = self.pixels[
                torch.where(is_sample, index[step], 0)[:, None, None],
                rows.clamp(0, height - 1)[:, :, None],
                columns.clamp(0, width - 1)[:, None, :],
            ]
            yield shown.mul_(seen[..., None])

    def _on_device(self, plan: EpochPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each row: image, line and column at the canvas' top left corner, mirrored or not."""
        corner = plan.window[..., :2].astype(np.int64) - plan.place[..., :2]
        arrays = (plan.index.astype(np.int64), corner[..., 0], corner[..., 1], plan.flip)
        index, top, left, flip = (
            torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays
        )
        return index, top, left, flip.bool()


def _read(store: Store) -> Tensor:  # uint8 (N, H, W, 3)
    shape = (int(store.heights[0]), int(store.widths[0]), 3)
    pixels = np.empty((len(store), *shape), np.uint8)
    for start in range(0, len(store), IMAGES_AT_A_TIME):
        numbers = range(start, min(start + IMAGES_AT_A_TIME, len(store)))
        for number, sample in zip(numbers, store.read_many(numbers), strict=True):
            pixels[number] = sample.reshape(shape)
    return torch.from_numpy(pixels)
