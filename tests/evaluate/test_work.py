"""Every set is evaluated once, and again when anything that it depends on has changed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fap.evaluate import evaluation
from fap.evaluate.exact import evaluate
from fap.evaluate.images import Reading
from fap.tasks.base import Result
from pipelines.convert import convert_arrays
from pipelines.convert_images import convert_images
from pipelines.corrupt import QUICK
from pipelines.sources import cifar10
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.store import JPG
from tests.evaluate.world import (
    CHECKPOINT,
    WNIDS,
    counted,
    dated,
    fresh,
    refused,
    run,
    write_checkpoint,
    write_folder,
)


def test_every_set_of_the_command(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {"--imagenet-c": "c", "--imagenet-r": "r", "--stylized": "stylized"}
    arguments = [word for option, name in folders.items() for word in (option, str(world / name))]
    found, text = run(world, "--corrupt", *arguments, plot=True)
    results = found["results"]
    counts = {key: result["count"] for key, result in results.items()}
    assert counts == {
        "clean": 18,
        **{f"computed/{name}/3": 18 for name in QUICK},
        "imagenet_c/fog/1": 12,
        "imagenet_c/fog/2": 12,
        "imagenet_r": 8,
        "stylized": 6,
    }
    told = capsys.readouterr()
    assert text == told.out
    assert "computed here, not the published files" in text
    assert f"| top-1 accuracy | {100 * results['clean']['top1']:.2f} (paper 76.5) |" in text
    assert f"| ImageNet-R top-1 | {100 * results['imagenet_r']['top1']:.2f} (paper 38.2) |" in text
    assert results["imagenet_r"]["top5"] == 1  # of two classes
    assert (world / "out" / "report.png").stat().st_size > 10_000
    plan = told.err[: told.err.index("clean: top-1")]  # what comes before the first result
    classes = "6 classes (n01, n02, n03 ... n06)"
    assert f"{CHECKPOINT}: tiny, seed 0, step 5: cifar_resnet8, {classes}" in plan
    assert f"clean: 1 set of 18 images, {world / 'val'}, labels by name" in plan
    assert "computed: 4 sets of 18 images" in plan
    assert f"imagenet_c: 2 sets of 12 images, {world / 'c'}" in plan
    assert "imagenet_r: 1 set of 8 images" in plan
    assert "labels by name (2 of 6 classes)" in plan


def test_results_and_kept_sets_of_other_pixels_are_not_found_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of versions that cut the centre out first and resized it by another filter."""
    keep = ["--pipeline", "reference", "--corrupt", "jpeg_compression", "--keep", str(tmp_path)]

    def geometry(reading: Reading) -> dict[str, Any]:
        return {"size": reading.size, "resize": reading.resize}

    with monkeypatch.context() as before:
        before.setattr(Reading, "geometry", geometry)
        run(world, *keep, out="pixels")
    (old,) = tmp_path.glob("*.beton")
    calls = counted(monkeypatch)
    run(world, *keep, out="pixels")
    assert len(calls) == 2
    assert len(list(tmp_path.glob("*.beton"))) == 2
    run(world, *keep, out="pixels")
    assert len(calls) == 2
    assert old.exists()


def test_finished_sets_are_not_computed_again(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = counted(monkeypatch)
    severity = ["--severity", "2"]
    first, _ = run(world, "--corrupt", "fog", "contrast", *severity, out="again")
    assert len(calls) == 3
    calls.clear()
    second, _ = run(world, "--corrupt", "fog", "contrast", "snow", *severity, out="again")
    assert len(calls) == 1
    assert "2 of them evaluated before" in capsys.readouterr().err
    assert {k: v for k, v in second["results"].items() if "snow" not in k} == first["results"]
    run(world, "--corrupt", "fog", *severity, "--seed", "1", out="again")
    assert len(calls) == 2  # the clean images have no seed
    run(world, "--pipeline", "reference", out="again")
    assert len(calls) == 2
    run(world, "--bn", "aux", out="again")
    assert len(calls) == 3


def write_noise(at: Path, seed: int) -> None:
    """`data.beton` of other pixels, with the size and the date of the one before."""
    images = np.random.default_rng(seed).integers(0, 256, (24, 36, 36, 3), dtype=np.uint8)
    file = at / "data.beton"
    date = None
    if file.exists():
        date = dated(file)
    for old in at.glob("data.beton*"):
        old.unlink()
    convert_arrays(file, images, np.arange(24) % 6, WNIDS, "noise")
    if date is not None:
        for new in at.glob("data.beton*"):
            os.utime(new, ns=date)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept"])
def test_another_file_under_the_same_name_gives_new_numbers(
    world: Path, tmp_path: Path, kept: bool
) -> None:
    """Nothing of the old file's results is used, nor of its kept sets."""
    at = fresh(world, tmp_path)
    options = ["--corrupt", "brightness", "--pipeline", "reference"]
    if kept:
        options += ["--keep", str(at / "keep")]
    write_noise(at, 0)
    first, _ = run(at, *options, data="data.beton")
    again, _ = run(at, *options, data="data.beton")
    assert again["results"] == first["results"]
    write_noise(at, 1)
    second, _ = run(at, *options, data="data.beton")
    reference, _ = run(at, *options, data="data.beton", out="elsewhere")
    assert second["results"] == reference["results"]
    for key in ("clean", "computed/brightness/3"):
        assert second["results"][key]["loss"] != first["results"][key]["loss"]


def test_other_images_in_the_same_folder_give_new_numbers(world: Path, tmp_path: Path) -> None:
    at = fresh(world, tmp_path, "val", "c")
    options = ["--imagenet-c", str(at / "c")]
    first, _ = run(at, *options)
    for folder in ("val/n01", "c/fog/2/n01"):
        one = at / folder / "0.JPEG"
        date = dated(one)
        Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(one, quality=90)
        os.utime(one, ns=date)
    second, _ = run(at, *options)
    elsewhere, _ = run(at, *options, out="elsewhere")
    assert second["results"] == elsewhere["results"]
    same = [key for key in first["results"] if first["results"][key] == second["results"][key]]
    assert same == ["imagenet_c/fog/1"]


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["contrast", "labels"])
def test_other_arrays_under_the_same_name_give_new_numbers(
    world: Path, tmp_path: Path, changed: str
) -> None:
    at = fresh(world, tmp_path, "cifar")
    write_checkpoint(at / "ten.safetensors", cifar10.CLASSES, 10)
    write_folder(at / "ten", cifar10.CLASSES, 1, (32, 32), seed=5)
    arguments = ["--cifar10-c", str(at / "cifar")]
    where = {"model": "ten.safetensors", "data": "ten"}
    first, _ = run(at, *arguments, **where)
    file = at / "cifar" / f"{changed}.npy"
    date = dated(file)
    match changed:
        case "contrast":
            np.save(file, 255 - np.load(file))
        case "labels":
            np.save(file, np.tile(np.arange(7)[::-1], 5).astype(np.uint8))
    os.utime(file, ns=date)
    second, _ = run(at, *arguments, **where)
    elsewhere, _ = run(at, *arguments, **where, out="elsewhere")
    assert second["results"] == elsewhere["results"]
    assert second["results"]["cifar10_c/contrast/1"] != first["results"]["cifar10_c/contrast/1"]
    assert second["results"]["clean"] == first["results"]["clean"]


def test_another_checkpoint_under_the_same_name_gives_new_numbers(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = fresh(world, tmp_path, "val")
    first, _ = run(at)
    file = at / CHECKPOINT
    date = dated(file)
    write_checkpoint(file, WNIDS, seed=1)
    os.utime(file, ns=date)
    second, _ = run(at)
    assert second["results"]["clean"]["loss"] != first["results"]["clean"]["loss"]
    calls = counted(monkeypatch)
    file.rename(at / "moved.safetensors")  # the same content elsewhere is the same
    moved, _ = run(at, model="moved.safetensors")
    assert moved["results"] == second["results"]
    assert calls == []


def test_data_that_changes_meanwhile_is_an_error(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at = fresh(world, tmp_path, "val")

    def disturbed(*arguments: Any, **options: Any) -> Result:
        result = evaluate(*arguments, **options)
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(at / "val" / "n02" / "1.JPEG")
        return result

    monkeypatch.setattr(evaluation, "evaluate", disturbed)
    assert "files changed while they were evaluated" in refused(capsys, at)
    assert not (at / "out" / "results").exists()
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    run(at)


def test_shards_are_evaluated_as_the_folder_they_were_made_of(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fap-eval --data 'part*.beton'`; a result is found again until one of the files changes."""
    where = fresh(world, tmp_path, "val")
    convert_images(where / "val", where / "whole.beton")
    whole = BetonStore(where / "whole.beton")

    def write(part: int, rows: range) -> None:
        with BetonWriter(where / f"part{part}.beton", len(rows)) as writer:
            for k in rows:
                data = whole.read(k).tobytes()
                sample = Sample(data, JPG, int(whole.heights[k]), int(whole.widths[k]))
                writer.add(sample, int(whole.labels[k]))
            writer.commit(whole.classes, {})

    write(0, range(7))
    write(1, range(7, 18))
    folder, _ = run(where, "--pipeline", "reference", out="folder")
    calls = counted(monkeypatch)
    for _ in range(2):
        shards, _ = run(where, "--pipeline", "reference", data="part*.beton")
        assert shards["results"]["clean"]["top1"] == folder["results"]["clean"]["top1"]
        assert shards["results"]["clean"]["count"] == 18
        assert len(calls) == 1
    (where / "part1.beton").unlink()
    (where / "part1.beton.json").unlink()
    write(1, range(7, 17))
    shards, _ = run(where, "--pipeline", "reference", data="part*.beton")
    assert shards["results"]["clean"]["count"] == 17
    assert len(calls) == 2
