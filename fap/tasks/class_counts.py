"""Which classes a classifier takes for which: counts of an evaluation, gathered on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed

from fap.tasks.labels import PADDING_LABEL, Matching

MOST_GUESSES = 5  # of top-5
MOST_CLASSES = 2000  # with more of them, K x K counts are no table that anybody reads


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Images by class, those of the model, and how many of them were taken for what."""

    n_images: np.ndarray
    """int64 (K,): images of each class."""
    n_right: np.ndarray
    """int64 (K,): of these, those whose class was the first guess."""
    confusion: np.ndarray | None
    """int64 (K, K): images of the row's class whose first guess was the column's; None for more
    than MOST_CLASSES classes."""

    @classmethod
    def of(cls, table: np.ndarray) -> ClassCounts:
        """From what `table` gives. ValueError for counts that are none."""
        if (table < 0).any():
            raise ValueError("a negative count")
        _, n_classes = table.shape
        if n_classes <= MOST_CLASSES:
            return cls(table.sum(1), table.diagonal().copy(), table)
        n_images, n_right = table
        if (n_right > n_images).any():
            raise ValueError("more images of a class are right than there are")
        return cls(n_images, n_right, None)

    def table(self) -> np.ndarray:
        """All counts, int64: (K, K), or for many classes (2, K), images and right ones."""
        if self.confusion is not None:
            return self.confusion
        return np.stack([self.n_images, self.n_right])


def table_shape(n_classes: int) -> tuple[int, int]:
    """Of `ClassCounts.table`."""
    if n_classes > MOST_CLASSES:
        return 2, n_classes
    return n_classes, n_classes


def first_guesses(
    outputs: Tensor,  # (B, classes)
) -> Tensor:  # int64 (B,)
    """As the accuracy's first guess, also where two classes are equally likely."""
    return outputs.topk(min(MOST_GUESSES, outputs.shape[1])).indices[:, 0]


def as_the_models(
    labels: Tensor,  # int64 (B,): the data's, -1 for padding
    label_map: Tensor | None,  # int64 (K,): the model's class of each of them; None: the same
) -> Tensor:  # int64 (B,): the model's, -1 for padding
    if label_map is None:
        return labels
    mapped = label_map[labels.clamp(min=0)]
    return torch.where(labels == PADDING_LABEL, PADDING_LABEL, mapped)


class ClassCounter:
    """Counts first guesses, batch after batch, in one buffer on the device: it waits for nothing.

    It stands beside a task's evaluator and is updated with the same values.
    """

    def __init__(self, device: torch.device, n_classes: int, matching: Matching) -> None:
        assert not matching.restrict, "the columns are those of all the model's classes"
        assert matching.groups is None, "a class of the data is one of the model's"
        self.n_classes = n_classes
        self.label_map = matching.label_map
        if self.label_map is not None:
            self.label_map = self.label_map.to(device)
        rows, columns = table_shape(n_classes)
        # The last place takes what does not count: padding rows.
        self.counts = torch.zeros(rows * columns + 1, dtype=torch.int64, device=device)

    def update(
        self,
        outputs: Tensor,  # (B, classes)
        references: Tensor,  # int64 (B,): labels, -1 for padding
    ) -> None:
        is_padding = references == PADDING_LABEL
        labels = references.clamp(min=0)
        if self.label_map is not None:
            labels = self.label_map[labels]
        guesses = first_guesses(outputs)
        if self.n_classes > MOST_CLASSES:
            self._count(labels, is_padding)
            self._count(self.n_classes + labels, is_padding | (guesses != labels))
        else:
            self._count(labels * self.n_classes + guesses, is_padding)

    def _count(
        self,
        places: Tensor,  # int64 (B,)
        is_none: Tensor,  # bool (B,): rows that do not count
    ) -> None:
        places = torch.where(is_none, len(self.counts) - 1, places)
        self.counts.index_add_(0, places, torch.ones_like(places))

    def result(self) -> ClassCounts:
        """Of all batches so far, those of all ranks where torch.distributed runs."""
        counts = self.counts.clone()
        if distributed.is_initialized():
            distributed.all_reduce(counts)
        table = counts[:-1].reshape(table_shape(self.n_classes)).cpu().numpy()
        return ClassCounts.of(table)
