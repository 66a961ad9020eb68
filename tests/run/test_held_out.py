"""`data.val_share`: a part of data.train is held out of training, and validated on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fap.checkpoint import Checkpoints
from fap.cli.convert import main as convert
from fap.config import load_config
from fap.run.data import open_data
from fap.run.train import Run
from tests.conftest import noise_beton
from tests.run.runs import assert_same, records, without_metrics, words

SHARE = ("data.val=null", "data.val_share=0.25")
# 96 images less 26 (2 of 9 or 3 of 10 of every class): 3 steps of 16 + 4 rows an epoch.
SMALL = ("model.num_classes=null", "budget.epochs=4", "budget.milestones=[2]")


def trained(data: Path, runs: Path, *more: str) -> Path:
    """The folder of a run of three epochs."""
    run = Run(load_config(None, words(data, runs, *SMALL, *more)))
    run.train()
    return run.folder


def last(folder: Path) -> dict[str, float]:
    return [record for record in records(folder) if "val_top1" in record][-1]


def test_the_run_is_that_of_the_two_converted_parts(
    tiny_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights, and the same images validated: fap-convert --val-split made them."""
    assert convert([str(tiny_beton), str(tmp_path / "a.beton"), "--val-split", "0.25"]) == 0
    parts = (f"data.val={tmp_path / 'a.val.beton'}", "data.val_share=null")
    expected = trained(tmp_path / "a.beton", tmp_path / "two", *parts)
    capsys.readouterr()
    folder = trained(tiny_beton, tmp_path / "one", *SHARE)
    said = capsys.readouterr().out
    assert "train      70 images, labels 0 to 9" in said
    assert "val        26 images, labels 0 to 9" in said
    assert f"held out of {tiny_beton}: 0.25 of every class" in said
    assert_same(_state(folder), _state(expected))
    assert last(folder)["val_top1"] == last(expected)["val_top1"]
    assert last(folder)["val_loss"] == last(expected)["val_loss"]
    saved = load_config(folder / "config.yaml")
    assert saved.data.val_share == 0.25
    assert saved.data.val is None


def _state(folder: Path) -> dict:
    newest = Checkpoints(folder / "checkpoints").newest()
    assert newest is not None
    return without_metrics(newest[1])


def test_resumed_in_the_middle_of_an_epoch_it_ends_alike(tiny_beton: Path, tmp_path: Path) -> None:
    whole = trained(tiny_beton, tmp_path / "whole", *SHARE)
    trained(tiny_beton, tmp_path / "runs", *SHARE, "run.max_steps=4")
    folder = trained(tiny_beton, tmp_path / "runs", *SHARE, "resume=auto")
    assert_same(_state(folder), _state(whole))
    # Another part is other data.
    with pytest.raises(
        ValueError, match=r"trained with other data than data\.train is now: 70 images, now 56"
    ):
        trained(tiny_beton, tmp_path / "runs", "data.val=null", "data.val_share=0.4", "resume=auto")


def test_the_part_is_the_same_for_every_seed(tiny_beton: Path, tmp_path: Path) -> None:
    """So seeds are compared on the same images."""
    found = []
    for seed in (0, 1):
        data = open_data(load_config(None, words(tiny_beton, tmp_path, *SHARE, f"seed={seed}")))
        found.append((data.train_identity, data.val_identity))
    assert found[0] == found[1]


def test_it_stands_in_the_place_of_data_val(tiny_beton: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.val_share = 0\.2 with data\.val = "):
        load_config(None, words(tiny_beton, tmp_path, "data.val_share=0.2"))
    for share in ("0", "0.5", "-0.1", "true"):
        with pytest.raises(ValueError, match=r"data\.val_share = "):
            load_config(None, ["data.val=null", f"data.val_share={share}"])
    config = load_config(None, words(tiny_beton, tmp_path, "data.val=null"))
    with pytest.raises(ValueError, match=r"data\.val is not set: .* data\.val_share=0\.1"):
        open_data(config)
    single = noise_beton(tmp_path / "one.beton", seed=1, count=4, classes=4)
    config = load_config(None, [f"data.train={single}", *SHARE])
    with pytest.raises(ValueError, match=r"data\.val_share = 0\.25: .*no class has two images"):
        open_data(config)
