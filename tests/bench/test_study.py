"""The study's own arithmetic, and a whole miniature study."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bench import study, study_report


def test_interval_is_the_paired_t_test() -> None:
    ours, base = np.random.default_rng().normal(size=(2, 5))
    low, high = stats.ttest_rel(ours, base).confidence_interval(0.95)
    assert study_report.interval(ours - base).endswith(f"[{low:+.2f}, {high:+.2f}]")


def run(seed: int, clean: float, passes: int, seconds: float) -> dict:
    return {
        "seed": seed,
        "clean": clean,
        "corrupted": clean - 10,
        "train_clean": 99.0,
        "train_adv": None,
        "image_passes": passes,
        "seconds": seconds,
    }


def test_cost_is_compared_by_image_passes_not_by_the_clock() -> None:
    """Seconds of runs beside different neighbours are shown, and never divided by each other."""
    rows = {
        "vanilla": [run(0, 50, 1000, 100), run(1, 52, 1000, 100)],
        "other": [run(0, 51, 1200, 300), run(1, 52, 1200, 300)],
    }
    head, _, _, other = study_report.table(rows).splitlines()
    cells = dict(zip(head.split(" | "), other.split(" | "), strict=True))
    assert cells["image passes / vanilla"] == "1.200"
    assert "3.0" not in other.replace("300", "")
    assert cells["clean - vanilla"].startswith("+0.50 [")


@pytest.mark.slow
def test_a_miniature_study_ends_in_table_and_plot(
    tiny_beton: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    small = replace(
        study.SIZES["small"],
        arms=("vanilla", "fast_advprop"),
        seeds=1,
        epochs=2,
        milestones=(1,),
        clean_batch=64,
        corrupt=("contrast", "fog"),
    )
    monkeypatch.setitem(study.SIZES, "small", small)
    monkeypatch.setattr(study, "convert", lambda *_: tiny_beton)
    monkeypatch.setattr(study, "RUNS", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["study", "study", "--pipeline", "reference"])
    study.main()
    said = capsys.readouterr().out
    for arm in ("vanilla", "fast_advprop"):
        assert f"| {arm} |" in said
    assert (tmp_path / "study_small.png").stat().st_size > 10_000
    runs = json.loads((tmp_path / "study_small.json").read_text())["runs"]
    assert runs["vanilla"][0]["image_passes"] == 2 * 64
    found = runs["fast_advprop"][0]
    assert set(found["corruptions"]) == {"contrast", "fog"}
    assert found["corrupted"] == pytest.approx(sum(found["corruptions"].values()) / 2)
    before = checkpoints(tmp_path)
    assert before
    study.main()  # finished runs are kept
    assert before == checkpoints(tmp_path)


def checkpoints(folder: Path) -> dict[Path, int]:
    """Every checkpoint below, and when it was written."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("step_*.safetensors")}


def test_the_last_epoch_and_the_means_over_severities_make_a_summary(tmp_path: Path) -> None:
    result = {"seed": 3, "steps": 10, "image_passes": 640, "seconds": 1.5}
    (tmp_path / "result.json").write_text(json.dumps(result))
    lines = [
        {"step": 5, "epoch_acc_clean": 0.2, "epoch_acc_adv": 0.1},
        {"step": 10, "epoch_acc_clean": 0.5},
        {"step": 10},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    accuracies = {
        "clean": 0.9,
        "computed/fog/1": 0.5,
        "computed/fog/2": 0.3,
        "computed/snow/1": 0.2,
    }
    report = {"results": {name: {"top1": value} for name, value in accuracies.items()}}
    assert study.summary(tmp_path, report) == {
        "seed": 3,
        "clean": 90,
        "corrupted": 30,
        "corruptions": {"fog": 40, "snow": 20},
        "train_clean": 50,
        "train_adv": None,
        "steps": 10,
        "image_passes": 640,
        "seconds": 1.5,
    }
