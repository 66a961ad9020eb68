"""Classification against slow plain twins, on fresh random input."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fap.config import Config, make_config
from fap.tasks.classification import Accuracy, Classification
from fap.tasks.labels import SAME_CLASSES, Matching
from pipelines import eval_plan

CPU = torch.device("cpu")
N_CLASSES = 7


def config(n_classes: int | None = N_CLASSES, **optim: Any) -> Config:
    return make_config({
        "name": "tiny",
        "model": {"name": "cifar_resnet8", "num_classes": n_classes},
        "optim": optim,
    })  # fmt: skip


def drawn(rows: int, n_classes: int = N_CLASSES) -> tuple[Tensor, Tensor]:
    """Logits (rows, n_classes), no two of a row alike, and labels (rows,)."""
    places = torch.rand(rows, n_classes).argsort(1)
    logits = places - n_classes / 2 + torch.rand(rows, n_classes) / 2
    return logits, torch.randint(0, n_classes, (rows,))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


# ---------------------------------------------------------------------- what the step calls


@dataclass
class Labelled:
    """All that `targets` and `look_at` look at of a store."""

    labels: np.ndarray
    classes: tuple[str, ...] | None = None


def test_targets_are_the_labels_of_the_plans_rows_and_minus_one_for_padding() -> None:
    store = Labelled(np.random.default_rng().integers(0, N_CLASSES, 10))
    sides = np.full(10, 32, np.int32)
    plan = eval_plan(sides, sides, size=32, resize=32, batch=4)
    found = Classification(config()).targets(store, plan)
    assert found.shape == (3, 4)
    assert found.dtype == torch.int64
    assert found.flatten().tolist() == [*store.labels, -1, -1]
    assert len(store.labels) == 10
    assert store.labels.min() >= 0  # the store's own labels are as they were


def test_empty_targets_are_valid_ones_of_the_same_type() -> None:
    task = Classification(config())
    empty = task.empty_targets(5, CPU)
    outputs, targets = drawn(5)
    assert empty.shape == targets.shape
    assert empty.dtype == targets.dtype
    assert task.losses(outputs, empty).isfinite().all()


def test_class_weights_are_looked_up_by_label() -> None:
    weights = [0.5 + label for label in range(N_CLASSES)]
    task = Classification(config(class_weights=weights))
    said = ["weights    of classes, as given: 0.5 (0) to 6.5 (6)"]
    assert task.look_at(Labelled(np.zeros(3, int))) == said  # type: ignore[arg-type]
    found = task.row_weights(torch.tensor([3, 0, 6, 3]))
    assert found is not None
    assert found.tolist() == [3.5, 0.5, 6.5, 3.5]
    plain = Classification(config())
    assert plain.row_weights(torch.tensor([3])) is None
    assert plain.look_at(Labelled(np.zeros(3, int))) == []  # type: ignore[arg-type]


def test_balanced_class_weights_are_those_of_the_data() -> None:
    """Each class weighs as much as any other, and an image 1 on average."""
    labels = np.random.default_rng().permutation([0] * 12 + [2] * 3 + [3] * 4 + [6])
    names = tuple("abcdefg")
    task = Classification(config(class_weights="balanced"))
    said = task.look_at(Labelled(labels, names))  # type: ignore[arg-type]
    found = task.row_weights(torch.arange(N_CLASSES))
    assert found is not None
    of_images = [found[label].item() for label in labels]
    assert np.mean(of_images) == pytest.approx(1)
    for label in (0, 2, 3, 6):
        total = sum(weight for weight, own in zip(of_images, labels, strict=True) if own == label)
        assert total == pytest.approx(20 / 4)
    assert found[[1, 4, 5]].tolist() == [1, 1, 1]  # of no images
    assert said == ["weights    of classes, balanced: 0.4167 ('a') to 5 ('g')"]


def test_class_weights_must_be_one_for_each_class() -> None:
    says = r"optim.class_weights = \[1.0, 2.0\]: 2 numbers for 7 classes"
    with pytest.raises(ValueError, match=says):
        Classification(config(class_weights=[1, 2]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_cross_entropies_row_by_row(smoothing: float) -> None:
    logits, targets = drawn(20)
    outputs = logits.double()
    found = Classification(config(label_smoothing=smoothing)).losses(outputs, targets)
    for row, label in enumerate(targets.tolist()):
        logs = log_softmax(outputs[row].numpy())
        wanted = np.full(N_CLASSES, smoothing / N_CLASSES)
        wanted[label] += 1 - smoothing
        assert found[row].item() == pytest.approx(-(wanted * logs).sum(), rel=1e-9)


def test_hits_are_rows_whose_label_has_the_largest_logit() -> None:
    outputs, targets = drawn(200)
    found = Classification(config()).hits(outputs, targets)
    rows = zip(outputs.tolist(), targets.tolist(), strict=True)
    assert found.tolist() == [max(logits) == logits[label] for logits, label in rows]
    assert 0 < found.sum() < 200


def keys(n: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (n,)).int()


def test_wrong_targets_are_wrong_labels_evenly() -> None:
    n_rows = 4 * 5000
    labels = torch.randint(0, 10, (n_rows,))
    found = Classification(config(10)).wrong_targets(keys(4), labels)
    assert found.dtype == labels.dtype
    assert (found != labels).all()
    assert found.min() >= 0
    assert found.max() < 10
    counts = torch.bincount((found - labels) % 10, minlength=10)[1:]
    assert (counts / (n_rows / 9) - 1).abs().max() < 0.15


def test_wrong_targets_are_a_function_of_their_key() -> None:
    task = Classification(config(100))
    labels = torch.randint(0, 100, (4 * 16,))
    k = keys(4)
    found = task.wrong_targets(k, labels)
    assert torch.equal(task.wrong_targets(k[2:3], labels[32:48]), found[32:48])
    assert not torch.equal(task.wrong_targets(keys(4), labels), found)


def test_of_two_classes_the_wrong_one_is_the_other() -> None:
    found = Classification(config(2)).wrong_targets(keys(2), torch.tensor([0, 1, 1, 0]))
    assert found.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("n_classes", [None, 1])
def test_a_classifier_needs_two_classes(n_classes: int | None) -> None:
    with pytest.raises(ValueError, match=f"num_classes = {n_classes}: .*at least 2"):
        Classification(config(n_classes))


def test_the_plain_model_is_the_configs() -> None:
    outputs = Classification(config()).plain_model()(torch.zeros(2, 3, 32, 32))
    assert outputs.shape == (2, N_CLASSES)


# ---------------------------------------------------------------------- the metrics


def naive_ece(confidences: list[float], right: list[bool]) -> float:
    """15 bins, one after the other: |accuracy - confidence| of each, weighted by its images."""
    total = 0.0
    for k in range(15):
        inside = [i for i, c in enumerate(confidences) if k / 15 < c <= (k + 1) / 15]
        if inside:
            accuracy = np.mean([right[i] for i in inside])
            confidence = np.mean([confidences[i] for i in inside])
            total += len(inside) / len(confidences) * abs(accuracy - confidence)
    return total


def naive_accuracy(
    outputs: np.ndarray, targets: np.ndarray, label_map: list[int] | None, restrict: bool
) -> dict[str, float]:
    """One row at a time: the place of the label's logit among all that count."""
    losses = []
    places = []
    confidences = []
    for logits, label in zip(outputs, targets, strict=True):
        if label < 0:
            continue
        kept = logits
        wanted = label
        if restrict:
            kept = logits[label_map]
        elif label_map is not None:
            wanted = label_map[label]
        losses.append(-log_softmax(kept)[wanted])
        places.append(sum(logit > kept[wanted] for logit in kept))
        confidences.append(math.exp(log_softmax(kept).max()))
    return {
        "loss": sum(losses) / len(losses),
        "top1": sum(place < 1 for place in places) / len(places),
        "top5": sum(place < 5 for place in places) / len(places),
        "ece": naive_ece(confidences, [place < 1 for place in places]),
        "count": len(places),
    }


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("n_labels", "restrict"), [(None, False), (6, False), (6, True), (3, True)]
)
def test_accuracy_equals_the_twin(padding: int, n_labels: int | None, restrict: bool) -> None:
    n_classes = 12
    label_map = None
    labels_drawn = n_classes
    matching = SAME_CLASSES
    if n_labels is not None:
        label_map = torch.randperm(n_classes)[:n_labels]
        labels_drawn = n_labels
        matching = Matching("by name", label_map, restrict)
    evaluator = Classification(config(n_classes)).evaluator(CPU, matching)
    all_outputs = []
    all_targets = []
    for rows in (16, 1, 9):
        outputs, _ = drawn(rows + padding, n_classes)
        targets = torch.randint(0, labels_drawn, (rows + padding,))
        targets[torch.randperm(rows + padding)[:padding]] = -1
        evaluator.update(outputs, targets)
        all_outputs.append(outputs.double().numpy())
        all_targets.append(targets.numpy())
    listed = None
    if label_map is not None:
        listed = label_map.tolist()
    expected = naive_accuracy(
        np.concatenate(all_outputs), np.concatenate(all_targets), listed, restrict
    )
    found = evaluator.result()
    close = {name: pytest.approx(expected[name], rel=1e-9) for name in ("loss", "ece")}
    assert found == expected | close
    assert found["ece"] > 0.01
    assert found["count"] == 26
    assert evaluator.result() == found  # asking changes nothing


def test_the_calibration_error_of_known_confidences() -> None:
    """Four images at confidence 0.8, two of them right, and one of padding; then sure and right."""
    outputs = torch.tensor([[math.log(0.8), math.log(0.2)]]).expand(5, 2)
    evaluator = Accuracy(CPU, label_map=None, restrict=False)
    evaluator.update(outputs, torch.tensor([0, 1, 0, 1, -1]))
    assert evaluator.result()["ece"] == pytest.approx(0.3, rel=1e-6)
    evaluator.update(torch.tensor([[0.0, 1000.0]]).expand(4, 2), torch.ones(4, dtype=torch.int64))
    assert evaluator.result()["ece"] == pytest.approx(0.15, rel=1e-6)


def test_a_model_that_diverged_has_no_calibration_error() -> None:
    outputs = torch.tensor([[math.nan, 1.0], [0.0, 1.0]])
    evaluator = Accuracy(CPU, label_map=None, restrict=False)
    evaluator.update(outputs, torch.tensor([-1, 1]))
    assert evaluator.result()["ece"] == pytest.approx(1 - 1 / (1 + math.exp(-1)))
    evaluator.update(outputs, torch.tensor([1, 1]))
    assert math.isnan(evaluator.result()["ece"])


def test_the_loss_of_an_evaluation_is_not_smoothed() -> None:
    outputs, targets = drawn(8)
    evaluator = Classification(config(label_smoothing=0.1)).evaluator(CPU)
    evaluator.update(outputs, targets)
    plain = Classification(config()).losses(outputs.double(), targets)
    assert evaluator.result()["loss"] == pytest.approx(plain.mean().item())


def test_an_evaluation_of_padding_alone_is_refused() -> None:
    evaluator = Accuracy(CPU, label_map=None, restrict=False)
    with pytest.raises(ValueError, match="no images"):
        evaluator.result()
    evaluator.update(torch.randn(3, N_CLASSES), torch.full((3,), -1))
    with pytest.raises(ValueError, match="no images"):
        evaluator.result()


# ---------------------------------------------------------------------- results out of files

METRICS = {"loss": 1.5, "top1": 0.25, "top5": 1, "ece": 0.1}


def test_metrics_out_of_a_file_are_floats_in_their_order() -> None:
    found = Classification(config()).check_metrics(METRICS)
    assert [*found.items()] == [("loss", 1.5), ("top1", 0.25), ("top5", 1.0), ("ece", 0.1)]
    assert all(type(value) is float for value in found.values())
    backwards = dict(reversed(METRICS.items()))
    assert [*Classification(config()).check_metrics(backwards)] == [*METRICS]
    diverged = Classification(config()).check_metrics(METRICS | {"loss": math.nan, "ece": math.nan})
    assert math.isnan(diverged["loss"])
    assert math.isnan(diverged["ece"])


@pytest.mark.parametrize(("change", "message"), [
    ({"top1": 1.5}, "no accuracies"),
    ({"top1": -0.1}, "no accuracies"),
    ({"top1": math.nan}, "no accuracies"),
    ({"top5": math.nan}, "no accuracies"),
    ({"top5": 0.1}, "no accuracies"),
    ({"top5": 2}, "no accuracies"),
    ({"loss": -1.0}, "negative"),
    ({"ece": -0.1}, "no calibration error"),
    ({"ece": 1.1}, "no calibration error"),
    ({"ece": None}, "ece is no number"),
    ({"top1": True}, "top1 is no number"),
    ({"top1": "0.5"}, "top1 is no number"),
    ({"loss": None}, "loss is no number"),
    ({"loss": 10**400}, "too large"),
    ({"map": 0.5}, "other metrics"),
    ({"count": 40}, "other metrics"),
])  # fmt: skip
def test_other_metrics_out_of_a_file_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError), match=message):
        Classification(config()).check_metrics(METRICS | change)


def test_missing_metrics_are_refused() -> None:
    for missing in METRICS:
        rest = {name: value for name, value in METRICS.items() if name != missing}
        with pytest.raises(ValueError, match="other metrics"):
            Classification(config()).check_metrics(rest)


def test_a_kept_result_is_what_an_evaluator_gives() -> None:
    task = Classification(config())
    evaluator = task.evaluator(CPU)
    evaluator.update(*drawn(50))
    result = evaluator.result()
    count = result.pop("count")
    assert type(count) is int
    assert task.check_metrics(result) == result
    assert {task.primary, *task.percents} <= set(result)
    assert set(task.rows) == set(result)
    assert task.measured(result) == 1 - result["top1"]
