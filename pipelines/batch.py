"""What every loader yields, and the two calls every loader has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .plan import EpochPlan


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
