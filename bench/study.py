"""Does it work? Arms trained on CIFAR-10 by `fap-train`, evaluated by `fap-eval`, compared in one table and one plot.

`python -m bench.study demo` is the short version: vanilla and Fast AdvProp, one seed. `study --size small|full` runs
every arm over several seeds; finished runs are kept, so an interrupted study goes on where it stopped.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from scipy import stats

from bench.common import ROOT, write_json
from pipelines.corrupt import NAMES

ARMS = {  # name -> config of configs/cifar10
    "vanilla": "vanilla",
    "noise": "noise",
    "advprop": "advprop_pgd1",
    "fast_advprop": "fast_advprop",
    "no_shuffle": "fast_advprop_no_shuffle",
    "mean": "fast_advprop_mean",
    "pipelined": "fast_advprop_pipelined",
}
RUNS = ROOT / "runs"


@dataclass(frozen=True)
class Size:
    arms: tuple[str, ...]
    seeds: int
    model: str
    images: int
    test: int
    epochs: int  # of vanilla training; every arm spends the same image passes
    milestones: tuple[int, ...]
    clean_batch: int
    workers: int
    """Runs side by side; with more than one, each gets one thread."""
    corrupt: tuple[str, ...]  # --corrupt of fap-eval


SIZES = {
    "demo": Size(("vanilla", "fast_advprop"), 1, "cifar_resnet8", 10_000, 2_000, 12, (7, 10), 128, 1, ()),
    "small": Size(
        ("vanilla", "noise", "advprop", "fast_advprop"), 3, "cifar_resnet8", 8_000, 1_000, 15, (9, 13), 128, 2, NAMES
    ),
    "full": Size(
        ("vanilla", "noise", "fast_advprop", "no_shuffle", "mean", "pipelined"), 5, "cifar_resnet18", 50_000, 10_000, 30,
        (15, 24, 28), 256, 1, ("all",),
    ),
}  # fmt: skip


def command(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"fap.cli.{module}", *words]


def convert(size: Size, split: str, count: int) -> Path:
    """The first `count` images of CIFAR-10 as `.beton`, made once."""
    file = ROOT / "data" / f"cifar10_{split}_{count}.beton"
    if not file.exists():
        subprocess.run(command("convert", "cifar10", str(file), "--split", split, "--limit", str(count)), check=True, cwd=ROOT)
    return file


def train(arm: str, seed: int, size: Size, runs: Path, pipeline: str) -> Path:
    """One run, or what is left of it. Returns its folder."""
    folder = runs / ARMS[arm] / f"seed{seed}"
    words = [
        f"configs/cifar10/{ARMS[arm]}.yaml", f"model.name={size.model}", f"optim.clean_batch={size.clean_batch}",
        f"budget.epochs={size.epochs}", f"budget.milestones={list(size.milestones)}", f"seed={seed}", "resume=auto",
        f"data.train={convert(size, 'train', size.images)}", f"data.val={convert(size, 'test', size.test)}",
        f"run.dir={runs}", "--pipeline", pipeline,
    ]  # fmt: skip
    if (folder / "result.json").exists():
        print(f"{arm}, seed {seed}: already trained, in {folder}", flush=True)
        return folder
    alone, log = None, None
    if size.workers > 1:
        folder.mkdir(parents=True, exist_ok=True)
        alone = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        words += ["run.torch_threads=1", "data.threads=1", f"run.eval_every={size.epochs}"]
        log = open(folder.parent / f"seed{seed}.log", "w")  # noqa: SIM115
    print(f"\n{arm}, seed {seed}: training" + (f", see {log.name}" if log else ""), flush=True)
    subprocess.run(command("train", *words), check=True, cwd=ROOT, env=alone, stdout=log, stderr=log)
    return folder


def evaluated(folders: list[Path], size: Size, runs: Path, pipeline: str) -> list[dict[str, Any]]:
    """Clean and corrupted accuracy of every run's last checkpoint: fap-eval's report."""
    last = [str(sorted((f / "checkpoints").glob("step_*.safetensors"))[-1]) for f in folders]
    words = ["--data", str(convert(size, "test", size.test)), "--pipeline", pipeline, "--out", str(runs / "eval")]
    subprocess.run(command("eval", *last, *words, "--corrupt", *size.corrupt), check=True, cwd=ROOT)
    return json.loads((runs / "eval" / "report.json").read_text())


def summary(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """One run in numbers; accuracies in percent."""
    result = json.loads((folder / "result.json").read_text())
    corrupted = [v["top1"] for k, v in report["results"].items() if k.startswith("computed/")]
    last = [r for r in records(folder) if "epoch_acc_clean" in r][-1]
    return {
        "clean": 100 * report["results"]["clean"]["top1"],
        "corrupted": 100 * float(np.mean(corrupted)),
        "train_clean": 100 * last["epoch_acc_clean"],
        "train_adv": 100 * last["epoch_acc_adv"] if "epoch_acc_adv" in last else None,
        "image_passes": result["image_passes"],
        "seconds": result["seconds"],
    }


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: mean +- std per arm, differences to vanilla paired by seed with 95% confidence intervals."""
    head = ["arm", "n", "clean %", "corrupted %", "clean - vanilla", "corrupted - vanilla", "train adv / clean %",
            "image passes", "seconds", "seconds / vanilla"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for arm, runs in rows.items():
        columns = {key: np.array([r[key] for r in runs], dtype=float) for key in runs[0]}
        base = {key: np.array([r[key] for r in rows["vanilla"]], dtype=float) for key in runs[0]}
        cells = [arm, str(len(runs)), *(mean_std(columns[k]) for k in ("clean", "corrupted"))]
        cells += ["" if arm == "vanilla" else interval(columns[k] - base[k]) for k in ("clean", "corrupted")]
        adv, clean = columns["train_adv"].mean(), columns["train_clean"].mean()
        cells += ["" if np.isnan(adv) else f"{adv:.1f} / {clean:.1f}", f"{runs[0]['image_passes']:,}"]
        cells += [f"{np.median(columns['seconds']):.0f}", f"{np.median(columns['seconds'] / base['seconds']):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_std(values: np.ndarray) -> str:
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def interval(differences: np.ndarray) -> str:
    """Mean and 95% interval of the paired t-test."""
    mean = differences.mean()
    if len(differences) < 2:
        return f"{mean:+.2f}"
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def plot(folders: dict[str, list[Path]], rows: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Training accuracy of clean rows (seed 0) against image passes; final accuracies are in the table and fap-eval's plot."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="image passes", ylabel="training accuracy of clean rows, %")
    for arm, runs in folders.items():
        per_step = rows[arm][0]["image_passes"] / json.loads((runs[0] / "result.json").read_text())["steps"]
        points = [(r["step"] * per_step, 100 * r["epoch_acc_clean"]) for r in records(runs[0]) if "epoch_acc_clean" in r]
        axes.plot(*zip(*points, strict=True), label=arm)
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("demo", "study"))
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--pipeline", choices=("ffcv", "dali", "reference"), default="ffcv")
    args = parser.parse_args()
    name = "demo" if args.what == "demo" else args.size
    size = SIZES[name]
    runs = RUNS / (f"demo_{args.pipeline}" if name == "demo" else f"study_{name}")
    seeds = range(size.seeds)
    try:
        for split, count in (("train", size.images), ("test", size.test)):
            convert(size, split, count)
        with ThreadPoolExecutor(size.workers) as pool:
            jobs = {(a, s): pool.submit(train, a, s, size, runs, args.pipeline) for s in seeds for a in size.arms}
            folders = {arm: [jobs[arm, seed].result() for seed in seeds] for arm in size.arms}
        reports = iter(evaluated([f for fs in folders.values() for f in fs], size, runs, args.pipeline))
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"study: '{' '.join(error.cmd[2:4])}' ended with exit code {error.returncode}; its message is above or in {runs}"
        )
    rows = {arm: [summary(f, next(reports)) for f in folders[arm]] for arm in size.arms}
    text = table(rows)
    out = runs if name == "demo" else ROOT / "bench" / "results"
    plot(folders, rows, out / f"study_{name}.png")
    write_json(out / f"study_{name}.json", {"size": size.__dict__, "runs": rows})
    (out / f"study_{name}.md").write_text(text + "\n")
    print(f"\n{text}\n\nplot: {out / f'study_{name}.png'}")


if __name__ == "__main__":
    main()
