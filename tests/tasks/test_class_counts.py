"""Which class was taken for which: counts on the device, against loops over single rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fap.tasks import class_counts
from fap.tasks.class_counts import ClassCounter, ClassCounts
from fap.tasks.classification import Accuracy
from fap.tasks.labels import SAME_CLASSES, Matching

CPU = torch.device("cpu")
K = 7


def batches(n_labels: int = K) -> list[tuple[Tensor, Tensor]]:
    """Logits and labels of three batches; the last one ends with padding rows."""
    found = []
    for rows in (16, 16, 5):
        outputs = torch.randn(16, K)
        labels = torch.randint(0, n_labels, (16,))
        labels[rows:] = -1
        found.append((outputs, labels))
    return found


def one_by_one(pairs: list[tuple[Tensor, Tensor]], to: list[int]) -> np.ndarray:
    """The slow twin."""
    table = np.zeros((K, K), np.int64)
    for outputs, labels in pairs:
        for row, label in zip(outputs, labels.tolist(), strict=True):
            if label >= 0:
                table[to[label], int(row.argmax())] += 1
    return table


@pytest.mark.parametrize("label_map", [None, [4, 0, 6]])
@pytest.mark.parametrize("many", [False, True])
def test_the_counts_are_those_of_single_rows(
    seed: int, label_map: list[int] | None, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if many:
        monkeypatch.setattr(class_counts, "MOST_CLASSES", 3)
    matching = SAME_CLASSES
    if label_map is not None:
        matching = Matching("by name", torch.tensor(label_map))
    to = label_map or list(range(K))
    pairs = batches(len(to))
    counter = ClassCounter(CPU, K, matching)
    accuracy = Accuracy(CPU, matching.label_map, False)
    for outputs, labels in pairs:
        counter.update(outputs, labels)
        accuracy.update(outputs, labels)
    found = counter.result()
    twin = one_by_one(pairs, to)
    np.testing.assert_array_equal(found.n_images, twin.sum(1))
    np.testing.assert_array_equal(found.n_right, twin.diagonal())
    if many:
        assert found.confusion is None
    else:
        np.testing.assert_array_equal(found.confusion, twin)
    reached = accuracy.result()
    assert found.n_images.sum() == reached["count"]
    assert found.n_right.sum() / reached["count"] == reached["top1"]
    again = ClassCounts.of(found.table())
    np.testing.assert_array_equal(again.table(), found.table())


def test_counts_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="negative"):
        ClassCounts.of(np.array([[1, 0], [-1, 2]]))
    monkeypatch.setattr(class_counts, "MOST_CLASSES", 2)
    with pytest.raises(ValueError, match="more images of a class are right"):
        ClassCounts.of(np.array([[1, 2, 3], [1, 3, 3]]))
