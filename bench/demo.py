"""What does Fast AdvProp cost and what does it do, on real images, in minutes and without a GPU?

    make demo [FAST=1] [PIPELINE=ffcv|dali|reference]

Writes runs/demo_PIPELINE[_fast]/report.md, report.json, accuracy.png and examples.png. An
interrupted demo goes on where it stopped. `bench.demo_runs` says which runs there are,
`bench.demo_measure` measures, `bench.demo_words` judges, `bench.demo_figures` draws.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import demo_figures, demo_words
from bench.cifar import Files, convert
from bench.commands import fap, stopping
from bench.common import write_json
from bench.contestants import GPU
from bench.demo_common import (
    MOST_WORKERS,
    RUNS,
    cpu_seconds,
    in_parallel,
    last_checkpoint,
    minutes,
    same_settings,
    say,
)
from bench.demo_measure import ATTACK_STEPS, STEP_255, adversarial_accuracy, cost, examples, summary
from bench.demo_runs import CONFIGS, EPS_255, FAST, FULL, Demo, Size
from bench.demo_words import BASE, EQUAL_COST, LABELS, Cost
from fap.cli.output import survive
from fap.config import load_config
from pipelines.back_ends import BACK_ENDS
from pipelines.machine import usable_cores

STEPS_PER_BLOCK = 3  # of the measurement of cost
MARGIN = 1.2  # the runs also evaluate and save
INTRODUCTION = """
Fast AdvProp trains an image classifier on clean images and on adversarial ones: images changed by a
few grey levels so that the network errs. The network keeps a second set of batch norms for these.
The cost is meant to be that of plain ("vanilla") training: the gradient that makes an image
adversarial trains the network too, and there are fewer steps.

This demo trains the same small network several times in different ways: vanilla; Fast AdvProp for
as many image passes (one image through the network and back), hence at equal cost; Fast AdvProp for
as many optimiser steps, which costs half as much again. Then it compares them on clean, corrupted
and adversarial test images.
"""


def introduce(size: Size, fast: bool) -> None:
    print(INTRODUCTION)
    say(
        f"Here: {size.images} training and {size.test:,} test images of CIFAR-10, a ResNet-8, "
        f"{size.seeds} seeds, adversarial images within {EPS_255} of 255 grey levels. "
        "So few images can be learnt by heart, as ImageNet can by a large network: then more steps "
        "on clean images help little, and Fast AdvProp has a chance."
    )
    if fast:
        say(
            "This is the short version (FAST=1): no arm of equal steps, 4 corruptions instead of "
            "19, and a training that is far too short to judge by. `make demo` is the whole one."
        )


def fetch(folder: Path, size: Size) -> Files:
    say(
        "\n1. Data: CIFAR-10, fetched once (140-170 MB) "
        "and converted to the file that training reads"
    )
    log = folder / "logs" / "data.log"
    return {"train": convert("train", size.images, log), "test": convert("test", size.test, log)}


def measured_cost(demo: Demo) -> Cost:
    """Measured before the training, while nothing else of ours runs."""
    say("\n2. Cost: training steps of vanilla and Fast AdvProp in turns, in one process")
    configs = {arm: demo.config(arm) for arm in (BASE, EQUAL_COST)}
    found = cost(configs, demo.size.images, demo.size.rounds, STEPS_PER_BLOCK)
    say(
        f"   a Fast AdvProp run takes {found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}] times "
        "as long as a vanilla run"
    )
    return found


# ------------------------------------------------------------------ training


def passes_done(demo: Demo, arm: str, seed: int) -> float:
    """Image passes of a run so far, as far as it has said."""
    planned = demo.budget(arm)
    if demo.finished(arm, seed):
        return planned.image_passes
    record = demo.run_folder(arm, seed) / "metrics.jsonl"
    try:
        last = record.read_text().splitlines()[-1]
        return json.loads(last)["step"] * planned.image_passes_per_step
    except (OSError, ValueError, LookupError):  # not begun, or a line half written
        return 0


def train_all(demo: Demo, workers: int, seconds_per_step: Mapping[str, float]) -> None:
    runs = demo.runs
    todo = [run for run in runs if not demo.finished(*run)]
    arms = ", ".join(LABELS[arm] for arm in demo.size.arms)
    say(f"\n3. Training: {len(runs)} runs ({arms}), {workers} at a time")
    if len(todo) < len(runs):
        say(f"   {len(runs) - len(todo)} are there from an earlier demo, in {demo.folder}")
    if todo:
        step_seconds = 0.0
        for arm, _ in todo:
            method = demo.config(arm).method.name
            step_seconds += demo.budget(arm).steps * seconds_per_step[method]
        expected = minutes(step_seconds / workers * MARGIN)
        say(f"   about {expected}; what each run says is in {demo.folder / 'logs'}")
    total = sum(demo.budget(arm).image_passes for arm, _ in runs)
    began = time.monotonic()
    at_first = sum(passes_done(demo, *run) for run in runs)

    def progress() -> str:
        done = sum(passes_done(demo, *run) for run in runs)
        finished = sum(demo.finished(*run) for run in runs)
        line = f"   {finished} of {len(runs)} runs finished, {done / total:.0%} of the image passes"
        if at_first < done < total:
            rest = (time.monotonic() - began) * (total - done) / (done - at_first)
            line += f", about {minutes(rest)} left"
        return line

    in_parallel([partial(demo.train, *run) for run in todo], workers, progress)


# ------------------------------------------------------------------ evaluation


def evaluate_all(demo: Demo, workers: int) -> dict[str, list[dict[str, Any]]]:
    """By arm, a summary per seed. fap-eval runs beside our own attack."""
    size = demo.size
    say(f"\n4. Evaluation of {len(demo.runs)} networks")
    say(
        f"   {size.test:,} clean test images; the same under {len(size.corrupt)} corruptions, "
        f"severity 3 of 5; {size.attacked:,} under attack "
        f"(PGD: {ATTACK_STEPS} steps of {STEP_255:g} grey level, at most {EPS_255} in all)"
    )
    out = demo.folder / "eval"
    out.mkdir(exist_ok=True)
    checkpoints = [last_checkpoint(demo.run_folder(*run)) for run in demo.runs]
    under_attack = [out / f"adversarial-{arm}-seed{seed}.json" for arm, seed in demo.runs]
    threads = max(1, workers // 2)  # of either half of the evaluation
    began = time.monotonic()

    def corrupt_all() -> None:
        """fap-eval: clean and corrupted images, all networks."""
        words = [str(checkpoint) for checkpoint in checkpoints]
        words += ["--data", str(demo.files["test"]), "--pipeline", demo.pipeline]
        words += ["--out", str(out), "--keep", str(demo.folder / "sets")]
        words += ["--corrupt", *size.corrupt]
        fap("eval", *words, log=demo.log("eval"), threads=threads)

    def attack(checkpoint: Path, file: Path) -> Callable[[], None]:
        def call() -> None:
            found = adversarial_accuracy(checkpoint, demo.files["test"], size.attacked, EPS_255)
            file.write_text(json.dumps(found))

        return call

    def progress() -> str:
        attacked = sum(file.exists() for file in under_attack)
        # fap-eval writes one file for each network and set of images.
        measured = len(list((out / "results").glob("*.json")))
        sets = len(checkpoints) * (1 + len(size.corrupt))
        return (
            f"   {attacked} of {len(checkpoints)} networks attacked, {measured} of {sets} "
            f"accuracies measured; {minutes(time.monotonic() - began)} so far"
        )

    calls = [corrupt_all]
    for checkpoint, file in zip(checkpoints, under_attack, strict=True):
        if not file.exists():
            calls.append(attack(checkpoint, file))
    in_parallel(calls, 1 + threads, progress)
    reports = json.loads((out / "report.json").read_text())
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in size.arms}
    for (arm, seed), report, file in zip(demo.runs, reports, under_attack, strict=True):
        rows[arm].append(run_in_numbers(demo.run_folder(arm, seed), report, file))
    return rows


def run_in_numbers(folder: Path, report: dict[str, Any], under_attack: Path) -> dict[str, Any]:
    """A run as `bench.demo_words` wants it."""
    run = summary(folder, report)
    run["adversarial"] = json.loads(under_attack.read_text())
    run["cpu_seconds"] = cpu_seconds(folder)
    return run


# ------------------------------------------------------------------ the end


def tell(demo: Demo, cost_found: Cost, rows: dict[str, list[dict[str, Any]]], fast: bool) -> None:
    """Figures, report.md and report.json; table and verdict on the screen."""
    folder = demo.folder
    paper = {}
    for arm in (BASE, EQUAL_COST):
        paper[arm] = load_config(f"configs/imagenet/{CONFIGS[arm]}.yaml").paper
    verdict = demo_words.verdict(cost_found, rows, demo.size.images, paper)
    if fast:
        verdict.append(
            "- This was the short version: run `make demo` before you believe any of it."
        )
    tables = [demo_words.main_table(rows), demo_words.seeds_table(rows)]
    demo_figures.accuracy(
        rows, LABELS, demo_words.MEASURES, demo_words.value, folder / "accuracy.png"
    )
    shown = examples(last_checkpoint(demo.run_folder(EQUAL_COST, 0)), demo.files["test"], EPS_255)
    demo_figures.triplets(shown, EPS_255, folder / "examples.png")
    parts = ["\n".join(verdict), *tables, demo_words.corruptions_table(rows)]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    numbers = {"size": asdict(demo.size), "cost": asdict(cost_found), "runs": rows}
    write_json(folder / "report.json", numbers)
    say("\n5. Result\n")
    print("\n\n".join(tables))
    say("\nVerdict\n" + "\n".join(verdict))
    say(f"\nIn {folder}:")
    say("   accuracy.png   accuracy per way of training and per corruption, a dot per seed")
    say("   examples.png   clean, noisy and adversarial images, and what was added to them")
    say(
        "   report.md      the tables and the verdict, with every corruption; "
        "report.json: the numbers"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="the short version: under 2 minutes")
    parser.add_argument("--pipeline", choices=tuple(BACK_ENDS), default="ffcv")
    args = parser.parse_args(argv)
    survive()
    torch.set_num_threads(1)  # ours, too, shall be one thread beside another process
    size = FULL
    folder = RUNS / f"demo_{args.pipeline}"
    if args.fast:
        size = FAST
        folder = RUNS / f"demo_{args.pipeline}_fast"
    introduce(size, args.fast)
    try:
        with stopping():
            files = fetch(folder, size)
        demo = Demo(size, args.pipeline, folder, files)
        same_settings(folder, asdict(size) | {"eps_255": EPS_255}, files)
        # One thread each: at this size that is faster than one run after the other. A GPU is not
        # shared.
        workers = 1 if GPU else min(MOST_WORKERS, usable_cores())
        found = measured_cost(demo)
        train_all(demo, workers, found.seconds_per_step)
        tell(demo, found, evaluate_all(demo, workers), args.fast)
    except KeyboardInterrupt:
        raise SystemExit(
            "\nstopped; what is finished is kept, and the same command goes on from here"
        ) from None


if __name__ == "__main__":
    main()
