"""`fap-eval` of detectors, by the command: AP and COCO-C, and which numbers are kept.

The twin sees one image after the other.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fap.cli import eval as cli
from fap.evaluate.table import table_of
from fap.tasks import make_task
from fap.tasks.coco import MEANS, METRICS
from fap.tasks.mce import ALEXNET_ERRORS
from pipelines import open_store
from pipelines.corrupt import NAMES, corrupt
from tests.evaluate.detection import world as detection_world
from tests.evaluate.detection.world import (
    CHECKPOINT,
    CLASSES,
    DATA,
    SIDES,
    WHERE,
    detector,
    photos,
    pictures,
    scored_one_by_one,
    write_checkpoint,
    write_data,
)
from tests.evaluate.reports import report_of
from tests.evaluate.world import counted, run

MPC, RPC = (mean.title for mean in MEANS)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Both loops compute the same; batches and converted norms round differently."""
    metrics = {name: value for name, value in found.items() if name != "count"}
    assert metrics == pytest.approx(expected, abs=1e-4)


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


def test_the_batch_is_that_of_the_task(world: Path) -> None:
    """Unless it is given: a report says which it was."""
    where = [str(world / CHECKPOINT), "--data", str(world / DATA), "--device", "cpu"]
    for words, batch in (([], 16), (["--batch", "7"], 7)):
        out = world / f"batch{batch}"
        assert cli.main([*where, *words, "--out", str(out)]) == 0
        (report,) = json.loads((out / "report.json").read_text())
        assert report["settings"]["batch"] == batch


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
        *("groups.json", "pictures", "report.csv", "report.json", "report.md", "report.png"),
        *("report.tex", "results"),
    ]
