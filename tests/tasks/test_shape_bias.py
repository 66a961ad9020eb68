"""Decisions for shape and texture, by the authors' rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fap.class_maps import imagenet, sixteen_categories
from fap.tasks.labels import ClassMap, Matching, match_labels
from fap.tasks.shape_bias import ShapeOrTexture, pair

CPU = torch.device("cpu")
CATEGORIES = list(sixteen_categories())


def matching(classes: list[str]) -> Matching:
    class_map = ClassMap("x", "by map", sixteen_categories())
    return match_labels(CATEGORIES, (0, 15), classes, len(classes), class_map=class_map)


def decided(probabilities: np.ndarray, classes: list[str]) -> int:
    """As probabilities_to_decision.py: the first category with the highest mean."""
    means = []
    for wnids in sixteen_categories().values():
        values = [probabilities[classes.index(wnid)] for wnid in wnids]
        means.append(sum(values) / len(values))
    return means.index(max(means))


def test_shape_bias_equals_the_twin() -> None:
    generator = np.random.default_rng(5)
    classes = generator.permutation(imagenet()).tolist()  # a run's order may be any
    logits = generator.normal(size=(60, 1000)) * 3
    decisions = [decided(np.exp(row) / np.exp(row).sum(), classes) for row in logits]
    assert len(set(decisions)) > 3
    cues = []
    for number, decision in enumerate(decisions):
        others = [c for c in range(16) if c != decision]
        shape, texture = generator.choice(others, 2, replace=False).tolist()
        if number % 3 == 0:
            shape = decision
        if number % 3 == 1 and number % 2:
            texture = decision
        cues.append((shape, texture))
    references = torch.tensor([pair(*both) for both in cues] + [-1, -1])
    outputs = torch.from_numpy(np.concatenate([logits, logits[:2]]))
    evaluator = ShapeOrTexture(1000).evaluator(CPU, matching(classes))
    for rows in (slice(0, 25), slice(25, 62)):
        evaluator.update(outputs[rows], references[rows])
    n_shape = sum(d == shape for d, (shape, _) in zip(decisions, cues, strict=True))
    n_texture = sum(d == texture for d, (_, texture) in zip(decisions, cues, strict=True))
    assert (n_shape, n_texture) == (20, 10)
    assert evaluator.result() == {
        "shape_bias": 20 / 30, "top1": 20 / 60, "texture": 10 / 60, "count": 60,
    }  # fmt: skip


def test_a_mean_is_no_sum() -> None:
    """One class of a category of one beats many of a category of 109 that have more together."""
    logits = torch.full((1, 1000), -20.0)
    for wnid in sixteen_categories()["dog"]:
        logits[0, imagenet().index(wnid)] = 0.0
    (knife,) = sixteen_categories()["knife"]
    logits[0, imagenet().index(knife)] = 1.0
    evaluator = ShapeOrTexture(1000).evaluator(CPU, matching(list(imagenet())))
    evaluator.update(
        logits, torch.tensor([pair(CATEGORIES.index("dog"), CATEGORIES.index("knife"))])
    )
    assert evaluator.result()["texture"] == 1


def test_without_any_decision_there_is_no_bias() -> None:
    evaluator = ShapeOrTexture(1000).evaluator(CPU, matching(list(imagenet())))
    with pytest.raises(ValueError, match="no images"):
        evaluator.result()
    logits = torch.zeros(1, 1000)
    logits[0, imagenet().index(sixteen_categories()["oven"][0])] = 9
    evaluator.update(logits, torch.tensor([pair(0, 1)]))
    result = evaluator.result()
    assert math.isnan(result.pop("shape_bias"))
    assert result == {"top1": 0, "texture": 0, "count": 1}


METRICS = {"shape_bias": 0.25, "top1": 0.1, "texture": 0.3}


def test_metrics_out_of_a_file() -> None:
    judge = ShapeOrTexture(1000)
    assert judge.check_metrics(METRICS) == METRICS
    assert math.isnan(judge.check_metrics(METRICS | {"shape_bias": math.nan})["shape_bias"])
    for odd in ({"shape_bias": 1.5}, {"top1": -0.1}, {"top1": 0.8}, {"loss": 1.0}):
        with pytest.raises(ValueError, match="it has"):
            judge.check_metrics(METRICS | odd)
    with pytest.raises(TypeError):
        judge.check_metrics(METRICS | {"top1": True})
