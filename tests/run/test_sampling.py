"""Classes of unequal size in a run: shown in balance, or weighted; and images shown again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import write_beton
from tests.run.wiring import observe


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """24 images: 18 of class 0, three of 1, two of 2, one of 3; two steps an epoch."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (14, 14, 3), dtype=np.uint8) for _ in range(24)]
    labels = [0] * 18 + [1] * 3 + [2] * 2 + [3]
    return {"data": write_beton(tmp_path_factory.mktemp("rare") / "rare.beton", images, labels)}


def test_classes_come_equally_often(rare: dict[str, Path], tmp_path: Path) -> None:
    words = ["run.max_steps=4", "data.sampling=balanced"]
    seen = observe(words, rare, tmp_path / "runs")
    assert seen.error == ""
    assert "sampling   balanced: every class equally often" in seen.said
    for first in (0, 2):
        epoch = torch.cat([inputs["targets"] for inputs in seen.inputs[first : first + 2]])
        assert torch.bincount(epoch).tolist() == [6, 6, 6, 6]
    plain = observe(["run.max_steps=4"], rare, tmp_path / "plain" / "runs")
    assert "sampling" not in plain.said
    epoch = torch.cat([inputs["targets"] for inputs in plain.inputs[:2]])
    assert torch.bincount(epoch).tolist() == [18, 3, 2, 1]


@pytest.mark.parametrize("sampling", ["shuffle", "balanced"])
def test_repeats_are_resumed_in_the_middle_of_an_epoch(
    sampling: str, rare: dict[str, Path], tmp_path: Path
) -> None:
    words = [f"data.sampling={sampling}", "data.repeats=2", "run.max_steps=5"]
    whole = observe(words, rare, tmp_path / "whole" / "runs")
    half = observe([*words, "run.max_steps=3"], rare, tmp_path / "runs")
    rest = observe([*words, "resume=auto"], rare, tmp_path / "runs")
    assert whole.error == half.error == rest.error == ""
    assert "each 2 times in a step: an epoch shows 1/2 of them" in whole.said
    assert torch.equal(rest.weights[-1], whole.weights[-1])
    for plan in whole.plans:
        for rows in plan.index:
            assert (np.unique(rows, return_counts=True)[1] % 2 == 0).all()


# ---------------------------------------------------------------------- class weights


def test_class_weights_are_factors_of_the_losses(rare: dict[str, Path], tmp_path: Path) -> None:
    """Two for every class doubles every loss, and of nothing else does it ask more."""
    once = observe(["run.max_steps=1"], rare, tmp_path / "once" / "runs")
    words = ["run.max_steps=1", "optim.class_weights=[2, 2, 2, 2]"]
    twice = observe(words, rare, tmp_path / "twice" / "runs")
    assert "weights    of classes, as given: 2 (0) to 2 (0)" in twice.said
    assert "weights    of" not in once.said
    for kind in ("clean", "noise"):
        assert twice.records[0][f"loss_{kind}"] == 2 * once.records[0][f"loss_{kind}"]
        assert twice.records[0][f"acc_{kind}"] == once.records[0][f"acc_{kind}"]


def test_balanced_weights_are_the_datas_and_are_resumed(
    rare: dict[str, Path], tmp_path: Path
) -> None:
    words = ["optim.class_weights=balanced", "method.schedule=pipelined", "run.max_steps=5"]
    whole = observe(words, rare, tmp_path / "whole" / "runs")
    assert whole.error == ""
    assert "weights    of classes, balanced: 0.3333 (0) to 6 (3)" in whole.said
    half = observe([*words, "run.max_steps=3"], rare, tmp_path / "runs")
    rest = observe([*words, "resume=auto"], rare, tmp_path / "runs")
    assert half.error == rest.error == ""
    assert torch.equal(rest.weights[-1], whole.weights[-1])
    by_hand = [18, 3, 2, 1]
    given = [24 / (4 * count) for count in by_hand]
    same = observe([*words, f"optim.class_weights={given}"], rare, tmp_path / "same" / "runs")
    assert torch.equal(same.weights[-1], whole.weights[-1])
    assert whole.run is not None
    assert "  class_weights: balanced" in (whole.run.folder / "config.yaml").read_text()
    other = observe(
        [*words, f"optim.class_weights={given}", "resume=auto"], rare, tmp_path / "runs"
    )
    assert "trained with other settings" in other.error


def test_weights_are_one_for_each_class(rare: dict[str, Path], tmp_path: Path) -> None:
    seen = observe(["optim.class_weights=[1, 2]"], rare, tmp_path / "runs")
    assert seen.error == "optim.class_weights = [1.0, 2.0]: 2 numbers for 4 classes"
