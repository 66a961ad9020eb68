"""The contract of a task: what stands beside the training step and the evaluation.

Outputs are one tensor whose first dimension is rows, and so are targets. Every slice, permutation,
gather over ranks and carry of the step then works for any task.

The step calls `losses_and_hits`, `attack_losses` and `wrong_targets`. They are captured: recorded
once in a CUDA graph, then replayed on new values in the same memory. So they ask the device for no
value, no shape depends on a value, and what is random is a function of keys, never of a generator.

The evaluation takes all that it tells about a metric from the task: which one matters, how it is
called, and what sums up a corruption benchmark.

A row of an evaluation plan may hold no sample (padding). `Task.references` marks such rows, and
`Evaluator.update` passes over them. Training plans have none, so what the step calls need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from fap.config import Config
from fap.tasks.class_counts import ClassCounter
from fap.tasks.labels import SAME_CLASSES, Matching
from pipelines import EpochPlan, Store

Result = dict[str, float]
"""The metrics of an evaluation by name, and `count`, the number of images."""

Pairs = Iterable[tuple[Tensor, Tensor]]
"""Batches to evaluate: uint8 images (B, 3, H, W), and references (B, ...)."""


def plain_number(found: Mapping[str, object], name: str) -> int | float:
    """A metric out of a file. Raises TypeError for what is no number."""
    value = found[name]
    # JSON's true is Python's True, which is an int too.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"its {name} is no number")
    return value


class Evaluator(Protocol):
    """Gathers what the metrics need, batch after batch. A new one for every evaluation."""

    def update(
        self,
        outputs: Tensor,  # (B, ...)
        references: Tensor,  # (B, ...), on the device of the outputs
    ) -> None:
        """Take in a batch. Padding rows do not count."""

    def result(self) -> Result:
        """The metrics of all batches so far, those of all ranks where torch.distributed runs.

        Raises ValueError if there were no images.
        """


class Judge(Protocol):
    """What a set of images is judged by: its task, unless the set has measures of its own."""

    def evaluator(
        self, device: torch.device, matching: Matching = SAME_CLASSES, store: Store | None = None
    ) -> Evaluator:
        """See `Task.evaluator`."""

    def check_metrics(self, found: Mapping[str, object]) -> Result:
        """See `Task.check_metrics`."""


@dataclass(frozen=True)
class CorruptionMean:
    """A number that sums up a corruption benchmark, where every part of it was measured."""

    title: str
    """How tables call it: mCE, AlexNet = 100."""
    corruptions: Sequence[str]
    """What it covers: each of these at every severity, on as many images."""
    percent: Callable[[Mapping[str, float], float], float]
    """From `Task.measured` of each corruption, its mean over severities, and of clean images."""
    only_imagenet_c: str = ""
    """Why it means nothing for other images than ImageNet's in full size; empty: it always does."""
    paper: str = ""
    """What `config.paper` calls it; empty: the paper has no such number."""
    of_clean: bool = False
    """It compares with clean images, which must be as many."""
    note: str = ""
    """What a reader must know of it where it was computed here; empty: nothing."""


class Task(Protocol):
    """One task, made of a config whose `model.num_classes` is settled."""

    primary: str
    """The metric by which the best epoch is chosen: the higher the better; one of `percents`."""
    percents: Mapping[str, str]
    """Metrics that are fractions, with the words for messages: {top1: top-1}."""
    rows: Mapping[str, str]
    """The metrics in a report's table, `primary` first, with the titles of their rows."""
    measure: str
    """What a report's table tells of corrupted images: error. See `measured`."""
    measure_better: Literal["more", "less"] = "less"
    """Which of two `measured` is the better one; so for `means`."""
    means: Sequence[CorruptionMean]
    """What sums up a corruption benchmark, in the order of the table."""
    loss_parts: Sequence[str] = ()
    """The parts that a row's loss is the sum of, where an attack may follow one of them alone."""
    fewest_classes: int = 2
    """With fewer of them there is nothing to learn."""
    eval_batch: int = 256
    """Images of an evaluation's batch where the user says nothing."""
    n_classes: int
    """Of the model."""
    output_rows: int
    """The first dimension of the last layer's weights: it grows with the number of classes."""

    def __init__(self, config: Config) -> None:
        """Raises ValueError for a config that this task cannot be trained by."""

    def plain_model(self) -> nn.Module:
        """An unconverted model with random weights. Raises ValueError for an unknown name."""

    @staticmethod
    def labels(store: Store) -> tuple[int, int]:
        """The least and the greatest class label in the data.

        Raises ValueError for data that this task cannot be learned from.
        """

    @staticmethod
    def notes(store: Store, config: Config) -> list[str]:
        """What of training data is not trained: lines for the start of a run."""
        return []

    def look_at(self, store: Store) -> list[str]:
        """Take from the training data what `row_weights` depends on. Before the first step.

        Returns lines for the start of a run.
        """
        return []

    def targets(self, store: Store, plan: EpochPlan) -> Tensor:
        """(steps, B, ...): what the rows of a training plan should come to, on the CPU."""

    def references(self, store: Store, plan: EpochPlan) -> Tensor:
        """(steps, B, ...): what an `Evaluator` needs beside the outputs, on the CPU.

        For an evaluation plan. The targets, unless a metric needs something else.
        """
        return self.targets(store, plan)

    def empty_targets(self, rows: int, device: torch.device) -> Tensor:
        """(rows, ...): a buffer for the targets of one step, filled with valid ones."""

    def losses(
        self,
        outputs: Tensor,  # (rows, ...)
        targets: Tensor,  # (rows, ...)
    ) -> Tensor:  # (rows,)
        """The loss of each row, a function of that row alone. Captured."""

    def hits(
        self,
        outputs: Tensor,  # (rows, ...)
        targets: Tensor,  # (rows, ...)
    ) -> Tensor:  # (rows,), 0 or 1, or in between
        """Was the row understood? Captured.

        The leak monitor compares adversarial with clean rows.
        """

    def losses_and_hits(
        self,
        outputs: Tensor,  # (rows, ...)
        targets: Tensor,  # (rows, ...)
    ) -> tuple[Tensor, Tensor]:  # (rows,) each
        """Both, for a task that need not do twice what they have in common. Captured."""
        return self.losses(outputs, targets), self.hits(outputs, targets)

    def row_weights(
        self,
        targets: Tensor,  # (rows, ...)
    ) -> Tensor | None:  # (rows,)
        """What the step multiplies each row's loss by, in training and in attacks; None: by 1.

        Captured.
        """
        return None

    def attack_losses(
        self,
        outputs: Tensor,  # (rows, ...)
        targets: Tensor,  # (rows, ...)
        part: str,  # "total", or one of `loss_parts`
    ) -> Tensor:  # (rows,)
        """What an attack with gradients of its own follows. Captured."""
        return self.losses(outputs, targets)

    def wrong_targets(
        self,
        keys: Tensor,  # int32 (G,)
        targets: Tensor,  # (G * a, ...)
    ) -> Tensor:  # as `targets`
        """Random wrong targets for a targeted attack; rows [g a, (g + 1) a) draw from keys[g].

        Captured. A task that has none refuses a targeted attack when it is made.
        """

    def evaluator(
        self,
        device: torch.device,
        matching: Matching = SAME_CLASSES,
        store: Store | None = None,  # the images', None where they are in none
    ) -> Evaluator:
        """A new one, for outputs and references on `device`. Raises ValueError without `store`
        where the metrics need it.
        """

    def class_counter(self, device: torch.device, matching: Matching) -> ClassCounter | None:
        """What stands beside the evaluator and counts which class was taken for which.

        None where an image has no class, or more than one.
        """
        return None

    def pictures(
        self,
        images: Tensor,  # uint8 (B, 3, H, W), on the CPU, as are the others
        outputs: Tensor,  # (B, ...)
        references: Tensor,  # (B, ...)
        store: Store,  # that the images are in
        names: Sequence[str] | None,  # the model's classes
    ) -> list[Image]:
        """What was found, drawn into each image; none where there is nothing to draw."""
        return []

    def prediction_columns(self, top: int | None) -> list[str]:
        """What stands in a line of `predictions`. `top`: guesses of an image; None: one.

        Raises ValueError for a `top` that has no meaning.
        """
        raise ValueError("this task says nothing of single images")

    def predictions(
        self,
        outputs: Tensor,  # (B, ...), on any device
        windows: np.ndarray,  # int (B, 4): of a plan, what of each image is shown
        places: np.ndarray,  # int (B, 4): and where on the canvas
        names: Sequence[str] | None,  # the model's classes
        top: int | None,
    ) -> list[list[list[str]]]:
        """Of each row its lines, in the order of `prediction_columns`; there may be none."""
        raise ValueError("this task says nothing of single images")

    def check_metrics(self, found: Mapping[str, object]) -> Result:
        """A result without its `count`, as it was kept in a file.

        Raises ValueError, TypeError or OverflowError for what `Evaluator.result` does not give.
        """

    def measured(self, result: Result) -> float:
        """`measure` as a fraction: the error 1 - top1."""
