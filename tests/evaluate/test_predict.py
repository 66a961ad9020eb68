"""`fap-predict`: the outputs that fap-eval scores, for images in any place, as a whole CSV."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor

import pipelines
from fap.cli import predict as cli
from fap.cli.convert import main as convert
from fap.evaluate.load import load_model
from fap.evaluate.predict import Predictor
from fap.nets.dual import evaluate_with
from fap.tasks.classification import Accuracy, Classification
from tests.conftest import wait_until_it_listens
from tests.evaluate.detection import world as detection
from tests.evaluate.world import CHECKPOINT, WNIDS, run
from tests.run.runs import run as run_of

PIXELS = ("--device", "cpu", "--batch", "4", "--pipeline", "reference")


def predict(world: Path, *words: str, out: str = "predictions.csv") -> list[dict[str, str]]:
    """The lines of a prediction, by the columns of its header."""
    arguments = [str(world / CHECKPOINT), *words, "--out", str(world / out), *PIXELS]
    assert cli.main(arguments) == 0
    return lines_of((world / out).read_text())


def lines_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(text)))


def twin(world: Path, images: Tensor) -> Tensor:
    """Probabilities of uint8 images (B, 3, H, W), by plain arithmetic; float64 (B, classes)."""
    trained = load_model(world / CHECKPOINT)
    mean = torch.tensor(trained.config.data.mean).view(3, 1, 1) * 255
    std = torch.tensor(trained.config.data.std).view(3, 1, 1) * 255
    with torch.no_grad(), evaluate_with(trained.model, "main"):
        logits = trained.model((images - mean) / std).double()
    return logits.exp() / logits.exp().sum(1, keepdim=True)


# ------------------------------------------------------------------ what is predicted


def test_the_outputs_are_bit_for_bit_those_that_fap_eval_scores(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[Tensor] = []
    told: list[Tensor] = []
    update = Accuracy.update
    predictions = Classification.predictions

    def updated(self: Accuracy, outputs: Tensor, references: Tensor) -> None:
        scored.append(outputs[references >= 0].clone())
        update(self, outputs, references)

    def predicted(self: Classification, outputs: Tensor, *rest: Any) -> Any:
        told.append(outputs.clone())
        return predictions(self, outputs, *rest)

    monkeypatch.setattr(Accuracy, "update", updated)
    monkeypatch.setattr(Classification, "predictions", predicted)
    found, _ = run(world, "--pipeline", "reference", out="scored")
    lines = predict(world, str(world / "val"))
    assert torch.equal(torch.cat(told), torch.cat(scored))
    right = [line["class"] == Path(line["path"]).parent.name for line in lines]
    assert np.mean(right) == found["results"]["clean"]["top1"]


def test_the_likeliest_classes_stand_with_their_probabilities(world: Path) -> None:
    lines = predict(world, str(world / "val"), "--top", "3")
    assert [*lines[0]] == [
        *("path", "class", "probability"),
        *("class_2", "probability_2", "class_3", "probability_3"),
    ]
    store = pipelines.open_store(world / "val")
    plan = pipelines.eval_plan(store.heights, store.widths, size=32, resize=36, batch=18)
    (batch,) = pipelines.open_loader("reference", store, size=32).load(plan)
    expected = twin(world, batch.images)
    assert [line["path"] for line in lines] == [str(store.file(i)) for i in range(18)]
    for line, probabilities in zip(lines, expected, strict=True):
        order = probabilities.argsort(descending=True)[:3].tolist()
        assert [line[name] for name in ("class", "class_2", "class_3")] == [WNIDS[k] for k in order]
        shown = [float(line[f"probability{k}"]) for k in ("", "_2", "_3")]
        assert shown == pytest.approx(probabilities[order].tolist(), abs=2e-6)


def test_images_may_lie_anywhere(world: Path, tmp_path: Path) -> None:
    """In a flat folder, as files, in a tar or a zip, in a .beton: the same predictions."""
    files = sorted((world / "val").rglob("*.JPEG"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(files):
        shutil.copy(file, flat / f"{i:02}.jpg")
    (flat / "notes.txt").write_text("no image")
    (flat / ".hidden.jpg").write_text("no image")
    with tarfile.open(tmp_path / "flat.tar", "w") as tar:
        tar.add(flat, "flat")
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
        for file in sorted(flat.glob("*.jpg")):
            archive.write(file, file.name)
    assert convert([str(world / "val"), str(tmp_path / "val.beton")]) == 0
    some = [str(flat / "02.jpg"), str(tmp_path / "flat.tar"), str(flat / "00.jpg")]
    forms = {
        "folder": [str(flat)],
        "tar": [str(tmp_path / "flat.tar")],
        "zip": [str(tmp_path / "flat.zip")],
        "files": [str(file) for file in sorted(flat.glob("??.jpg"))],
        "beton": [str(tmp_path / "val.beton")],
    }
    expected = predict(world, str(world / "val"))
    for name, words in forms.items():
        found = predict(world, *words, out=f"{name}.csv")
        assert told(found) == told(expected), name
    assert predict(world, str(flat), out="f.csv")[5]["path"] == str(flat / "05.jpg")
    in_tar = predict(world, str(tmp_path / "flat.tar"), out="t.csv")
    assert in_tar[5]["path"] == str(tmp_path / "flat.tar" / "flat" / "05.jpg")
    in_beton = predict(world, str(tmp_path / "val.beton"), out="b.csv")
    assert in_beton[5]["path"] == f"{tmp_path / 'val.beton'}: sample 5"
    several = predict(world, *some, out="several.csv")
    assert told(several) == told([expected[2], *expected, expected[0]])


def told(lines: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(line["class"], line["probability"]) for line in lines]


@pytest.mark.slow
def test_a_detector_gives_a_line_for_each_box(tmp_path: Path) -> None:
    detection.write_world(tmp_path)
    out = tmp_path / "boxes.csv"
    words = [str(tmp_path / detection.CHECKPOINT), str(tmp_path / detection.DATA)]
    assert cli.main([*words, "--out", str(out), *PIXELS]) == 0
    lines = lines_of(out.read_text())
    assert [*lines[0]] == ["path", "class", "score", "left", "top", "right", "bottom"]
    photos = detection.photos(pipelines.open_store(tmp_path / detection.DATA))
    found = detection.found_one_by_one(detection.detector(), photos)
    assert len(lines) == len(found)
    for line, (number, class_, score, *box) in zip(lines, found.tolist(), strict=True):
        assert line["path"] == f"{tmp_path / detection.DATA}: sample {number:.0f}"
        assert line["class"] == detection.CLASSES[int(class_)]
        assert float(line["score"]) == pytest.approx(score, abs=1e-4)
        edges = [float(line[edge]) for edge in ("left", "top", "right", "bottom")]
        assert edges == pytest.approx(box, abs=0.02)


@pytest.mark.slow
def test_a_runs_average_is_asked_and_on_request_its_raw_weights(
    tiny_beton: Path, tmp_path: Path
) -> None:
    """Of a run's folder, the newest checkpoint or the best one."""
    folder, _ = run_of(tiny_beton, tmp_path / "runs", "optim.ema=0.9", "run.max_steps=4")
    found = {}
    for which in ([], ["--weights", "ema"], ["--weights", "raw"], ["--best"]):
        out = tmp_path / "p.csv"
        words = [str(folder), str(tiny_beton), "--out", str(out), *PIXELS, *which]
        assert cli.main(words) == 0
        found[" ".join(which)] = out.read_text()
    assert len(lines_of(found[""])) == 96
    assert found["--weights ema"] == found["--best"] == found[""]
    assert found["--weights raw"] != found[""]


# ------------------------------------------------------------------ damage and mistakes


@pytest.fixture
def damaged(world: Path, tmp_path: Path) -> Path:
    """18 images, of which one is no image and two end in the middle."""
    flat = tmp_path / "damaged"
    flat.mkdir()
    for i, file in enumerate(sorted((world / "val").rglob("*.JPEG"))):
        shutil.copy(file, flat / f"{i:02}.jpg")
    (flat / "03.jpg").write_text("no image")
    for name in ("06.jpg", "17.jpg"):
        content = (flat / name).read_bytes()
        (flat / name).write_bytes(content[: len(content) * 9 // 10])
    return flat


def failed(capsys: pytest.CaptureFixture[str], world: Path, *words: str) -> str:
    """What a command says that ends with exit code 1."""
    capsys.readouterr()
    assert cli.main([str(world / CHECKPOINT), *PIXELS, *words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fap-predict: ")
    return said


def test_damaged_images_are_named_and_on_request_skipped(
    world: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(damaged.parent / "p.csv")
    assert "03.jpg" in failed(capsys, world, str(damaged), "--out", out)
    assert not os.path.exists(out)
    found = predict(world, str(damaged), "--skip-bad", out="skipped.csv")
    said = capsys.readouterr().err
    for name in ("03.jpg", "06.jpg", "17.jpg"):
        assert said.count(f"skipped: {damaged / name}") == 1
    assert "skipped.csv: 15 images, 3 skipped" in said
    expected = predict(world, str(world / "val"))
    good = [line for i, line in enumerate(expected) if i not in (3, 6, 17)]
    assert [Path(line["path"]).name for line in found] == [
        f"{i:02}.jpg" for i in range(18) if i not in (3, 6, 17)
    ]
    # Batches fill up, so values may differ in their last digits.
    assert [line["class"] for line in found] == [line["class"] for line in good]
    (damaged / "03.jpg").unlink()
    assert "06.jpg" in failed(capsys, world, str(damaged), "--out", out)
    assert not os.path.exists(out)
    assert not list(damaged.parent.glob(".p.csv*"))


def test_mistakes_are_said(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    val = str(world / "val")
    for words, message in (
        ([str(tmp_path / "nowhere.jpg")], "nowhere.jpg: no such file or folder"),
        ([str(tmp_path / "empty")], "holds no images"),
        ([str(tmp_path / "text.txt")], "is no image, and none of"),
        ([val, "--top", "7"], "top = 7: must be 1 to 6"),
        ([val, "--top", "0"], "top = 0: must be 1 to 6"),
        ([val, "--device", "nothing"], "--device nothing"),
        ([val, "--out", str(tmp_path / "no" / "such" / "p.csv")], "p.csv: there is no folder "),
        ([val, "--out", str(tmp_path / "empty")], "empty: is a folder; give the name of a file"),
        ([val, "--best"], "is no folder"),
        ([val, "--plain"], "--plain: "),
        ([val, "--classes", str(tmp_path / "text.txt")], "--classes is about plain weights"),
    ):
        assert message in failed(capsys, world, "--out", str(tmp_path / "p.csv"), *words)
    with pytest.raises(SystemExit, match="2"):
        cli.main([str(world / CHECKPOINT), val, "--batch", "0"])
    assert os.listdir(tmp_path / "empty") == []
    assert not (tmp_path / "p.csv").exists()


def test_odd_names_stay_in_their_cells(world: Path, tmp_path: Path) -> None:
    """Commas, quotes, line ends, and bytes that are no UTF-8."""
    folder = tmp_path / 'a,b "c"'
    folder.mkdir()
    source = next((world / "val").rglob("*.JPEG"))
    for name in (b"x\ny.jpg", b"z\xff.jpg"):
        shutil.copy(source, os.fsencode(folder) + b"/" + name)
    lines = predict(world, str(folder))
    assert [line["path"] for line in lines] == [f"{folder}/x\ny.jpg", f"{folder}/z\\udcff.jpg"]


def test_a_file_is_replaced_only_by_a_whole_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "p.csv"
    out.write_text("before")

    def stops(*_: Any, **__: Any) -> NoReturn:
        raise MemoryError

    lines = Predictor.lines

    def half(self: Predictor, *arguments: Any) -> Any:
        yield next(lines(self, *arguments))
        stops()

    words = [str(world / CHECKPOINT), str(world / "val"), "--out", str(out), *PIXELS]
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "lines", half)
        assert cli.main(words) == 1
    assert out.read_text() == "before"
    assert os.listdir(tmp_path) == ["p.csv"]
    assert cli.main(words) == 0
    assert len(lines_of(out.read_text())) == 18


# ------------------------------------------------------------------ as a process


def started(world: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "fap.cli.predict", str(world / CHECKPOINT), str(world / "val")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*argv, *words, *PIXELS], text=True, **(pipes | options))


@pytest.mark.slow
def test_standard_output_takes_the_lines(world: Path) -> None:
    expected = predict(world, str(world / "val"))
    process = started(world, "--out", "-")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert lines_of(out) == expected


@pytest.mark.slow
def test_a_closed_pipe_ends_it_in_silence(world: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = started(world, "--out", "-", stdout=writing)
    os.close(writing)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 141
    assert err == ""


@pytest.mark.slow
def test_a_signal_leaves_nothing_behind(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    process = started(world, "--out", str(out))
    wait_until_it_listens(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "stopped by SIGINT" in err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []
