"""The study behind docs/evidence.md: equal cost and equal steps, its words, a whole miniature."""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bench.evidence.__main__ as command
from bench import commands
from bench.evidence import cost
from bench.evidence.arms import ARMS, AUGMIX, BASE, OURS, OURS_AUGMIX, OURS_LATE, OURS_STEPS
from bench.evidence.conduct import Clock, conduct, known_rows
from bench.evidence.measure import Row, percentages
from bench.evidence.numbers import MEASURES, Rows
from bench.evidence.report import compared, differences_table, norms_table, write
from bench.evidence.runs import Runs
from bench.evidence.studies import FULL, SATURATED, SMALL, Part, Regime, Run, Study
from bench.evidence.words import words
from fap.budget import budget
from fap.config import Config
from fap.evaluate.compare import paired
from pipelines.corrupt import NAMES

COSTS = {
    BASE: {"ratio": 1.0, "low": 1.0, "high": 1.0},
    OURS: {"ratio": 1.2, "low": 1.1, "high": 1.3},
}
STUDIES = {"small": SMALL, "full": FULL}


def runs_in(folder: Path, study: Study) -> Runs:
    train = {count: folder / f"{count}.beton" for count in (80, *study.sizes())}
    return Runs(folder, train, folder / "test.beton", "reference", workers=2)


def every_kind_of_run() -> list[Run]:
    found = {(run.regime, run.arm): run for study in STUDIES.values() for run in study.runs()}
    return list(found.values())


@pytest.mark.parametrize("run", every_kind_of_run(), ids=lambda run: run.name)
def test_every_arm_spends_what_vanilla_training_spends(run: Run, tmp_path: Path) -> None:
    """To within half an epoch of each stage, which is what whole epochs allow."""
    runs = runs_in(tmp_path, SMALL if run.regime.images < 50_000 else FULL)
    base = budget(runs.config(run._replace(arm=BASE)), run.regime.images)
    own = [budget(config, run.regime.images) for config in runs.stages(run)]
    if ARMS[run.arm].spends == "steps":
        spent, due = sum(stage.steps for stage in own), base.steps
        epochs = sum(stage.steps_per_epoch for stage in own)
    else:
        spent, due = sum(stage.image_passes for stage in own), base.image_passes
        epochs = sum(stage.steps_per_epoch * stage.image_passes_per_step for stage in own)
    assert abs(spent - due) <= epochs / 2


@pytest.mark.parametrize("regime", SMALL.parts["saturation"].regimes, ids=lambda r: r.name)
def test_fast_advprop_late_goes_on_where_vanilla_training_stops(
    regime: Regime, tmp_path: Path
) -> None:
    """The rate is vanilla's, image pass by image pass, to within the epochs' rounding."""
    runs = runs_in(tmp_path, SMALL)
    run = Run(regime, OURS_LATE, 3)
    first, last = runs.stages(run)
    assert (first.method.name, last.method.name) == ("vanilla", "fast_advprop")
    assert (first.seed, last.seed) == (3, 3)
    assert last.model.init == f"{first.run.dir}/{first.name}/seed3"

    def rates(configs: Sequence[Config]) -> np.ndarray:
        """By image pass."""
        found = []
        for one in (budget(config, regime.images) for config in configs):
            by_step = [one.rates.at(step) for step in range(one.steps)]
            found.append(np.repeat(by_step, one.image_passes_per_step))
        return np.concatenate(found)

    whole = rates([runs.config(run._replace(arm=BASE))])
    staged = rates([first, last])
    shared = min(len(whole), len(staged))
    two_epochs = sum(
        one.steps_per_epoch * one.image_passes_per_step
        for one in (budget(config, regime.images) for config in (first, last))
    )
    different = ~np.isclose(whole[:shared], staged[:shared], rtol=1e-9)
    assert different.sum() <= two_epochs  # of all: the rate falls between whole epochs


def test_fast_advprop_is_equal_to_the_image_pass_on_the_curve(tmp_path: Path) -> None:
    runs = runs_in(tmp_path, SMALL)
    for regime in SMALL.parts["saturation"].regimes:
        spent = [
            budget(runs.config(Run(regime, arm, 0)), regime.images).image_passes
            for arm in (BASE, OURS)
        ]
        assert spent[0] == spent[1]


def test_the_first_seed_comes_first_then_the_headline_then_seed_by_seed() -> None:
    for study in STUDIES.values():
        runs = study.runs()
        assert len(set(runs)) == len(runs)
        assert set(runs) == {
            run for part in study.parts.values() for seed in range(20) for run in part.round(seed)
        }
        kinds = [(run.seed > 0, not study.in_headline(run), run.seed) for run in runs]
        assert kinds == sorted(kinds)


def test_autoattack_is_for_the_first_seeds_of_the_headline() -> None:
    strongly = [run for run in SMALL.runs() if SMALL.is_strongly_attacked(run)]
    assert {run.seed for run in strongly} == {0}
    assert SMALL.headline is not None
    assert {run.arm for run in strongly} == set(SMALL.headline.arms)
    assert not any(MINIATURE.is_strongly_attacked(run) for run in MINIATURE.runs())


def test_the_clock_begins_no_run_that_would_not_end_in_time() -> None:
    clock = Clock(seconds=1e6)
    assert clock.allows_another()
    clock.longest = 1e6
    assert not clock.allows_another()


def test_percentages_are_means_over_severities_and_then_over_corruptions() -> None:
    accuracies = {
        "clean": 0.9,
        "computed/fog/1": 0.5,
        "computed/fog/2": 0.3,
        "computed/snow/1": 0.2,
        "attack/pgd10/4": 0.1,
    }
    results = {name: {"top1": value, "ece": 0.05} for name, value in accuracies.items()}
    found = percentages(results)
    assert found == pytest.approx(
        {"clean": 90, "ece": 5, "fog": 40, "snow": 20, "corrupted": 30, "pgd10/4": 10}
    )


def test_a_model_that_diverged_has_no_calibration_error() -> None:
    found = percentages({"clean": {"top1": 0.1, "ece": None}})
    assert math.isnan(found["ece"])


# ------------------------------------------------------------------ words and tables


def made_up(regime: Regime, arm: str, seed: int, **numbers: float) -> Row:
    """A row whose accuracies are 50% but for `numbers`."""
    every = {"clean": 50.0, "train/clean": 99.0, "zero_signs": 0.0}
    for norms in ("main", "aux"):
        of_norms = dict.fromkeys(("clean", "corrupted", "ece", *NAMES), 50.0)
        of_norms |= {f"pgd10/{eps}": 50.0 for eps in (1, 2, 4)}
        every |= {f"{norms}/{name}": value for name, value in of_norms.items()}
    return {
        "run": Run(regime, arm, seed).name,
        "regime": regime.name,
        "arm": arm,
        "seed": seed,
        "steps": 7,
        "epochs": 1,
        "image_passes": 448,
        "cpu_seconds": 1.5,
        "commit": "0",
        "numbers": every | {name.replace("__", "/"): value for name, value in numbers.items()},
    }


def study_of_gains(gain: float, seeds: int, spread: float = 0.1) -> Rows:
    """Fast AdvProp has so many points more under corruptions, nearly so in every seed."""
    rng = np.random.default_rng()
    rows = []
    for seed in range(seeds):
        rows.append(made_up(SATURATED, BASE, seed))
        for arm in (OURS, OURS_STEPS):
            found = 50 + gain + spread * rng.uniform(-1, 1)
            rows.append(made_up(SATURATED, arm, seed, main__corrupted=found))
    return Rows(rows)


@pytest.mark.parametrize(
    ("gain", "seeds", "said"),
    [(3.0, 5, "better"), (-3.0, 5, "worse"), (0.0, 5, "undecided"), (3.0, 1, "one seed")],
)
def test_the_words_say_what_the_intervals_show(gain: float, seeds: int, said: str) -> None:
    spread = 0.1 if gain else 5.0
    first = next(iter(words(study_of_gains(gain, seeds, spread), SMALL, {})))
    if gain:
        assert said in first
    else:
        found = study_of_gains(gain, seeds, spread)
        difference = found.difference(SATURATED, OURS, BASE, "main/corrupted")
        assert difference is not None
        assert difference.low is not None and difference.high is not None
        undecided = difference.low <= 0 <= difference.high
        assert (difference.verdict("more") == "undecided") == undecided


def test_less_calibration_error_is_better() -> None:
    less = paired([1.0, 1.1, 1.2], [2.0, 2.2, 2.1])
    assert less.verdict(MEASURES["main/ece"].better) == "better"
    assert less.verdict(MEASURES["clean"].better) == "worse"


def test_differences_are_of_the_seeds_that_both_arms_have() -> None:
    rows = [made_up(SATURATED, BASE, seed) for seed in (0, 1, 2)]
    rows += [made_up(SATURATED, OURS, seed, main__corrupted=50.0 + seed) for seed in (3, 2, 1)]
    found = Rows(rows).difference(SATURATED, OURS, BASE, "main/corrupted")
    assert found is not None
    assert (found.n, found.mean) == (2, 1.5)
    assert Rows(rows).difference(SATURATED, "noise", BASE, "clean") is None


def test_a_report_shows_what_there_is_of_a_study(tmp_path: Path) -> None:
    text = write(study_of_gains(3.0, 3), SMALL, tmp_path / "evidence", COSTS)
    assert text + "\n" == (tmp_path / "evidence.md").read_text()
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "evidence.json").read_text())
    assert len(found["rows"]) == 9
    headline = {
        (one["arm"], one["measure"]): one["mean"] for one in found["comparisons"]["headline"]
    }
    assert headline[OURS, "main/corrupted"] == pytest.approx(3, abs=0.2)
    assert "1.20 [1.10, 1.30]" in text
    assert "AugMix" not in text  # nothing is known of it


def test_a_number_that_lacks_leaves_its_cell_empty() -> None:
    """And the others below their own heads."""
    rows = [made_up(SATURATED, arm, 0) for arm in (BASE, OURS)]
    del rows[1]["numbers"]["clean"]
    head, _, line = differences_table(Rows(rows), SMALL.parts["headline"]).splitlines()
    cells = [cell.strip() for cell in line.split("|")]
    assert len(cells) == len(head.split("|"))
    assert cells[3] == ""


def test_a_part_is_compared_with_its_own_base() -> None:
    """AugMix with Fast AdvProp against AugMix without, whatever vanilla training has."""
    corrupted = {BASE: 10.0, AUGMIX: 50.0, OURS_AUGMIX: 51.0}
    rows = Rows(
        [
            made_up(SATURATED, arm, seed, main__corrupted=value, aux__corrupted=value + 2)
            for arm, value in corrupted.items()
            for seed in (0, 1)
        ]
    )
    part = SMALL.parts["AugMix"]
    gains = {one["measure"]: one["mean"] for one in compared(rows, part)}
    assert gains["main/corrupted"] == pytest.approx(1)
    assert "minus AugMix, points" in differences_table(rows, part)

    table = norms_table(rows, SMALL.only(["methods", "AugMix"])).splitlines()
    gain = {line.split("|")[1].split(":")[1].strip(): line for line in table[2:]}
    assert gain.keys() == {
        "main norms - vanilla",
        "auxiliary norms - vanilla",
        "main norms - AugMix",
        "auxiliary norms - AugMix",
        "auxiliary - main norms",
    }
    assert "+43.0" in gain["auxiliary norms - vanilla"]
    assert "+3.0" in gain["auxiliary norms - AugMix"]
    assert "+2.0" in gain["auxiliary - main norms"]

    said = list(words(rows, SMALL.only(["AugMix"]), {}))
    assert any("through its auxiliary norms against AugMix alone" in line for line in said)


@pytest.mark.parametrize("title", SMALL.parts)
def test_any_part_alone_has_a_report(title: str, tmp_path: Path) -> None:
    part = SMALL.parts[title]
    rows = [made_up(*run) for seed in range(2) for run in part.round(seed)]
    text = write(Rows(rows), SMALL.only([title]), tmp_path / "evidence", {})
    assert part.question in text


def test_costs_are_measured_again_for_other_arms(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cost, "ROUNDS", 1)
    runs = replace(runs_in(tmp_path, SMALL), folder=tmp_path)
    part = Part("?", (Regime(images=80, epochs=3),), (BASE, OURS), seeds=1)
    file = tmp_path / "costs.json"
    assert cost.costs(runs, part, file).keys() == {BASE, OURS}
    kept = file.read_text()
    cost.costs(runs, part, file)
    assert file.read_text() == kept
    assert cost.costs(runs, replace(part, arms=(BASE, "noise")), file).keys() == {BASE, "noise"}


def test_rows_of_another_machine_are_added_where_they_are_the_same_runs(tmp_path: Path) -> None:
    rows = study_of_gains(3.0, 2)
    write(rows, SMALL, tmp_path / "evidence", COSTS)
    file = tmp_path / "evidence.json"
    assert known_rows(file, SMALL) == list(rows.rows)
    part = SMALL.parts["headline"]
    fewer = replace(SMALL, parts={"headline": replace(part, arms=(BASE, OURS))})
    assert {row["arm"] for row in known_rows(file, fewer)} == {BASE, OURS}
    assert known_rows(file, SMALL.only(["headline"])) == list(rows.rows)
    with pytest.raises(SystemExit, match="corrupted = 2000 images"):
        known_rows(file, replace(SMALL, corrupted=100))


SLEEPER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"told to stop"), sys.exit(0)))
print("ready", flush=True)
time.sleep(600)
"""


class Sleeping:
    """Measures by a command that takes for ever, beside which a signal arrives."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def rows(self, runs: list[Run]) -> list[Row]:
        def leave() -> None:
            self.wait_for("ready")
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=leave).start()
        commands.run([sys.executable, "-c", SLEEPER], "sleeper", self.log)
        return []

    def wait_for(self, words: str) -> None:
        while not self.log.exists() or words not in self.log.read_text():
            time.sleep(0.02)


def test_a_signal_during_the_evaluation_ends_its_command(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Runs, "finished", lambda *_: True)
    measure = Sleeping(tmp_path / "log")
    with pytest.raises(SystemExit):
        conduct(MINIATURE, runs_in(tmp_path, MINIATURE), measure, 0, [])  # type: ignore[arg-type]
    measure.wait_for("told to stop")


# ------------------------------------------------------------------ a whole study


MINIATURE = Study(
    parts={
        "headline": Part(
            "Does it run?", (Regime(images=80, epochs=3),), (BASE, OURS, OURS_LATE), seeds=1
        )
    },
    test=8,
    corrupted=8,
    attacked=4,
    strongly_attacked=0,  # it takes minutes
    workers=2,
    corrupt=("contrast", "fog"),
)


@pytest.mark.slow
def test_a_miniature_study_ends_in_table_and_figure(
    tiny_beton: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(command.STUDIES, "small", MINIATURE)
    monkeypatch.setattr(command, "convert", lambda *_: tiny_beton)
    monkeypatch.setattr(command, "RUNS", tmp_path / "runs")
    words = ["--pipeline", "reference", "--out", str(tmp_path)]
    assert command.main(words) == 0
    said = capsys.readouterr().out
    assert "3 runs to train" in said
    assert "Fast AdvProp" in said
    found = json.loads((tmp_path / "evidence_small.json").read_text())
    rows = {row["arm"]: row for row in found["rows"]}
    assert rows[BASE]["image_passes"] == 3 * 64
    assert rows[OURS]["image_passes"] == rows[BASE]["image_passes"]
    assert rows[OURS_LATE]["image_passes"] == 2 * 64 + 96  # two epochs of vanilla's, one of its own
    assert rows[OURS_LATE]["epochs"] == 3
    assert rows[OURS_LATE]["numbers"].keys() < rows[OURS]["numbers"].keys()  # main norms alone
    numbers = rows[OURS]["numbers"]
    assert numbers["aux/corrupted"] == pytest.approx(
        (numbers["aux/fog"] + numbers["aux/contrast"]) / 2
    )
    assert "aux/clean" not in rows[BASE]["numbers"]
    assert 0 <= numbers["main/pgd10/1"] <= 100
    assert "main/autoattack/1" not in numbers

    before = checkpoints(tmp_path)
    assert command.main([*words, "--seconds", "0"]) == 0  # what is there is kept, and reported
    assert "0 runs to train" in capsys.readouterr().out
    assert before == checkpoints(tmp_path)


def checkpoints(folder: Path) -> dict[Path, int]:
    """Every checkpoint below, and when it was written."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("step_*.safetensors")}
