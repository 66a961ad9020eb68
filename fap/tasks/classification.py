"""Classification: cross-entropy on class labels; top-1 and top-5 accuracy, calibration.

Targets are labels, int64, -1 for padding rows; outputs are logits (rows, classes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from fap.config import Config
from fap.draws import random_bits
from fap.nets.build import plain
from fap.tasks.base import Result, Task, plain_number
from fap.tasks.class_counts import MOST_GUESSES, ClassCounter
from fap.tasks.labels import PADDING_LABEL, SAME_CLASSES, Matching, compared
from fap.tasks.mce import MEANS
from pipelines import EpochPlan, Store
from pipelines.files import readable, shown

CPU = torch.device("cpu")
BINS = 15  # of the calibration error, as in Guo et al. (2017)
WRONG_LABELS = 0x3C6EF372  # sets these draws apart from others under the same keys
ALL_BUT_THE_SIGN = 0x7FFFFFFF  # of an int32


class Classification(Task):
    """Every row has one label; see `fap.tasks.base.Task` for what is not said here."""

    primary = "top1"
    percents: Mapping[str, str] = {"top1": "top-1", "top5": "top-5", "ece": "calibration error"}
    rows: Mapping[str, str] = {
        "top1": "top-1 accuracy",
        "top5": "top-5 accuracy",
        "loss": "loss",
        "ece": "calibration error (ECE)",
    }
    measure = "error"
    measure_better = "less"
    means = MEANS

    def __init__(self, config: Config) -> None:
        """Raises ValueError for fewer than two classes."""
        n_classes = config.model.num_classes
        if n_classes is None or n_classes < 2:
            raise ValueError(
                f"model.num_classes = {n_classes}: a classifier needs at least 2 classes, "
                "and a targeted attack a wrong one to aim at"
            )
        if config.method.attack_loss not in (None, "total"):
            raise ValueError(
                f"method.attack_loss = {config.method.attack_loss!r}: the loss of a classifier has "
                "no parts, so only 'total'"
            )
        self.n_classes = n_classes
        self.output_rows = n_classes
        self.model_name = config.model.name
        self.size = config.data.size
        self.drop_path = config.model.drop_path
        self.label_smoothing = config.optim.label_smoothing
        self.class_weights = config.optim.class_weights
        # float64 (n_classes,), by device: within a capture nothing may come from the host.
        self._weights: dict[torch.device, Tensor] = {}
        if isinstance(self.class_weights, tuple):
            if len(self.class_weights) != n_classes:
                raise ValueError(
                    f"optim.class_weights = {shown(list(self.class_weights))}: "
                    f"{len(self.class_weights)} numbers for {n_classes} classes"
                )
            self._weights[CPU] = torch.tensor(self.class_weights, dtype=torch.float64)

    def plain_model(self) -> nn.Module:
        return plain(self.model_name, self.n_classes, self.size, self.drop_path)

    @staticmethod
    def labels(store: Store) -> tuple[int, int]:
        if store.annotations is not None:
            raise ValueError(
                f"{readable(store.path)} holds boxes and no class labels: write task=detection"
            )
        return int(store.labels.min()), int(store.labels.max())

    def look_at(self, store: Store) -> list[str]:
        """Class weights, where they follow from the data; the least and the greatest are shown."""
        if self.class_weights is None:
            return []
        if self.class_weights == "balanced":
            self._weights = {CPU: balanced_weights(store.labels, self.n_classes)}
        weights = self._weights[CPU]
        least = int(weights.argmin())
        most = int(weights.argmax())
        names = store.classes or range(self.n_classes)
        how = "as given"
        if self.class_weights == "balanced":
            how = "balanced"
        return [
            f"weights    of classes, {how}: {weights[least]:.4g} ({shown(names[least])}) "
            f"to {weights[most]:.4g} ({shown(names[most])})"
        ]

    def targets(self, store: Store, plan: EpochPlan) -> Tensor:  # int64 (steps, B)
        return torch.from_numpy(plan.look_up(store.labels, padding=PADDING_LABEL))

    def empty_targets(self, rows: int, device: torch.device) -> Tensor:  # int64 (rows,)
        if self.class_weights is not None:
            self._weights_on(device)
        return torch.zeros(rows, dtype=torch.int64, device=device)

    def losses(
        self,
        outputs: Tensor,  # (rows, classes)
        targets: Tensor,  # int64 (rows,)
    ) -> Tensor:  # (rows,)
        return F.cross_entropy(
            outputs, targets, reduction="none", label_smoothing=self.label_smoothing
        )

    def hits(
        self,
        outputs: Tensor,  # (rows, classes)
        targets: Tensor,  # int64 (rows,)
    ) -> Tensor:  # bool (rows,)
        return outputs.argmax(1) == targets

    def row_weights(
        self,
        targets: Tensor,  # int64 (rows,)
    ) -> Tensor | None:  # float64 (rows,)
        """Those of the rows' classes."""
        if self.class_weights is None:
            return None
        return self._weights_on(targets.device)[targets]

    def _weights_on(self, device: torch.device) -> Tensor:
        assert self._weights, "balanced class weights: `look_at` comes first"
        if device not in self._weights:
            self._weights[device] = self._weights[CPU].to(device)
        return self._weights[device]

    def wrong_targets(
        self,
        keys: Tensor,  # int32 (G,)
        targets: Tensor,  # int64 (G * a,)
    ) -> Tensor:  # int64 (G * a,)
        """A wrong label for every row, each equally likely."""
        rows_per_key = len(targets) // len(keys)
        bits = random_bits(keys ^ WRONG_LABELS, rows_per_key).flatten().long()
        # 1 to n_classes - 1 places further round the circle of classes: never the label itself.
        distance = 1 + (bits & ALL_BUT_THE_SIGN) % (self.n_classes - 1)
        return (targets + distance) % self.n_classes

    def evaluator(
        self, device: torch.device, matching: Matching = SAME_CLASSES, store: Store | None = None
    ) -> Accuracy:
        return Accuracy(device, matching.label_map, matching.restrict, matching.groups)

    def class_counter(self, device: torch.device, matching: Matching) -> ClassCounter:
        return ClassCounter(device, self.n_classes, matching)

    def prediction_columns(self, top: int | None) -> list[str]:
        if top is not None and not 1 <= top <= self.n_classes:
            raise ValueError(f"top = {top}: must be 1 to {self.n_classes}, the model's classes")
        columns = ["class", "probability"]
        for k in range(2, (top or 1) + 1):
            columns += [f"class_{k}", f"probability_{k}"]
        return columns

    def predictions(
        self,
        outputs: Tensor,  # (B, classes)
        windows: np.ndarray,
        places: np.ndarray,
        names: Sequence[str] | None,
        top: int | None,
    ) -> list[list[list[str]]]:
        """One line for each row: the likeliest classes, each with its probability."""
        likeliest = outputs.double().softmax(1).topk(top or 1)
        found = []
        for values, classes in zip(
            likeliest.values.tolist(), likeliest.indices.tolist(), strict=True
        ):
            line: list[str] = []
            for value, number in zip(values, classes, strict=True):
                line += [names[number] if names else str(number), f"{value:.6g}"]
            found.append([line])
        return found

    def check_metrics(self, found: Mapping[str, object]) -> Result:
        if found.keys() != {"loss", "top1", "top5", "ece"}:
            raise ValueError("it has other metrics")
        loss = float(plain_number(found, "loss"))
        top1 = float(plain_number(found, "top1"))
        top5 = float(plain_number(found, "top5"))
        ece = float(plain_number(found, "ece"))
        if not 0 <= top1 <= top5 <= 1:
            raise ValueError("it has no accuracies")
        # The loss of a model that diverged is NaN, and so is its calibration error.
        if not math.isnan(loss) and loss < 0:
            raise ValueError("a negative loss")
        if not math.isnan(ece) and not 0 <= ece <= 1:
            raise ValueError("it has no calibration error")
        return {"loss": loss, "top1": top1, "top5": top5, "ece": ece}

    def measured(self, result: Result) -> float:
        return 1 - result["top1"]


def balanced_weights(
    labels: np.ndarray,  # integers (N,)
    n_classes: int,
) -> Tensor:  # float64 (n_classes,)
    """N / (k n_c) of a class with n_c images, where k classes have any: the mean over images is 1.

    1 for a class without images, which only a targeted attack aims at.
    """
    counts = torch.from_numpy(np.bincount(labels, minlength=n_classes)).double()
    there = counts > 0
    weights = len(labels) / (there.sum() * counts)
    return torch.where(there, weights, 1.0)


class Accuracy:
    """Mean loss without label smoothing, top-1, top-5 and calibration error.

    A `fap.tasks.base.Evaluator`. The expected calibration error (Guo et al., 2017, equation 3) is
    the mean over images of |accuracy - confidence| of the bin that an image's confidence lies in.
    The confidence is the greatest softmax probability, the bins are BINS of equal width, each with
    its upper edge.
    """

    def __init__(
        self,
        device: torch.device,
        label_map: Tensor | None,  # as in `fap.tasks.labels.Matching`, as are the others
        restrict: bool,
        groups: Tensor | None = None,
    ) -> None:
        on_device = (None if one is None else one.to(device) for one in (label_map, groups))
        label_map, groups = on_device
        self.matching = Matching("", label_map, restrict, groups)
        # Loss, top-1, top-5, images, then of each bin its right images less their confidences: of
        # all batches, on the device.
        self.sums = torch.zeros(4 + BINS, dtype=torch.float64, device=device)
        self.edges = torch.arange(BINS + 1, dtype=torch.float64, device=device) / BINS

    def update(
        self,
        outputs: Tensor,  # (B, classes)
        references: Tensor,  # int64 (B,): labels, -1 for padding
    ) -> None:
        outputs, targets = compared(outputs, references, self.matching)
        # In float64, as the sums: they depend neither on the batch nor on the ranks.
        loss = F.cross_entropy(
            outputs.double(), targets, ignore_index=PADDING_LABEL, reduction="sum"
        )
        guesses = outputs.topk(min(MOST_GUESSES, outputs.shape[1])).indices
        hits = guesses == targets[:, None]
        counted = targets != PADDING_LABEL
        four = torch.stack([loss, hits[:, 0].sum(), hits.sum(), counted.sum()])
        confidences = outputs.double().softmax(1).amax(1)
        surplus = torch.where(counted, hits[:, 0].double() - confidences, 0)
        self.sums += torch.cat([four, self._in_bins(confidences).T.double() @ surplus])

    def _in_bins(
        self,
        confidences: Tensor,  # (B,)
    ) -> Tensor:  # bool (B, BINS)
        above = confidences[:, None] > self.edges[:-1]
        return above & (confidences[:, None] <= self.edges[1:])

    def result(self) -> Result:
        sums = self.sums.clone()
        if distributed.is_initialized():
            distributed.all_reduce(sums)
        loss, top1, top5, count, *surpluses = sums.tolist()
        if not count:
            raise ValueError("evaluation: the data hold no images")
        return {
            "loss": loss / count,
            "top1": top1 / count,
            "top5": top5 / count,
            # A bin's share of the images times what accuracy and confidence differ by in it.
            "ece": sum(abs(surplus) for surplus in surpluses) / count,
            "count": int(count),
        }
