"""Mixed rows through a run: what is mixed, and that a carry of mixed rows is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.run.wiring import Seen, observe

ALL_OF_IT = ("data.mix=either", "data.mix_per=row", "data.mix_on=both")


def trained(seen: Seen) -> torch.Tensor:
    assert seen.error == ""
    return seen.weights[-1]


@pytest.mark.parametrize("schedule", ["fused", "pipelined"])
def test_mixed_rows_are_resumed_in_the_middle_of_an_epoch(
    schedule: str, files: dict[str, Path], tmp_path: Path
) -> None:
    """The carry of `pipelined` has partners and shares, too."""
    words = [*ALL_OF_IT, f"method.schedule={schedule}", "run.max_steps=5"]
    whole = observe(words, files, tmp_path / "whole" / "runs")
    half = observe([*words, "run.max_steps=3"], files, tmp_path / "runs")
    assert half.run is not None
    carried = {name for name in half.run.step.state() if name.startswith("carry.")}
    if schedule == "pipelined":
        assert {"carry.partners", "carry.lam"} < carried
    rest = observe([*words, "resume=auto"], files, tmp_path / "runs")
    assert (len(half.inputs), len(rest.inputs)) == (3, 2)
    assert torch.equal(trained(rest), trained(whole))


def test_mixing_adversarial_rows_leaves_the_clean_ones_as_they_are(
    files: dict[str, Path], tmp_path: Path
) -> None:
    words = ["data.mix=mixup", "data.mix_per=row", "run.max_steps=1"]
    clean = observe(words, files, tmp_path / "clean")
    both = observe([*words, "data.mix_on=both"], files, tmp_path / "both")
    assert "mix        mixup, alpha 1, drawn per row, of clean rows" in clean.said
    assert "of clean and adversarial rows" in both.said
    one, other = (seen.inputs[0]["mix_lam"] for seen in (clean, both))
    assert torch.equal(one[:8], other[:8])
    assert (one[8:] == 1).all()
    assert (other[8:] < 1).any()
    first, second = (seen.records[0] for seen in (clean, both))
    assert first["loss_clean"] == second["loss_clean"]
    assert first["loss_noise"] != second["loss_noise"]
    assert not torch.equal(clean.adversarial[0], both.adversarial[0])


def test_copies_of_mixed_rows_are_attacked(files: dict[str, Path], tmp_path: Path) -> None:
    words = ["method.name=advprop", "method.p_adv=null", "method.attack_steps=1", "run.max_steps=1"]
    mixed = observe([*words, "data.mix=cutmix", "data.mix_on=both"], files, tmp_path / "mixed")
    plain = observe(words, files, tmp_path / "plain")
    assert mixed.error == plain.error == ""
    loaded = mixed.inputs[0]["images"]
    assert torch.equal(loaded, plain.inputs[0]["images"])
    eps = 4
    assert (plain.adversarial[0] - loaded).abs().max() <= eps
    assert (mixed.adversarial[0] - loaded).abs().max() > eps


def test_boxes_are_those_of_an_epochs_size(files: dict[str, Path], tmp_path: Path) -> None:
    words = ["data.sizes=[[0,6],[3,8]]", "data.mix=cutmix", "data.mix_per=row", "run.max_steps=6"]
    seen = observe([*words, "method.schedule=pipelined"], files, tmp_path / "runs")
    assert seen.error == ""
    sizes = [inputs["images"].shape[-1] for inputs in seen.inputs]
    assert sizes == [6, 6, 6, 6, 8, 8]
    largest: dict[int, int] = {}
    for size, inputs in zip(sizes, seen.inputs, strict=True):
        top, left, bottom, right = inputs["mix_box"].T
        area = (bottom - top) * (right - left)
        torch.testing.assert_close(inputs["mix_lam"], 1 - area / size**2)
        largest[size] = max(largest.get(size, 0), int(inputs["mix_box"].max()))
    assert largest == {6: 6, 8: 8}
