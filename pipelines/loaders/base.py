"""What every loader yields, and what all loaders share."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.machine import usable_cores
from pipelines.plan import PADDING, EpochPlan
from pipelines.store import Store


@dataclass(frozen=True)
class Batch:
    """One step's images: rows [0, n_clean) clean, the rest adversarial.

    Valid until the next one is asked for. What the rows should come to is looked up by the plan.
    """

    # uint8 (B, 3, H, W), channels_last, on the training device; one shape for the whole run.
    images: torch.Tensor
    step: int  # row of the plan


class Loader(ABC):
    """Executes plans of `size` x `size` pixels. Breaking out of an iterator early leaks neither
    threads nor memory.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        store: Store,
        *,
        size: int,
        device: torch.device | str = "cpu",
        threads: int | None = None,  # None: all cores this process may use, a CPU quota included
        prefetch: int = 3,  # batches in the making while one is used
        hw_decoder_load: float = 0.65,  # DALI: share of the JPEGs for the GPU's hardware decoder
    ) -> None:
        for name, value in (("threads", threads), ("prefetch", prefetch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if not 0 <= hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load = {hw_decoder_load}: must be in [0, 1]")
        self.store, self.size, self.prefetch, self.hw_decoder_load = (
            store,
            size,
            prefetch,
            hw_decoder_load,
        )
        self.threads = threads or usable_cores()
        self.device = torch.empty(0, device=device).device  # with the index of a GPU

    def load(self, plan: EpochPlan, start_step: int = 0) -> Iterator[Batch]:
        """`len(plan) - start_step` batches; the same images whatever the threads and the starting
        step.

        Raises:
            ValueError: the plan was not drawn for this store or size.
            DamagedData: a sample cannot be read or decoded; the message names file and index.
        """
        if plan.spec.size != self.size:
            raise ValueError(
                f"plan of size {plan.spec.size}: the loader was opened for size = {self.size}"
            )
        real = plan.index != PADDING
        index = plan.index[real]
        top, left, height, width = plan.window[real].T.astype(np.int32)
        known = index.max(initial=0) < len(self.store)
        fits = (height == self.size) & (
            width == self.size
        )  # such a window is copied; outside the image it is zero
        if plan.spec.crop != "pad" and known:
            fits = (np.minimum(top, left) >= 0) & (np.minimum(height, width) > 0)
            fits &= (top + height <= self.store.heights[index]) & (
                left + width <= self.store.widths[index]
            )
        if not (known and fits.all()):  # it must not reach outside another store's images
            raise ValueError(f"plan: it was not drawn for the images of {self.store.path}")
        return self._batches(plan, start_step)

    def close(self) -> None:  # noqa: B027
        """Nothing outlives the iterators of `load`."""

    def _batches(self, plan: EpochPlan, start_step: int) -> Iterator[Batch]:
        with closing(self._images(plan, start_step)) as steps:
            for step, images in enumerate(steps, start_step):
                yield Batch(images.permute(0, 3, 1, 2), step)

    @abstractmethod
    def _images(self, plan: EpochPlan, start_step: int) -> Generator[torch.Tensor, None, None]:
        """Steps `start_step`, `start_step` + 1, ...: uint8 (B, size, size, 3) on the device; zeros
        for PADDING rows.
        """
