"""What every loader yields, and the two calls every loader has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from .plan import PADDING, EpochPlan
from .store import Store


@dataclass(frozen=True)
class Batch:
    """One step's images: rows [0, n_clean) clean, the rest adversarial. Valid until the next is asked for."""

    images: Tensor  # uint8 (B, 3, H, W), channels_last, on the training device; one shape for the whole run
    labels: Tensor  # int64 (B,), same device; -1 = padding row of an evaluation plan
    step: int  # row of the plan


class Loader(Protocol):
    """Executes plans. Breaking out of an iterator early leaks neither threads nor memory."""

    def load(self, plan: EpochPlan, start_step: int = 0) -> Iterator[Batch]:
        """`len(plan) - start_step` batches; the same images whatever the threads and the starting step.

        Raises:
            DamagedData: a sample cannot be read or decoded; the message names file and index.
        """
        ...

    def close(self) -> None:
        """Release threads and buffers."""
        ...


def check_plan(plan: EpochPlan, store: Store, size: int) -> None:
    """Every loader's first act: a plan drawn for another store must not reach outside its images.

    Raises:
        ValueError: the plan's size is not `size`, or its rows do not fit the store's images.
    """
    if plan.spec.size != size:
        raise ValueError(f"plan of size {plan.spec.size}: the loader was opened for size = {size}")
    real = plan.index != PADDING
    index = plan.index[real]
    top, left, height, width = plan.window[real].T.astype(np.int32)
    fits = (height == size) & (width == size)  # such a window is copied; outside the image it is zero
    if plan.spec.crop != "pad" and index.max(initial=0) < len(store):
        fits = (np.minimum(top, left) >= 0) & (np.minimum(height, width) > 0)
        fits &= (top + height <= store.heights[index]) & (left + width <= store.widths[index])
    if not fits.all() or index.max(initial=0) >= len(store):
        raise ValueError(f"plan: it was not drawn for the images of {store.path}")


def labels_of(plan: EpochPlan, step: int, store: Store) -> np.ndarray:
    """int64 (B,), -1 for padding rows."""
    index = plan.index[step]
    return np.where(index == PADDING, -1, store.labels[np.where(index == PADDING, 0, index)])
