"""The demo of detection: equal cost, table and verdict for numbers made by hand, a miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import demo_detection, scenes
from bench.demo_detection import ARMS, FAST, FULL, MEASURES, Demo, numbers_of, table, verdict
from bench.demo_words import BASE, EQUAL_COST
from tests.bench.test_scenes import made_up_sources

NOISES = ("gaussian_noise", "shot_noise")


def run(seed: int, clean: float, noise: float) -> dict[str, Any]:
    return {
        "seed": seed,
        "clean": clean,
        "AP50": clean + 20,
        "noise": noise,
        "corruptions": dict.fromkeys(NOISES, noise),
        "steps": 100,
        "image_passes": 2400,
        "cpu_seconds": 50.0,
    }


@pytest.mark.parametrize("size", [FULL, FAST])
def test_both_arms_cost_the_same(size: demo_detection.Size, tmp_path: Path) -> None:
    demo = Demo(size, "reference", tmp_path, {"train": tmp_path, "test": tmp_path})
    passes = {arm: demo.budget(arm).image_passes for arm in ARMS}
    # Of the short version, whose last batch of an epoch is dropped, as nearly as that allows.
    assert passes[EQUAL_COST] == pytest.approx(passes[BASE], rel=0.05 if size is FAST else 0)
    assert demo.config(EQUAL_COST).method.eps_255 == demo_detection.EPS_255
    differ = [word for word in demo.command(EQUAL_COST, 0) if word not in demo.command(BASE, 0)]
    assert differ == [
        f"name={EQUAL_COST}",
        f"method.name={EQUAL_COST}",
        f"budget.warmup_epochs={demo_detection.WARMUP_EPOCHS[EQUAL_COST]}",
        f"method.eps_255={demo_detection.EPS_255}",
    ]


def test_the_verdict_follows_the_numbers() -> None:
    rows = {
        BASE: [run(seed, 50 + seed, 20.0) for seed in range(3)],
        EQUAL_COST: [run(seed, 50 + seed, 25 + 0.1 * seed) for seed in range(3)],
    }
    first, _, last = verdict(rows)
    assert "1.00 times the image passes" in first
    assert f"better: {MEASURES['noise']}" in first
    assert f"undecided: {MEASURES['clean']}, {MEASURES['AP50']}" in first
    assert "3 seed(s)" in last
    *_, vanilla, ours, gap = table(rows).splitlines()
    assert "20.0" in vanilla
    assert "25.1" in ours
    assert "+5.1 [" in gap

    worse = {BASE: rows[EQUAL_COST], EQUAL_COST: rows[BASE]}
    assert f"worse: {MEASURES['noise']}" in verdict(worse)[0]
    one = {arm: runs[:1] for arm, runs in rows.items()}
    assert "50.0 -> 50.0" in verdict(one)[0]
    assert "20.0 -> 25.0; one seed decides nothing" in verdict(one)[0]


def test_a_run_in_numbers(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"steps": 7, "image_passes": 112}')
    results = {"clean": {"map": 0.5, "map50": 0.75}}
    for noise, values in {"gaussian_noise": (0.3, 0.1), "shot_noise": (0.4, 0.2)}.items():
        for severity, value in enumerate(values, 1):
            results[f"computed/{noise}/{severity}"] = {"map": value}
    found = numbers_of(tmp_path, {"seed": 3, "results": results})
    assert found["seed"] == 3
    assert (found["clean"], found["AP50"]) == (50, 75)
    assert found["corruptions"] == pytest.approx({"gaussian_noise": 20, "shot_noise": 30})
    assert found["noise"] == pytest.approx(25)
    assert (found["steps"], found["image_passes"], found["cpu_seconds"]) == (7, 112, None)


@pytest.mark.slow
def test_a_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    tiny = demo_detection.Size(
        train=40, test=6, epochs=6, milestones=(4,), seeds=1, noises=NOISES[:1], severities=(1,)
    )
    made_of = made_up_sources(np.random.default_rng(0))
    monkeypatch.setattr(scenes, "sources", lambda split: made_of)
    monkeypatch.setattr(demo_detection, "FAST", tiny)
    monkeypatch.setattr(demo_detection, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(demo_detection, "ROOT", tmp_path)
    words = ["--fast", "--pipeline", "reference"]
    demo_detection.main(words)
    said = capfd.readouterr().out
    for heading in ("1. Data", "2. Training", "3. Evaluation", "4. Result", "Verdict"):
        assert heading in said
    folder = tmp_path / "runs" / "demo_detection_reference_fast"
    assert {"report.md", "report.json"} <= {file.name for file in folder.iterdir()}
    assert len([*(folder / "eval" / "pictures").glob("*.png")]) == 2 * 2
    # What is finished is not made again.
    before = (folder / BASE / "seed0" / "result.json").stat().st_mtime_ns
    demo_detection.main(words)
    assert (folder / BASE / "seed0" / "result.json").stat().st_mtime_ns == before
