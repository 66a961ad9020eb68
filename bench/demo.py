"""`make demo`: what Fast AdvProp costs and what it does, on real images, in minutes and without a
GPU.

    make demo [FAST=1] [PIPELINE=ffcv|dali|reference]

An interrupted demo goes on where it stopped. `bench.demo_measure` measures, `bench.demo_words`
judges, `bench.demo_figures` draws.
"""

import argparse
import json
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import demo_figures, demo_words
from bench.commands import fap, stopping
from bench.common import write_json
from bench.demo_measure import ATTACK_STEPS, STEP_255, adversarial_accuracy, cost, examples
from bench.demo_words import BASE, EQUAL_COST, EQUAL_STEPS, LABELS, Cost
from bench.step import GPU
from bench.study import RUNS, Files, convert, last_checkpoint, same_settings, summary
from fap.budget import Budget, budget
from fap.cli.output import survive
from fap.config import Config, load_config
from pipelines.corrupt import NAMES, QUICK
from pipelines.machine import usable_cores

MODEL = "cifar_resnet8"
CLEAN_BATCH = 64
ROWS = 80  # that Fast AdvProp reads per step: the clean ones and 1/5 for the attack
PASSES = 96  # image passes of its step: 64 clean, 16 noisy, 16 adversarial
GROUP = 32  # two main batch-norm groups per step, so that both passes of a step are equally large
EPS_255 = 4
CONFIGS = {
    BASE: "vanilla",
    EQUAL_COST: "fast_advprop",
    EQUAL_STEPS: "fast_advprop",
}  # of configs/cifar10
SAY_EVERY_S = 30
WIDTH = 110  # of what is said, in characters
INTRODUCTION = """
Fast AdvProp trains an image classifier on clean images and on adversarial ones: images changed by a few grey levels so
that the network errs. The network keeps a second set of batch norms for these. The cost is meant to be that of plain
("vanilla") training: the gradient that makes an image adversarial trains the network too, and there are fewer steps.

This demo trains the same small network several times in different ways: vanilla; Fast AdvProp for as many image passes
(one image through the network and back), hence at equal cost; Fast AdvProp for as many optimiser steps, which costs half
as much again. Then it compares them on clean, corrupted and adversarial test images.
"""


@dataclass(frozen=True)
class Size:
    """`epochs` must give every arm whole ones, see `Demo.share`: then equal cost is equal to the
    image pass.
    """

    images: int
    test: int
    attacked: int  # test images
    seeds: int
    epochs: int  # of vanilla training
    milestones: tuple[int, ...]  # likewise
    arms: tuple[str, ...]
    corrupt: tuple[str, ...]  # at severity 3
    rounds: int  # of the measurement of cost


FULL = Size(500, 2_000, 2_000, 3, 234, (146, 214), (BASE, EQUAL_COST, EQUAL_STEPS), NAMES, 20)
FAST = Size(500, 1_000, 500, 2, 36, (22, 32), (BASE, EQUAL_COST), QUICK, 8)


@dataclass(frozen=True)
class Demo:
    """What every part of one demo needs."""

    size: Size
    pipeline: str
    folder: Path
    files: Files

    def words(self, arm: str, seed: int) -> list[str]:
        """fap-train's words for one run."""
        share = self.share(arm)
        epochs = share * self.size.epochs
        assert epochs.denominator == 1, f"{arm}: {epochs} epochs"
        milestones = [int(share * m) for m in self.size.milestones]
        # same_budget would divide the epochs by 1.2 and forget the rows that are left over at the
        # end of each: 500 images are 7 batches of 64 and 6 of 80, and Fast AdvProp would get 7%
        # more image passes than vanilla.
        words = [] if arm == BASE else [f"method.eps_255={EPS_255}", "budget.same_budget=false"]
        return [
            *words, f"name={arm}", f"seed={seed}", f"model.name={MODEL}", "model.num_classes=10",
            f"method.group_rows={GROUP}", f"optim.clean_batch={CLEAN_BATCH}", f"budget.epochs={epochs}",
            f"budget.milestones={milestones}", f"data.train={self.files['train']}",
            f"data.val={self.files['test']}", f"data.pipeline={self.pipeline}", "data.threads=1", f"run.dir={self.folder}",
            f"run.eval_every={epochs}", "run.torch_threads=1", "resume=auto",
        ]  # fmt: skip

    def share(self, arm: str) -> Fraction:
        """Epochs of an arm per epoch of vanilla training."""
        steps = self.size.images // CLEAN_BATCH
        our_steps = self.size.images // ROWS
        shares = {
            BASE: Fraction(1),
            EQUAL_COST: Fraction(steps * CLEAN_BATCH, our_steps * PASSES),
            EQUAL_STEPS: Fraction(steps, our_steps),
        }
        return shares[arm]

    def config(self, arm: str, seed: int = 0) -> Config:
        return load_config(f"configs/cifar10/{CONFIGS[arm]}.yaml", self.words(arm, seed))

    def budget(self, arm: str) -> Budget:
        return budget(self.config(arm), self.size.images)

    def run_folder(self, arm: str, seed: int) -> Path:
        return self.folder / arm / f"seed{seed}"

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Of the first seed all arms, then of the next."""
        return [(arm, seed) for seed in range(self.size.seeds) for arm in self.size.arms]


def say(text: str = "") -> None:
    """Lines of text, each wrapped to WIDTH."""
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip(" -")))
        print(textwrap.fill(line, WIDTH, subsequent_indent=indent), flush=True)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"


def introduce(size: Size, fast: bool) -> None:
    print(INTRODUCTION)
    say(
        f"Here: {size.images} training and {size.test:,} test images of CIFAR-10, a ResNet-8,"
        f" {size.seeds} seeds, adversarial images within {EPS_255} of 255 grey levels. So few"
        " images can be learnt by heart, as ImageNet can by a large network: then more steps on"
        " clean images help little, and Fast AdvProp has a chance."
    )
    if fast:
        say(
            "This is the short version (FAST=1): no arm of equal steps, 4 corruptions instead of"
            " 19, and a training that is far too short to judge by. `make demo` is the whole one."
        )


def fetch(folder: Path, size: Size) -> Files:
    say(
        "\n1. Data: CIFAR-10, fetched once (140-170 MB) and converted to the file that training"
        " reads"
    )
    log = folder / "logs" / "data.log"
    return {"train": convert("train", size.images, log), "test": convert("test", size.test, log)}


def measured_cost(demo: Demo) -> Cost:
    """Measured before the training, while nothing else of ours runs."""
    say("\n2. Cost: training steps of vanilla and Fast AdvProp in turns, in one process")
    configs = {arm: demo.config(arm) for arm in (BASE, EQUAL_COST)}
    found = cost(configs, demo.size.images, demo.size.rounds, block=3)
    say(
        f"   a Fast AdvProp run takes {found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}] times"
        " as long as a vanilla run"
    )
    return found


# ------------------------------------------------------------------ training


def train(demo: Demo, arm: str, seed: int) -> None:
    """One run, or what is left of it."""
    folder = demo.run_folder(arm, seed)
    if (folder / "result.json").exists():
        return
    whole = not (folder / "checkpoints").exists()
    log = demo.folder / "logs" / f"{arm}-seed{seed}.log"
    words = [f"configs/cifar10/{CONFIGS[arm]}.yaml", *demo.words(arm, seed)]
    seconds = fap("train", *words, log=log, threads=1)
    if whole:  # not the rest of an interrupted run
        (folder / "cpu_seconds.json").write_text(json.dumps(seconds))


def passes_done(demo: Demo, arm: str, seed: int) -> float:
    """Image passes of a run so far, as far as it has said."""
    b, record = demo.budget(arm), demo.run_folder(arm, seed) / "metrics.jsonl"
    if (record.parent / "result.json").exists():
        return b.image_passes
    try:
        last = record.read_text().splitlines()[-1]
        return json.loads(last)["step"] * b.image_passes_per_step
    except (OSError, ValueError, LookupError):  # not begun, or a line half written
        return 0


def train_all(demo: Demo, workers: int, seconds_per_step: Mapping[str, float]) -> None:
    runs = demo.runs
    total = sum(demo.budget(arm).image_passes for arm, _ in runs)
    todo = [run for run in runs if not (demo.run_folder(*run) / "result.json").exists()]
    say(
        f"\n3. Training: {len(runs)} runs ({', '.join(LABELS[arm] for arm in demo.size.arms)}),"
        f" {workers} at a time"
    )
    if len(todo) < len(runs):
        say(f"   {len(runs) - len(todo)} are there from an earlier demo, in {demo.folder}")
    left = (
        sum(demo.budget(a).steps * seconds_per_step[demo.config(a).method.name] for a, _ in todo)
        / workers
    )
    if todo:
        say(f"   about {minutes(left * 1.2)}; what each run says is in {demo.folder / 'logs'}")
    began, at_first = time.monotonic(), sum(passes_done(demo, *run) for run in runs)

    def progress() -> str:
        done = sum(passes_done(demo, *run) for run in runs)
        finished = sum((demo.run_folder(*run) / "result.json").exists() for run in runs)
        line = f"   {finished} of {len(runs)} runs finished, {done / total:.0%} of the image passes"
        if at_first < done < total:
            rest = (time.monotonic() - began) * (total - done) / (done - at_first)
            line += f", about {minutes(rest)} left"
        return line

    in_parallel([partial(train, demo, *run) for run in todo], workers, progress)


def in_parallel(
    calls: Iterable[Callable[[], Any]], workers: int, progress: Callable[[], str]
) -> None:
    """Make the calls, saying a line of progress now and then. The first failure ends them all."""
    with ThreadPoolExecutor(workers) as pool, stopping():
        jobs: list[Future[Any]] = [pool.submit(call) for call in calls]
        pending = set(jobs)
        try:
            while pending:
                done, pending = wait(pending, timeout=SAY_EVERY_S, return_when="FIRST_EXCEPTION")
                for job in done:
                    job.result()
                if pending:
                    say(progress())
        finally:
            for job in jobs:
                job.cancel()


# ------------------------------------------------------------------ evaluation


def evaluate_all(demo: Demo, workers: int) -> dict[str, list[dict[str, Any]]]:
    """By arm, a summary per seed. fap-eval runs beside our own attack."""
    size = demo.size
    say(f"\n4. Evaluation of {len(demo.runs)} networks")
    say(
        f"   {size.test:,} clean test images; the same under {len(size.corrupt)} corruptions,"
        f" severity 3 of 5; {size.attacked:,} under attack (PGD: {ATTACK_STEPS} steps of"
        f" {STEP_255:g} grey level, at most {EPS_255} in all)"
    )
    out = demo.folder / "eval"
    out.mkdir(exist_ok=True)
    checkpoints = {run: last_checkpoint(demo.run_folder(*run)) for run in demo.runs}
    under_attack = {
        (arm, seed): out / f"adversarial-{arm}-seed{seed}.json" for arm, seed in demo.runs
    }
    threads = max(1, workers // 2)  # of either kind of evaluation

    def corrupt_all() -> None:
        words = ["--data", str(demo.files["test"]), "--pipeline", demo.pipeline, "--out", str(out)]
        words += ["--keep", str(demo.folder / "sets"), "--corrupt", *size.corrupt]
        fap(
            "eval",
            *map(str, checkpoints.values()),
            *words,
            log=demo.folder / "logs" / "eval.log",
            threads=threads,
        )

    def attack(run: tuple[str, int]) -> None:
        found = adversarial_accuracy(checkpoints[run], demo.files["test"], size.attacked, EPS_255)
        under_attack[run].write_text(json.dumps(found))

    began = time.monotonic()

    def progress() -> str:
        attacked = sum(file.exists() for file in under_attack.values())
        measured = len(
            list((out / "results").glob("*.json"))
        )  # fap-eval's, one for each network and set of images
        sets = len(checkpoints) * (1 + len(size.corrupt))
        return (
            f"   {attacked} of {len(checkpoints)} networks attacked, {measured} of {sets}"
            f" accuracies measured; {minutes(time.monotonic() - began)} so far"
        )

    attacks = [partial(attack, run) for run, file in under_attack.items() if not file.exists()]
    in_parallel([corrupt_all, *attacks], 1 + threads, progress)
    reports = json.loads((out / "report.json").read_text())
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in size.arms}
    for (arm, seed), report in zip(checkpoints, reports, strict=True):
        folder = demo.run_folder(arm, seed)
        run = summary(folder, report)
        run["adversarial"] = json.loads(under_attack[arm, seed].read_text())
        seconds = folder / "cpu_seconds.json"
        run["cpu_seconds"] = json.loads(seconds.read_text()) if seconds.exists() else None
        rows[arm].append(run)
    return rows


# ------------------------------------------------------------------ the end


def tell(demo: Demo, cost_found: Cost, rows: dict[str, list[dict[str, Any]]], fast: bool) -> None:
    """Figures, report.md and report.json; table and verdict on the screen."""
    folder = demo.folder
    paper = {
        arm: load_config(f"configs/imagenet/{CONFIGS[arm]}.yaml").paper
        for arm in (BASE, EQUAL_COST)
    }
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
    write_json(
        folder / "report.json",
        {"size": asdict(demo.size), "cost": asdict(cost_found), "runs": rows},
    )
    say("\n5. Result\n")
    print("\n\n".join(tables))
    say("\nVerdict\n" + "\n".join(verdict))
    say(f"\nIn {folder}:")
    say("   accuracy.png   accuracy per way of training and per corruption, a dot per seed")
    say("   examples.png   clean, noisy and adversarial images, and what was added to them")
    say(
        "   report.md      the tables and the verdict, with every corruption; report.json: the"
        " numbers"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="the short version: under 2 minutes")
    parser.add_argument("--pipeline", choices=("ffcv", "dali", "reference"), default="ffcv")
    args = parser.parse_args(argv)
    survive()
    size = FAST if args.fast else FULL
    torch.set_num_threads(1)  # ours, too, shall be one thread beside another process
    folder = RUNS / f"demo_{args.pipeline}{'_fast' * args.fast}"
    introduce(size, args.fast)
    try:
        with stopping():
            files = fetch(folder, size)
        demo = Demo(size, args.pipeline, folder, files)
        same_settings(folder, asdict(size) | {"eps_255": EPS_255}, files)
        # One thread each: at this size that is faster than one run after the other. A GPU is not
        # shared.
        workers = 1 if GPU else min(4, usable_cores())
        found = measured_cost(demo)
        train_all(demo, workers, found.seconds_per_step)
        tell(demo, found, evaluate_all(demo, workers), args.fast)
    except KeyboardInterrupt:
        raise SystemExit(
            "\nstopped; what is finished is kept, and the same command goes on from here"
        ) from None


if __name__ == "__main__":
    main()
