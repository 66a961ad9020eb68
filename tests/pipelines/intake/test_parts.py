"""One collection into several files: shards of an array of jobs, and a part for validation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fap.cli.convert import main
from pipelines.convert import check
from pipelines.convert_images import convert_images
from pipelines.intake.parts import Shard, validation_numbers
from pipelines.sources.beton import BetonStore
from pipelines.sources.sidecar import read_sidecar, sidecar_path
from tests.pipelines.intake import forms
from tests.pipelines.samples import contents

ROOT = Path(__file__).resolve().parents[3]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return forms.tar(forms.train_files().items(), tmp_path / "x.tar")


# ------------------------------------------------------------------ shards


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_shards_together_are_the_whole(count: int, tar: Path, tmp_path: Path) -> None:
    convert_images(tar, tmp_path / "whole.beton")
    for number in range(1, count + 1):
        assert main([str(tar), str(tmp_path / "s.beton"), "--shard", f"{number}/{count}"]) == 0
    paths = sorted(tmp_path.glob("s-*.beton"))
    assert len(paths) == count
    found = [sample for path in paths for sample in contents(path)]
    assert found == contents(tmp_path / "whole.beton")
    assert {BetonStore(path).classes for path in paths} == {forms.WNIDS}


def test_names_of_shards_sort_in_their_order() -> None:
    names = [Shard(i, 120).path(Path("a/train.beton")).name for i in range(1, 121)]
    assert names == sorted(names)
    assert names[2] == "train-003-of-120.beton"


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/3", "1/0", "-1/3", "1/3/4", ""])
def test_shards_that_are_none(text: str, tar: Path, tmp_path: Path, capfd: Capture) -> None:
    assert main([str(tar), str(tmp_path / "out.beton"), f"--shard={text}"]) == 1
    assert "shard = " in capfd.readouterr().err


def test_more_shards_than_images(tar: Path, tmp_path: Path, capfd: Capture) -> None:
    assert main([str(tar), str(tmp_path / "out.beton"), "--shard", "1/13"]) == 1
    assert "there are only 12 images" in capfd.readouterr().err


def test_a_shard_that_is_complete_is_left_as_it_is(
    tar: Path, tmp_path: Path, capfd: Capture
) -> None:
    command = [str(tar), str(tmp_path / "s.beton"), "--shard", "2/3"]
    assert main(command) == 0
    dst = tmp_path / "s-2-of-3.beton"
    before = os.stat(dst)
    assert main(command) == 0
    assert "is complete already" in capfd.readouterr().out
    assert os.stat(dst) == before
    assert main([*command, "--quality", "50"]) == 1
    assert "was made from other images or with other options" in capfd.readouterr().err
    data = dst.read_bytes()
    dst.write_bytes(data[:-30])
    assert main(command) == 1
    assert str(dst) in capfd.readouterr().err
    dst.write_bytes(data)
    sidecar_path(dst).unlink()
    assert main(command) == 1


@pytest.mark.slow
def test_a_killed_shard_is_made_again(tar: Path, tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pipelines.sources.beton_writer import BetonWriter
from fap.cli.convert import main
real = BetonWriter.add
def add(self, *arguments):
    real(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)
BetonWriter.add = add
main(sys.argv[1:])
"""
    words = [str(tar), str(tmp_path / "s.beton"), "--shard", "1/2"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "s-1-of-2.beton").exists()
    assert main(words) == 0
    assert check(tmp_path / "s-1-of-2.beton") == []


# ------------------------------------------------------------------ a part for validation


def test_every_image_is_in_one_part_and_every_class_in_both(tar: Path, tmp_path: Path) -> None:
    convert_images(tar, tmp_path / "whole.beton")
    assert main([str(tar), str(tmp_path / "a.beton"), "--val-split", "0.25"]) == 0
    train, val = contents(tmp_path / "a.beton"), contents(tmp_path / "a.val.beton")
    assert [label for label, _ in val] == [0, 1, 2]
    assert [label for label, _ in train] == [0] * 3 + [1] * 3 + [2] * 3
    assert sorted(train + val) == sorted(contents(tmp_path / "whole.beton"))
    for name, part in (("a.beton", "train"), ("a.val.beton", "val")):
        sidecar = read_sidecar(tmp_path / name)
        assert sidecar is not None
        assert sidecar.encoding["part"] == part
        assert (sidecar.encoding["val_split"], sidecar.encoding["seed"]) == (0.25, 0)
        assert BetonStore(tmp_path / name).classes == forms.WNIDS


def test_the_split_is_the_same_for_every_form(tar: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parquet = forms.parquets(forms.train_files(), tmp_path / "p", rng)
    for src, dst in ((tar, "a"), (parquet, "b")):
        assert main([str(src), str(tmp_path / f"{dst}.beton"), "--val-split=.5", "--seed=7"]) == 0
    for suffix in (".beton", ".val.beton"):
        assert contents(tmp_path / f"a{suffix}") == contents(tmp_path / f"b{suffix}")
    assert main([str(tar), str(tmp_path / "c.beton"), "--val-split=.5", "--seed=8"]) == 0
    assert contents(tmp_path / "a.val.beton") != contents(tmp_path / "c.val.beton")


def test_validation_numbers() -> None:
    """Against counting: shares to the nearest image, and at least one image for either part."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        labels = rng.integers(0, 6, int(rng.integers(2, 200)))
        fraction = float(rng.uniform(0.01, 0.99))
        counts = np.bincount(labels, minlength=6)
        if counts.max() < 2:
            continue
        chosen = validation_numbers(labels, fraction, seed=int(rng.integers(9)))
        assert np.all(np.diff(chosen) > 0)
        taken = np.bincount(labels[chosen], minlength=6)
        for count, n in zip(counts.tolist(), taken.tolist(), strict=True):
            if count < 2:
                assert n == 0
            else:
                assert 1 <= n <= count - 1
                assert abs(n - fraction * count) <= 0.5 or n in (1, count - 1)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan")])
def test_fractions_that_are_none(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"val_split = .*: must be between 0 and 1"):
        validation_numbers(np.zeros(9, np.int64), fraction, 0)


def test_classes_of_one_image() -> None:
    with pytest.raises(ValueError, match="no class has two images"):
        validation_numbers(np.arange(9), 0.5, 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--val-split", "0.1", "--shard", "1/2"], "--val-split and --shard"),
        (["--seed", "1"], "--seed 1: at least 0, and with --val-split only"),
        (["--val-split", "0.1", "--seed", "-1"], "--seed -1"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], told: str, capfd: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["a", "b", *words])
    assert told in capfd.readouterr().err


def test_existing_parts_are_not_overwritten(tar: Path, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "a.val.beton").write_bytes(b"precious")
    assert main([str(tar), str(tmp_path / "a.beton"), "--val-split", "0.25"]) == 1
    assert "a.val.beton exists and is not overwritten" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.val.beton", "x.tar"]
    assert (tmp_path / "a.val.beton").read_bytes() == b"precious"
