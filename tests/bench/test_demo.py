"""The demo: its arithmetic, every branch of its verdict, equal cost, and a whole miniature."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

from bench import commands, demo, demo_common, demo_figures, demo_measure, demo_words
from bench.demo_words import BASE, EQUAL_COST, EQUAL_STEPS, MEASURES, Cost
from fap.config import DataConfig
from fap.evaluate.compare import Difference

PAPER = {BASE: {"top1": 76.2, "imagenet_c": 58.5}, EQUAL_COST: {"top1": 76.5, "imagenet_c": 56.4}}
FAIR = Cost(1.01, 0.99, 1.03, {})


STEPS = {BASE: 840, EQUAL_COST: 560, EQUAL_STEPS: 840}
IMAGE_PASSES = {BASE: 53_760, EQUAL_COST: 53_760, EQUAL_STEPS: 80_640}


def rows(gaps: dict[str, list[float]], arms: tuple[str, ...] = (BASE, EQUAL_COST)) -> dict:
    """Runs whose arms other than vanilla are better by these gaps, one per seed."""
    n = len(next(iter(gaps.values())))
    made: dict = {}
    for arm in arms:
        own_gaps = gaps
        if arm == BASE:
            own_gaps = {measure: [0.0] * n for measure in MEASURES}
        made[arm] = [run(arm, seed, own_gaps) for seed in range(n)]
    return made


def run(arm: str, seed: int, gaps: dict[str, list[float]]) -> dict:
    gap = {measure: gaps[measure][seed] for measure in MEASURES}
    return {
        "seed": seed,
        "train_clean": 99.0,
        "clean": 50.0 + seed + gap["clean"],
        "corrupted": 40.0 + seed + gap["corrupted"],
        "adversarial": 10.0 + seed + gap["adversarial"],
        "corruptions": {"gaussian_noise": 30.0 + seed + gap["gaussian_noise"], "contrast": 50.0},
        "steps": STEPS[arm],
        "image_passes": IMAGE_PASSES[arm],
        "cpu_seconds": 60.0,
    }


# Gaps of three seeds.
BETTER = [2.0, 2.2, 1.8]
WORSE = [-2.0, -2.2, -1.8]
UNDECIDED = [1.0, -0.8, 0.1]


# ------------------------------------------------------------------ arithmetic


def test_the_interval_is_the_paired_t_test() -> None:
    ours, base = np.random.default_rng().normal(size=(2, 5))

    def runs(values: np.ndarray) -> list[dict]:
        return [{"seed": seed, "clean": float(value)} for seed, value in enumerate(values)]

    found = demo_words.difference(runs(ours), runs(base), "clean")
    low, high = stats.ttest_rel(ours, base).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.low < found.mean < found.high


def test_runs_of_other_seeds_are_not_paired() -> None:
    with pytest.raises(AssertionError):
        demo_words.difference([{"seed": 1, "clean": 1.0}], [{"seed": 0, "clean": 1.0}], "clean")


@pytest.mark.parametrize("size", [demo.FULL, demo.FAST])
def test_equal_cost_is_equal_to_the_image_pass_and_equal_steps_to_the_step(size) -> None:
    planned = demo.Demo(size, "ffcv", Path("runs"), {"train": Path("a"), "test": Path("b")})
    base = planned.budget(BASE)
    cost = planned.budget(EQUAL_COST)
    steps = planned.budget(EQUAL_STEPS)
    assert cost.image_passes == base.image_passes
    assert steps.steps == base.steps
    assert steps.image_passes == 1.5 * base.image_passes
    for b in (base, cost, steps):  # the rate falls twice, at the same share of each training
        assert len(b.rates.milestones) == 2
        for own, vanilla in zip(b.rates.milestones, base.rates.milestones, strict=True):
            assert own / b.epochs == pytest.approx(vanilla / base.epochs, abs=1 / b.epochs)
            assert own < b.epochs


# ------------------------------------------------------------------ the verdict


def verdict(
    gaps: dict[str, list[float]], cost: Cost = FAIR, arms: tuple[str, ...] = (BASE, EQUAL_COST)
) -> list[str]:
    return demo_words.verdict(cost, rows(gaps, arms), 320, PAPER)


def test_every_comparison_is_judged_by_its_own_numbers() -> None:
    gaps = {"clean": UNDECIDED, "corrupted": BETTER, "gaussian_noise": WORSE, "adversarial": BETTER}
    said = verdict(gaps)
    assert (
        "better on corrupted images, adversarial images; worse on Gaussian noise; "
        "undecided on clean images"
    ) in said[0]
    by_name = {}
    for name in MEASURES.values():
        (by_name[name],) = [line for line in said if line.startswith(f"  - {name}")]
    assert by_name["corrupted images"].endswith(
        "(mean of 2): 2.0 points more right than vanilla's 41.0% "
        "(95% interval +1.5 to +2.5, 3 seeds): better, as far as 3 seeds of this size show"
    )
    assert "2.0 points fewer right than vanilla's 31.0%" in by_name["Gaussian noise"]
    assert "-2.5 to -1.5, 3 seeds): worse" in by_name["Gaussian noise"]
    assert by_name["clean images"].endswith("undecided, the interval includes 0")


def test_one_seed_decides_nothing() -> None:
    said = verdict({measure: [5.0] for measure in MEASURES})
    assert (
        "undecided on clean images, corrupted images, Gaussian noise, adversarial images" in said[0]
    )
    deciding_nothing = "one seed has no interval and decides nothing"
    assert sum(deciding_nothing in line for line in said) == len(MEASURES)
    assert not any("inf" in line or "nan" in line for line in said)


CHEAPER = "it is cheaper"
WITHIN = "at most 5% more, which"
OPEN = "undecided"
DEARER = "more than the 5% that"


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (0.90, 0.97, CHEAPER),
        (0.97, 1.04, WITHIN),
        (1.01, 1.09, OPEN),
        (0.97, 1.09, OPEN),
        (1.06, 1.12, DEARER),
    ],
)
def test_the_cost_is_judged_by_its_interval(low: float, high: float, answer: str) -> None:
    said = verdict(dict.fromkeys(MEASURES, UNDECIDED), Cost((low + high) / 2, low, high, {}))[1]
    assert answer in said
    assert f"{low:.2f} to {high:.2f}; 1.00 times the image passes" in said
    for other in {CHEAPER, WITHIN, OPEN, DEARER} - {answer}:
        assert other not in said


def test_equal_steps_say_what_they_cost_and_a_demo_without_them_does_not() -> None:
    gaps = dict.fromkeys(MEASURES, BETTER)
    said = verdict(gaps, arms=(BASE, EQUAL_COST, EQUAL_STEPS))
    lead = "as many optimiser steps as vanilla, at 1.50 times its image passes"
    assert lead in "\n".join(said)
    assert sum(line.startswith("  - ") for line in said) == 2 * len(MEASURES)
    assert not any("as many optimiser steps" in line for line in verdict(gaps))
    assert "(560 optimiser steps against 840)" in "\n".join(said)


def test_the_verdict_ends_with_what_it_cannot_show() -> None:
    last = verdict(dict.fromkeys(MEASURES, BETTER))[-1]
    assert "3 seeds of a tiny network on 320 images say nothing about ImageNet" in last
    assert "76.2 -> 76.5% right on clean images and 58.5 -> 56.4% wrong" in last


@pytest.mark.parametrize(
    ("low", "high", "answer"), [(0.1, 2.0, "better"), (-2, -0.1, "worse"), (-0.1, 2, "undecided")]
)
def test_an_interval_decides_by_0(low: float, high: float, answer: str) -> None:
    assert Difference((low + high) / 2, 3, True, low, high).verdict("more") == answer


def test_seeds_without_spread_decide_nothing() -> None:
    said = verdict({measure: [0.0, 0.0] for measure in MEASURES})
    deciding_nothing = "decides nothing: every seed has the same difference"
    assert sum(deciding_nothing in line for line in said) == len(MEASURES)


# ------------------------------------------------------------------ tables and figures


def test_tables_show_every_seed_and_every_corruption() -> None:
    made = rows(dict.fromkeys(MEASURES, BETTER))
    made[BASE][1]["cpu_seconds"] = None  # an interrupted run's
    made[EQUAL_COST] = [run | {"cpu_seconds": None} for run in made[EQUAL_COST]]
    whole = demo_words.main_table(made)
    assert "53,760 |          60 |" in whole
    assert whole.count("not known") == 1
    seeds = demo_words.seeds_table(made)
    for seed in range(3):
        assert f"seed {seed}, vanilla " in seeds
        assert f"seed {seed}, Fast AdvProp, equal cost " in seeds
    assert "+2.0 [+1.5, +2.5]" in seeds
    assert "| contrast " in demo_words.corruptions_table(made)
    for table in (whole, seeds):
        assert len({len(line) for line in table.splitlines()}) == 1  # columns line up


def test_a_bar_is_the_mean_and_a_dot_is_a_seed() -> None:
    axes = Figure().add_subplot()
    groups = {
        "clean": {"a": [1.0, 3.0], "b": [4.0, 4.0]},
        "noise": {"a": [5.0, 6.0], "b": [0.0, 1.0]},
    }
    demo_figures.bars(axes, groups)
    assert [p.get_height() for p in axes.patches] == [2.0, 5.5, 4.0, 0.5]
    dots = []
    for line in axes.lines:
        for x, y in zip(*line.get_data(), strict=True):
            dots.append((round(float(x), 3), float(y)))
    assert sorted(dots) == [
        (0.2, 1),
        (0.2, 3),
        (0.6, 4),
        (0.6, 4),
        (1.2, 5),
        (1.2, 6),
        (1.6, 0),
        (1.6, 1),
    ]


def test_figures_need_no_display(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    made = rows(dict.fromkeys(MEASURES, BETTER))
    demo_figures.accuracy(
        made, demo_words.LABELS, MEASURES, demo_words.value, tmp_path / "accuracy.png"
    )
    image = np.zeros((32, 32, 3), np.float32)
    example = demo_measure.Example("cat", (image, image + 3, image + 4), ("cat", "cat", "dog"))
    demo_figures.triplets([example, example], 4, tmp_path / "examples.png")
    for file in tmp_path.iterdir():
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 10_000


# ------------------------------------------------------------------ the attack


def test_the_attack_stays_in_its_ball_and_harms() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    images = torch.randint(0, 256, (16, 3, 8, 8)).float()
    labels = torch.arange(16) % 10
    data = DataConfig(size=8, resize=8)
    start, worst = demo_measure.perturbed(
        model, images, labels, data, eps_255=4, step_255=1, steps=5
    )
    for x in (start, worst):
        assert 3 < (x - images).abs().max() <= 4
        assert x.min() >= 0
        assert x.max() <= 255

    def loss(x: torch.Tensor) -> float:
        logits = demo_measure.logits_of(model, x, data)
        return torch.nn.functional.cross_entropy(logits, labels).item()

    assert loss(worst) > loss(start) > 0
    assert loss(worst) > loss(images)


# ------------------------------------------------------------------ commands


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_counts_its_cpu_seconds_and_writes_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "a.log"
    busy = (
        "import time, os\n"
        "while time.process_time() < 0.3: pass\n"
        "print('threads', os.environ['OMP_NUM_THREADS'])"
    )
    assert 0.3 <= commands.run(python(busy), "busy", log, threads=1) < 5
    assert log.read_text() == "threads 1\n"
    broken = python("print('the reason', flush=True); raise SystemExit(3)")
    message = r"(?s)'broken' ended with exit code 3; the end of .*: *\n.*the reason"
    with pytest.raises(commands.Failed, match=message):
        commands.run(broken, "broken", log)


# Its handler does not print: the signal may come in the middle of the other print.
SLEEPER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"saved\\n"), sys.exit(7)))
print("ready", flush=True)
time.sleep(600)
"""


def two_sleepers_and_then(leave: Callable[[], None], log: Path) -> list[str]:
    """How two commands, of which one runs, end when `leave` raises beside them."""
    with (
        contextlib.suppress(KeyboardInterrupt, SystemExit),
        ThreadPoolExecutor(1) as pool,
        commands.stopping(),
    ):
        jobs = [pool.submit(commands.run, python(SLEEPER), "sleeper", log) for _ in range(2)]
        while not log.exists() or "ready" not in log.read_text():
            time.sleep(0.02)
        leave()
    return [str(job.exception()) for job in jobs]


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("leave", [interrupt, terminate])
def test_leaving_ends_the_running_commands_and_starts_no_other(leave, tmp_path: Path) -> None:
    """Each gets exactly one signal, at which a training run saves."""
    log = tmp_path / "log"
    ended = two_sleepers_and_then(leave, log)
    assert log.read_text() == "ready\nsaved\n"
    assert "exit code 7" in ended[0]
    assert "was not started" in ended[1]
    with commands.stopping():  # a later block starts commands again
        commands.run(python("pass"), "another")


# ------------------------------------------------------------------ a whole miniature


@pytest.mark.parametrize("before", ["nothing", "checkpoints", "result.json"])
def test_only_a_whole_run_has_its_cpu_seconds(before: str, tmp_path: Path, monkeypatch) -> None:
    class OneRun(demo_common.RunsInAFolder):
        folder = tmp_path

        def command(self, arm: str, seed: int) -> list[str]:
            return [arm, str(seed)]

    started = []

    def fap(*words: str, log: Path, threads: int) -> float:
        started.append(words)
        (OneRun().run_folder(BASE, 3) / "checkpoints").mkdir(parents=True, exist_ok=True)
        return 12.5

    monkeypatch.setattr(demo_common, "fap", fap)
    folder = OneRun().run_folder(BASE, 3)
    if before != "nothing":
        (folder / before).mkdir(parents=True)
    OneRun().train(BASE, 3)
    finished = before == "result.json"
    assert started == ([] if finished else [("train", BASE, "3")])
    assert demo_common.cpu_seconds(folder) == (12.5 if before == "nothing" else None)


TINY = demo.Size(
    images=96,
    test=96,
    attacked=32,
    seeds=1,
    epochs=6,
    milestones=(3, 5),
    arms=(BASE, EQUAL_COST, EQUAL_STEPS),
    corrupt=("gaussian_noise", "contrast"),
    rounds=2,
)


def test_other_settings_do_not_pass_for_the_same_runs(
    tiny_beton: Path, raw_beton: Path, tmp_path: Path
) -> None:
    files = {"train": tiny_beton, "test": tiny_beton}
    demo_common.same_settings(tmp_path / "runs", {"epochs": 4}, files)
    demo_common.same_settings(tmp_path / "runs", {"epochs": 4}, files)
    with pytest.raises(SystemExit, match="other settings or other data"):
        demo_common.same_settings(tmp_path / "runs", {"epochs": 5}, files)
    with pytest.raises(SystemExit, match="other settings or other data"):
        demo_common.same_settings(tmp_path / "runs", {"epochs": 4}, files | {"test": raw_beton})


@pytest.mark.slow
def test_a_miniature_demo(tiny_beton: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(demo, "FAST", TINY)
    monkeypatch.setattr(demo, "RUNS", tmp_path)
    monkeypatch.setattr(demo, "convert", lambda *_: tiny_beton)
    demo.main(["--fast", "--pipeline", "reference"])
    said, errors = capfd.readouterr()
    assert "\r" not in said + errors  # no progress bar is repainted
    for heading in (
        "1. Data",
        "2. Cost",
        "3. Training",
        "4. Evaluation",
        "5. Result",
        "seed 0, Fast AdvProp",
        "In short",
    ):
        assert heading in said
    out = tmp_path / "demo_reference_fast"
    found = json.loads((out / "report.json").read_text())
    passes = {BASE: 6 * 64, EQUAL_COST: 4 * 96, EQUAL_STEPS: 6 * 96}
    for arm in TINY.arms:
        (found_run,) = found["runs"][arm]
        assert found_run["image_passes"] == passes[arm]
        assert found_run["cpu_seconds"] > 1
        assert set(found_run["corruptions"]) == set(TINY.corrupt)
        assert 0 <= found_run["adversarial"] <= 100
    assert (out / "accuracy.png").stat().st_size > 10_000
    assert (out / "examples.png").stat().st_size > 10_000

    # The same again keeps what is finished, and what is missing is made.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("step_*.safetensors")}
    (out / EQUAL_COST / "seed0" / "cpu_seconds.json").unlink()
    cost = replace(FAIR, seconds_per_step={BASE: 0.1, EQUAL_COST: 0.1})
    monkeypatch.setattr(demo, "measured_cost", lambda _: cost)
    demo.main(["--fast", "--pipeline", "reference"])
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("step_*.safetensors")}
    said = capfd.readouterr().out
    assert "3 are there from an earlier demo" in said
    assert "not known" in said
