"""The study's own arithmetic, and a whole miniature demo."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bench import study


def test_interval_is_the_paired_t_test() -> None:
    ours, base = np.random.default_rng().normal(size=(2, 5))
    low, high = stats.ttest_rel(ours, base).confidence_interval(0.95)
    assert study.interval(ours - base).endswith(f"[{low:+.2f}, {high:+.2f}]")


@pytest.mark.slow
def test_a_miniature_demo_ends_in_table_and_plot(tiny_beton: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    small = replace(study.SIZES["demo"], epochs=2, milestones=(1,), clean_batch=64)
    monkeypatch.setitem(study.SIZES, "demo", small)
    monkeypatch.setattr(study, "convert", lambda *_: tiny_beton)
    monkeypatch.setattr(study, "RUNS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["study", "demo", "--pipeline", "reference"])
    study.main()
    said = capsys.readouterr().out
    for arm in ("vanilla", "fast_advprop"):
        assert f"| {arm} |" in said
    out = tmp_path / "demo_reference"
    assert (out / "study_demo.png").stat().st_size > 10_000
    runs = json.loads((out / "study_demo.json").read_text())["runs"]
    assert runs["vanilla"][0]["image_passes"] == 2 * 64
    assert 0 <= runs["fast_advprop"][0]["corrupted"] <= 100
    before = {p: p.stat().st_mtime_ns for p in out.rglob("step_*.safetensors")}
    study.main()  # finished runs are kept
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("step_*.safetensors")}
