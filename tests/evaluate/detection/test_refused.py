"""What `fap-eval` of a detector refuses, damaged images, and signals: one line each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fap.evaluate import evaluation
from fap.evaluate.exact import evaluate
from fap.evaluate.published import PUBLISHED
from fap.tasks.coco import METRICS
from pipelines import open_store
from tests.evaluate.detection.world import (
    CHECKPOINT,
    CLASSES,
    DATA,
    SIDES,
    WHERE,
    jpegs,
    write_data,
)
from tests.evaluate.test_command import told_until
from tests.evaluate.world import refused, run, write_folder
from tests.evaluate.world import write_checkpoint as write_classifier


@pytest.mark.parametrize("option", [one.option for one in PUBLISHED])
def test_benchmarks_of_class_labels_are_refused(
    world: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """Before anything is looked for in them."""
    line = refused(capsys, world, option, str(world / "nowhere"), **WHERE, out="refused")
    assert line.startswith(f"fap-eval: {option}: its images have class labels and no boxes")
    assert not (world / "refused").exists()


def test_boxes_of_ones_own(fresh: Path) -> None:
    """The same images once more, under a name."""
    found, text = run(fresh, "--folder", f"mine={fresh / DATA}", **WHERE)
    assert found["results"]["folder/mine"] == found["results"]["clean"]
    assert "| folder mine AP |" in text


def test_keep_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--corrupt", "fog", "--keep", str(world / "keep")]
    line = refused(capsys, world, *words, **WHERE, out="refused")
    assert line.startswith("fap-eval: --keep: corrupted photographs are not kept")
    assert not (world / "refused").exists()
    assert not (world / "keep").exists()


def test_attacks_are_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, world, "--attack", "fgsm", **WHERE, out="refused")
    assert line.startswith("fap-eval: --attack: only classifiers are attacked here")
    assert not (world / "refused").exists()


def test_checkpoints_and_data_of_two_tasks(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(fresh / "val", CLASSES, 1, (40, 36))
    line = refused(capsys, fresh, model=CHECKPOINT, data="val")
    assert f"{fresh / 'val'} holds no boxes" in line
    write_classifier(fresh / "classifier.safetensors", CLASSES, len(CLASSES))
    line = refused(capsys, fresh, model="classifier.safetensors", data=DATA)
    assert "holds boxes and no class labels" in line
    assert not (fresh / "out").exists()


def test_classes_are_matched_by_name(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A permutation, and fewer classes, change no number: those without objects count nowhere."""
    same_names, _ = run(fresh, **WHERE)
    annotations = open_store(fresh / DATA).annotations
    used = sorted(set(annotations.classes.tolist()))
    assert len(used) < len(CLASSES)
    permuted = [CLASSES[i] for i in (2, 0, 3, 1)]
    subset = [CLASSES[i] for i in reversed(used)]
    for k, names in enumerate((permuted, subset)):
        classes = np.array([names.index(CLASSES[i]) for i in annotations.classes], np.int32)
        write_data(fresh / f"{k}.beton", replace(annotations, classes=classes), names)
        found, _ = run(fresh, model=CHECKPOINT, data=f"{k}.beton", out=str(k))
        assert found["results"]["clean"] == same_names["results"]["clean"]
        assert found["labels"]["clean"] == f"by name ({len(names)} of {len(CLASSES)} classes)"
    write_data(fresh / "other.beton", annotations, ("ant", "bee", "cat", "gnu"))
    line = refused(capsys, fresh, model=CHECKPOINT, data="other.beton", out="other")
    assert "'gnu'" in line
    assert not (fresh / "other").exists()


@pytest.mark.parametrize(
    "back_end", ["ffcv", "reference", pytest.param("dali", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("words", [[], ["--corrupt", "fog"]], ids=["clean", "corrupted"])
def test_a_damaged_image_is_named(
    fresh: Path, capsys: pytest.CaptureFixture[str], back_end: str, words: list[str]
) -> None:
    """Its checksum is right: it was written so."""
    if back_end == "dali":
        pytest.importorskip("nvidia.dali")
    contents = jpegs()
    contents[3] = contents[3][: len(contents[3]) // 2]
    annotations = open_store(fresh / DATA).annotations
    write_data(fresh / "bad.beton", annotations, contents=contents)
    line = refused(
        capsys, fresh, *words, "--pipeline", back_end, model=CHECKPOINT, data="bad.beton"
    )
    assert f"{fresh / 'bad.beton'}: sample 3: " in line


def test_a_damaged_image_is_named_by_what_corrupts_it(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the clean images were evaluated before: their result is kept."""
    contents = jpegs()
    contents[3] = contents[3][: len(contents[3]) // 2]
    annotations = open_store(fresh / DATA).annotations
    write_data(fresh / "bad.beton", annotations, contents=contents)

    def skipping(*arguments: Any, **options: Any) -> Any:
        if not calls:
            calls.append(1)
            return dict.fromkeys(METRICS, 0.5) | {"count": len(SIDES)}
        return evaluate(*arguments, **options)

    calls: list[int] = []
    monkeypatch.setattr(evaluation, "evaluate", skipping)
    line = refused(capsys, fresh, "--corrupt", "fog", model=CHECKPOINT, data="bad.beton")
    assert f"{fresh / 'bad.beton'}: sample 3: " in line
    assert calls == [1]


def test_images_without_any_object_are_one_line(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = open_store(fresh / DATA).annotations
    none = replace(
        annotations,
        first=np.zeros_like(annotations.first),
        boxes=annotations.boxes[:0],
        classes=annotations.classes[:0],
        crowd=annotations.crowd[:0],
        area=annotations.area[:0],
    )
    write_data(fresh / "none.beton", none)
    assert "holds no boxes" in refused(capsys, fresh, model=CHECKPOINT, data="none.beton")
    crowds = replace(annotations, crowd=np.ones_like(annotations.crowd))
    write_data(fresh / "crowds.beton", crowds)
    line = refused(capsys, fresh, model=CHECKPOINT, data="crowds.beton")
    assert "crowd boxes alone" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number", "code"), [("workers", signal.SIGINT, 130), ("work", signal.SIGTERM, 143)]
)
def test_a_signal_ends_it_without_a_traceback(
    fresh: Path, moment: str, number: signal.Signals, code: int
) -> None:
    """To the whole group, as a terminal's Ctrl-C is sent; no process stays behind."""
    words = [sys.executable, "-m", "fap.cli.eval", str(fresh / CHECKPOINT), "--corrupt", "all"]
    words += ["--data", str(fresh / DATA), "--device", "cpu", "--out", str(fresh / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, text=True, start_new_session=True, **pipes)
    sign = {"workers": "clean: AP", "work": "computed/shot_noise/1: AP"}[moment]
    told = told_until(sign, process)
    os.killpg(process.pid, number)
    rest = process.communicate(timeout=300)[1]  # it ends when all that hold the pipe have ended
    assert process.returncode == code, rest
    assert "Traceback" not in rest, rest
    assert f"stopped by {number.name}" in rest
    finished = [line for line in told if ": AP " in line]
    assert len(list((fresh / "out" / "results").iterdir())) >= len(finished) > 0
    assert not list(fresh.rglob("*.tmp"))
