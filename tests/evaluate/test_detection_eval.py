"""`fap-eval` of detectors, by the command: AP, COCO-C, pictures.

The twin sees one image after the other.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from fap.cli import eval as cli
from fap.cli import eval as eval_cli
from fap.cli import eval_command
from fap.evaluate import work
from fap.evaluate.exact import evaluate
from fap.evaluate.results import safe_name
from fap.evaluate.table import table_of
from fap.tasks import make_task
from fap.tasks.coco import MEANS, METRICS
from fap.tasks.draw_boxes import FOUND, TRUE
from fap.tasks.mce import ALEXNET_ERRORS
from pipelines import open_store
from pipelines.corrupt import NAMES, corrupt
from tests.evaluate import detection_world
from tests.evaluate.detection_world import (
    CANVAS,
    CHECKPOINT,
    CLASSES,
    DATA,
    SIDES,
    detector,
    jpegs,
    photos,
    scored_one_by_one,
    write_checkpoint,
    write_data,
)
from tests.evaluate.reports import report_of
from tests.evaluate.test_command import told_until
from tests.evaluate.world import counted, refused, run, write_folder
from tests.evaluate.world import write_checkpoint as write_classifier

WHERE = {"model": CHECKPOINT, "data": DATA}
MPC, RPC = (mean.title for mean in MEANS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return detection_world.write_world(tmp_path_factory.mktemp("detection"))


@pytest.fixture
def fresh(world: Path, tmp_path: Path) -> Path:
    """A copy of the world, to be changed."""
    for file in world.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """None, unless all corruptions are asked for: starting them takes most of the time."""
    monkeypatch.setattr(eval_command, "SMALL", max(CANVAS))


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Both loops compute the same; batches and converted norms round differently."""
    metrics = {name: value for name, value in found.items() if name != "count"}
    assert metrics == pytest.approx(expected, abs=1e-4)


def pictures(out: Path) -> list[Path]:
    return sorted((out / "pictures").iterdir())


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(-1).any())


# ---------------------------------------------------------------------- the numbers


def test_clean_precision_is_that_of_one_image_at_a_time(world: Path) -> None:
    found, text = run(world, "--pipeline", "reference", **WHERE, out="clean")
    store = open_store(world / DATA)
    expected = scored_one_by_one(detector(), photos(store), store.annotations)
    assert expected["map"] > 0.02
    clean = found["results"]["clean"]
    same(clean, expected)
    assert clean["count"] == len(SIDES)
    # No object is that large.
    assert not {"map_medium", "map_large"} & clean.keys()
    assert METRICS["map_large"] not in text
    assert f"| AP | {100 * clean['map']:.2f} (paper 36.5) |" in text
    assert f"| AP50 | {100 * clean['map50']:.2f} |" in text
    assert found["labels"] == {"clean": "by name"}


@pytest.mark.parametrize("name", ["fog", "elastic_transform", "jpeg_compression"])
def test_photos_are_corrupted_before_they_are_resized(world: Path, name: str) -> None:
    words = ["--corrupt", name, "--severity", "2", "--seed", "3", "--pipeline", "reference"]
    found, _ = run(world, *words, **WHERE, out=name)
    store = open_store(world / DATA)
    made = [corrupt(image, name, 2, 3, i, as_coco_c=True) for i, image in enumerate(photos(store))]
    expected = scored_one_by_one(detector(), made, store.annotations)
    same(found["results"][f"computed/{name}/2"], expected)


def test_batches_back_ends_and_norms(world: Path) -> None:
    """The batch changes nothing, the auxiliary norms do; back ends differ by a grey level."""
    results = {}
    options = {
        "": [],
        "one": ["--batch", "1"],
        "all": ["--batch", "64"],
        "reference": ["--pipeline", "reference"],
        "aux": ["--bn", "aux"],
    }
    for key, words in options.items():
        found, _ = run(world, "--corrupt", "contrast", *words, **WHERE, out=f"options{key}")
        results[key] = [one["map"] for one in found["results"].values()]
    for key in ("one", "all"):
        assert results[key] == pytest.approx(results[""], abs=2e-3)
    assert results["reference"] == pytest.approx(results[""], abs=0.03)
    assert results["aux"] != pytest.approx(results[""], abs=2e-3)


@pytest.mark.slow
def test_dali_sees_what_the_others_see(world: Path) -> None:
    pytest.importorskip("nvidia.dali")
    words = ["--corrupt", "contrast"]
    found, _ = run(world, *words, "--pipeline", "dali", **WHERE, out="dali")
    other, _ = run(world, *words, "--pipeline", "reference", **WHERE, out="reference")
    for key, result in found["results"].items():
        assert result["map"] == pytest.approx(other["results"][key]["map"], abs=0.03), key


@pytest.mark.slow
def test_coco_c(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sets, in processes; one after the other is taken away, and no mean is shown then."""
    calls = counted(monkeypatch)
    found, text = run(world, "--corrupt", "all", **WHERE, out="coco_c", plot=True)
    assert len(calls) == len(found["results"]) == 1 + 5 * len(NAMES)
    assert (world / "coco_c" / "report.png").stat().st_size > 10_000
    ours = found["results"]
    by_corruption = [
        np.mean([ours[f"computed/{name}/{severity}"]["map"] for severity in range(1, 6)])
        for name in ALEXNET_ERRORS
    ]
    words = "(computed here, not the published files)"
    mpc = 100 * np.mean(by_corruption)
    assert f"| mAP, {MPC} {words} | {mpc:.2f} (paper 18.25) |" in text
    assert f"| mAP, {RPC} {words} | {mpc / ours['clean']['map']:.2f} |" in text
    assert found["summary"][f"mAP, {MPC} {words}"] == pytest.approx(mpc)
    assert text.count("(paper") == 2  # AP and mPC
    assert any("elastic_transform" in note and "COCO-C" in note for note in found["notes"])
    drawn = pictures(world / "coco_c")
    assert len(drawn) == len(ours)

    before = {file: file.stat().st_mtime_ns for file in drawn}
    calls.clear()
    again, _ = run(world, "--corrupt", "all", **WHERE, out="coco_c")
    assert calls == []
    assert again == found
    assert {file: file.stat().st_mtime_ns for file in pictures(world / "coco_c")} == before

    some = [name for name in ALEXNET_ERRORS if name != "snow"]
    severities = [str(severity) for severity in range(1, 6)]
    less, text = run(world, "--corrupt", *some, "--severity", *severities, **WHERE, out="coco_c")
    assert calls == []
    assert f"{MPC} {words}: not computed: no snow" in text
    assert f"{RPC} {words}: not computed: no snow" in text
    assert not any(MPC in row or RPC in row for row in less["summary"])
    assert text.count("(paper") == 1
    assert not any("COCO-C's own" in note for note in less["notes"])


def test_a_note_stands_where_its_mean_does() -> None:
    """Beside what is computed here, and nowhere else."""
    task = make_task(detection_world.config())
    result = dict.fromkeys(METRICS, 0.5) | {"count": 5}
    results = {"clean": result}
    for name in NAMES:
        for severity in range(1, 6):
            results[f"computed/{name}/{severity}"] = result
    full = table_of(report_of(results, task=task, paper={"map": 36.5, "coco_c": 18.0}))
    assert [row for row, number in full.rows.items() if number.paper] == [
        "AP",
        f"mAP, {MPC} (computed here, not the published files)",
    ]
    assert sum("COCO-C's own generator" in note for note in full.notes) == 1
    del results["computed/motion_blur/4"]
    partial = table_of(report_of(results, task=task))
    assert not any("COCO-C's own generator" in note for note in partial.notes)
    assert f"{MPC} (computed here, not the published files): not computed: " in "".join(
        partial.notes
    )
    assert any("motion_blur lacks severity 4" in note for note in partial.notes)


# ---------------------------------------------------------------------- what is kept


def test_results_and_pictures_are_kept_until_something_changes(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    run(fresh, "--corrupt", "fog", **WHERE)
    assert len(calls) == 2
    first = pictures(fresh / "out")
    assert len(first) == 2
    run(fresh, "--corrupt", "fog", **WHERE)
    assert len(calls) == 2
    assert pictures(fresh / "out") == first

    store = open_store(fresh / DATA)
    annotations = store.annotations
    classes = annotations.classes.copy()
    classes[0] = (classes[0] + 1) % len(CLASSES)
    for old in fresh.glob(f"{DATA}*"):
        old.unlink()
    write_data(fresh / DATA, replace(annotations, classes=classes))
    run(fresh, "--corrupt", "fog", **WHERE)
    assert len(calls) == 4
    assert len(pictures(fresh / "out")) == 4

    write_checkpoint(fresh / CHECKPOINT, seed=1)
    run(fresh, "--corrupt", "fog", **WHERE)
    assert len(calls) == 6
    assert len(pictures(fresh / "out")) == 6


# ---------------------------------------------------------------------- pictures


def test_pictures_show_the_first_images_with_boxes(world: Path) -> None:
    run(world, "--corrupt", "fog", **WHERE, out="drawn")
    files = pictures(world / "drawn")
    assert len(files) == 2
    for file, key in zip(files, ("clean", "computed-fog-3"), strict=True):
        assert file.name.startswith(f"detector-seed0-{key}-")
        assert safe_name(file.stem) == file.stem
        sheet = np.asarray(Image.open(file))
        assert sheet.shape == (CANVAS[0], 4 * CANVAS[1] + 3 * 4, 3)
        assert has(sheet, TRUE)
        assert has(sheet, FOUND) or key != "clean"
    clean, foggy = (np.asarray(Image.open(file)).astype(int) for file in files)
    assert np.abs(clean - foggy).mean() > 5
    # The first image is narrow: right of it the canvas is black.
    height, width = SIDES[1]
    second = clean[:, CANVAS[1] + 4 : 2 * CANVAS[1] + 4]
    assert (second[:, -20:] == 0).all()
    assert second[: CANVAS[0] // 2, : width * CANVAS[0] // height].mean() > 20


def test_only_the_drawn_images_are_corrupted_again(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(fresh, "--corrupt", "fog", **WHERE)
    shutil.rmtree(fresh / "out" / "pictures")
    seen: list[int] = []

    def noting(
        image: np.ndarray, name: str, severity: int, seed: int, index: int, *, as_coco_c: bool
    ) -> np.ndarray:
        seen.append(index)
        return corrupt(image, name, severity, seed, index, as_coco_c=as_coco_c)

    monkeypatch.setattr("pipelines.corrupt_store.corrupt", noting)
    run(fresh, "--corrupt", "fog", **WHERE)
    assert len(pictures(fresh / "out")) == 2
    assert sorted(seen) == [0, 1, 2, 3]


def test_names_out_of_a_checkpoint_are_drawn_safely(fresh: Path) -> None:
    names = ("犬\n../", "b" * 500, "\x1b[31m", "dog")
    write_checkpoint(fresh / CHECKPOINT, classes=names)
    store = open_store(fresh / DATA)
    for old in fresh.glob(f"{DATA}*"):
        old.unlink()
    write_data(fresh / DATA, store.annotations, classes=names)
    run(fresh, **WHERE)
    assert len(pictures(fresh / "out")) == 1


def test_a_picture_that_cannot_be_written_costs_a_warning(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fap.evaluate.pictures.write_whole", full)
        found, _ = run(fresh, "--corrupt", "fog", **WHERE)
    told = capsys.readouterr().err
    assert told.count("warning: no picture") == 1
    assert "No space left on device" in told
    assert len(found["results"]) == 2
    (fresh / "out" / "pictures").rmdir()
    (fresh / "out" / "pictures").write_text("no folder")
    run(fresh, **WHERE)
    assert "warning: no picture" in capsys.readouterr().err


def test_classifiers_have_no_pictures(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", CLASSES, 1, (40, 36))
    write_classifier(tmp_path / CHECKPOINT, CLASSES, len(CLASSES))
    run(tmp_path, model=CHECKPOINT)
    assert not (tmp_path / "out" / "pictures").exists()


# ---------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("option", ["--imagenet-c", "--imagenet-r", "--stylized", "--cifar10-c"])
def test_benchmarks_of_class_labels_are_refused(
    world: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """Before anything is looked for in them."""
    line = refused(capsys, world, option, str(world / "nowhere"), **WHERE, out="refused")
    assert line.startswith(f"fap-eval: {option}: its images have class labels and no boxes")
    assert not (world / "refused").exists()


def test_keep_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--corrupt", "fog", "--keep", str(world / "keep")]
    line = refused(capsys, world, *words, **WHERE, out="refused")
    assert line.startswith("fap-eval: --keep: corrupted photographs are not kept")
    assert not (world / "refused").exists()
    assert not (world / "keep").exists()


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
    monkeypatch.setattr(work, "evaluate", skipping)
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


def test_the_batch_is_that_of_the_task(world: Path) -> None:
    """Unless it is given: a report says which it was."""
    where = [str(world / CHECKPOINT), "--data", str(world / DATA), "--device", "cpu"]
    for words, batch in (([], 16), (["--batch", "7"], 7)):
        out = world / f"batch{batch}"
        assert eval_cli.main([*where, *words, "--out", str(out)]) == 0
        (report,) = json.loads((out / "report.json").read_text())
        assert report["settings"]["batch"] == batch


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["workers", "work"])
def test_a_signal_ends_it_without_a_traceback(
    fresh: Path, number: signal.Signals, code: int, moment: str
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


def test_two_detectors_stand_side_by_side(world: Path) -> None:
    write_checkpoint(world / "second.safetensors", seed=1)
    words = [str(world / CHECKPOINT), str(world / "second.safetensors"), "--device", "cpu"]
    words += ["--data", str(world / DATA), "--out", str(world / "two"), "--batch", "4"]
    assert cli.main(words) == 0
    reports = json.loads((world / "two" / "report.json").read_text())
    assert len(reports) == 2
    assert reports[0]["results"] != reports[1]["results"]
    assert len(pictures(world / "two")) == 2
    assert sorted(os.listdir(world / "two")) == [
        *("pictures", "report.json", "report.md", "report.png", "results")
    ]
