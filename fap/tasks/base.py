"""The contract of a task: what stands beside the training step and the evaluation.

Outputs are one tensor whose first dimension is rows, and so are targets. Every slice, permutation,
gather over ranks and carry of the step then works for any task. What the step calls asks the device
for no value and gives shapes that depend on no value: it is captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fap.config import Config
from fap.tasks.labels import SAME_CLASSES, Matching
from pipelines import EpochPlan, Store

Result = dict[str, float]
"""The metrics of an evaluation by name; `count` is the number of images."""


class Evaluator(Protocol):
    """Gathers what the metrics need, batch after batch. A new one for every evaluation."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in a batch, without waiting for the device. Padding rows do not count."""

    def result(self) -> Result:
        """The metrics of all batches so far, those of all ranks where torch.distributed runs.

        Raises ValueError if there were no images.
        """


class Task(Protocol):
    """One task, made of a config whose `model.num_classes` is settled."""

    primary: str
    """The metric by which the best epoch is chosen: the higher the better."""
    percents: Mapping[str, str]
    """Metrics that are fractions, with the words for tables and messages: top1: top-1."""

    def __init__(self, config: Config) -> None: ...

    def plain_model(self) -> nn.Module:
        """An unconverted model with random weights. ValueError for a name nobody knows."""

    def targets(self, store: Store, plan: EpochPlan) -> Tensor:
        """(steps, B, ...): what the rows of a plan should come to, on the CPU."""

    def empty_targets(self, rows: int, device: torch.device) -> Tensor:
        """(rows, ...): a static buffer, as `targets` has them for one step."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(rows,): the loss of each row."""

    def hits(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(rows,): was the row understood? Compares clean with adversarial rows (leak monitor)."""

    def wrong_targets(self, keys: Tensor, targets: Tensor) -> Tensor:
        """As `targets`: random wrong ones to aim a targeted attack at, drawn from int32 keys (G,).

        Raises ValueError if this task has none.
        """

    def match(
        self,
        names: Sequence[str] | None,  # the data's classes, in the order of its labels
        labels: tuple[int, int],  # the least and the greatest label of the data
        model_names: Sequence[str] | None,  # the model's classes
        *,
        by_position: bool = False,
        restrict: bool = False,
    ) -> Matching:
        """How the data's classes become the model's. Raises ValueError where they do not fit.

        `by_position`: the user allows what names do not show. `restrict`: only the data's own
        classes count.
        """

    def evaluator(self, device: torch.device, matching: Matching = SAME_CLASSES) -> Evaluator:
        """For outputs and targets on `device`."""

    def check_result(self, found: Mapping[str, object]) -> Result:
        """A result as it was kept in a file. Raises ValueError or TypeError for anything else."""


Pairs = Iterable[tuple[Tensor, Tensor]]
"""Batches for evaluation: uint8 images (B, 3, H, W), and targets (B, ...)."""
