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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.figure
import numpy as np
from scipy import stats

from bench.common import ROOT, write_json
from pipelines.corrupt import NAMES
from pipelines.machine import usable_cores

RUNS = ROOT / "runs"


@dataclass(frozen=True)
class Size:
    arms: tuple[str, ...]  # configs of configs/cifar10
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
        ("vanilla", "noise", "advprop_pgd1", "fast_advprop"), 3, "cifar_resnet8", 8_000, 1_000, 15, (9, 13), 128, 2, NAMES
    ),
    "full": Size(
        ("vanilla", "noise", "fast_advprop", *(f"fast_advprop_{k}" for k in ("no_shuffle", "mean", "pipelined"))), 5,
        "cifar_resnet18", 50_000, 10_000, 30, (15, 24, 28), 256, 1, ("all",),
    ),
}  # fmt: skip


def fap(command: str, *words: str, **options: Any) -> None:
    """Run `fap-COMMAND`, with `options` of subprocess.run; if it fails, leave and say so."""
    done = subprocess.run([sys.executable, "-m", f"fap.cli.{command}", *words], cwd=ROOT, **options)
    if done.returncode:
        sys.exit(f"study: 'fap-{command} {words[0]}' ended with exit code {done.returncode}; its message is above or in {RUNS}")


def convert(split: str, count: int) -> Path:
    """The first `count` images of CIFAR-10 as `.beton`, made once."""
    file = ROOT / "data" / f"cifar10_{split}_{count}.beton"
    if not file.exists():
        fap("convert", "cifar10", str(file), "--split", split, "--limit", str(count))
    return file


Files = dict[str, Path]  # the `.beton` of train and test


def train(arm: str, seed: int, size: Size, files: Files, runs: Path, pipeline: str) -> Path:
    """One run, or what is left of it. Returns its folder."""
    folder = runs / arm / f"seed{seed}"
    if (folder / "result.json").exists():
        print(f"{arm}, seed {seed}: already trained, in {folder}", flush=True)
        return folder
    words = [
        f"configs/cifar10/{arm}.yaml", f"model.name={size.model}", f"optim.clean_batch={size.clean_batch}",
        f"budget.epochs={size.epochs}", f"budget.milestones={list(size.milestones)}", f"seed={seed}", "resume=auto",
        f"data.train={files['train']}", f"data.val={files['test']}",
        f"run.dir={runs}", "--pipeline", pipeline,
    ]  # fmt: skip
    alone, log = None, None
    if size.workers > 1:
        alone = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        threads = max(1, usable_cores() // size.workers)
        words += ["run.torch_threads=1", f"data.threads={threads}", f"run.eval_every={size.epochs}"]
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder.parent / f"seed{seed}.log", "w")  # noqa: SIM115
    print(f"\n{arm}, seed {seed}: training" + (f", see {log.name}" if log else ""), flush=True)
    fap("train", *words, env=alone, stdout=log, stderr=log)
    return folder


def evaluated(folders: list[Path], size: Size, files: Files, runs: Path, pipeline: str) -> list[dict[str, Any]]:
    """Summaries of the runs, with fap-eval's report on each one's last checkpoint."""
    last = [str(sorted((f / "checkpoints").glob("step_*.safetensors"))[-1]) for f in folders]
    words = ["--data", str(files["test"]), "--pipeline", pipeline, "--out", str(runs / "eval")]
    fap("eval", *last, *words, "--corrupt", *size.corrupt)
    reports = json.loads((runs / "eval" / "report.json").read_text())
    return [summary(folder, report) for folder, report in zip(folders, reports, strict=True)]


def summary(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """One run in numbers, accuracies in percent; `curve` is that of the clean training rows over image passes."""
    result = json.loads((folder / "result.json").read_text())
    epochs = [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "epoch_acc_clean" in r]
    return {
        "clean": 100 * report["results"]["clean"]["top1"],
        "corrupted": 100 * fmean(v["top1"] for k, v in report["results"].items() if k.startswith("computed/")),
        "train_clean": 100 * epochs[-1]["epoch_acc_clean"],
        "train_adv": 100 * epochs[-1]["epoch_acc_adv"] if "epoch_acc_adv" in epochs[-1] else None,
        "image_passes": result["image_passes"],
        "seconds": result["seconds"],
        "curve": [(r["step"] * result["image_passes"] / result["steps"], 100 * r["epoch_acc_clean"]) for r in epochs],
    }


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: mean +- std per arm, differences to vanilla paired by seed with 95% confidence intervals."""
    head = ["arm", "n", "clean %", "corrupted %", "clean - vanilla", "corrupted - vanilla", "train adv / clean %",
            "image passes", "seconds", "seconds / vanilla"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]

    def column(arm: str, key: str) -> np.ndarray:
        return np.array([run[key] for run in rows[arm]], dtype=float)

    for arm, runs in rows.items():
        cells = [arm, str(len(runs)), *(mean_std(column(arm, k)) for k in ("clean", "corrupted"))]
        cells += ["" if arm == "vanilla" else interval(column(arm, k) - column("vanilla", k)) for k in ("clean", "corrupted")]
        adv, clean, seconds = (column(arm, k) for k in ("train_adv", "train_clean", "seconds"))
        cells += ["" if np.isnan(adv).any() else f"{adv.mean():.1f} / {clean.mean():.1f}", f"{runs[0]['image_passes']:,}"]
        cells += [f"{np.median(seconds):.0f}", f"{np.median(seconds / column('vanilla', 'seconds')):.3f}"]
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


def plot(rows: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Training accuracy of clean rows (seed 0) against image passes; final accuracies are in the table and fap-eval's plot."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="image passes", ylabel="training accuracy of clean rows, %")
    for arm, runs in rows.items():
        axes.plot(*zip(*runs[0]["curve"], strict=True), label=arm)
    axes.legend()
    figure.savefig(file, dpi=120)


def report(rows: dict[str, list[dict[str, Any]]], size: Size, out: Path) -> str:
    """Write OUT.json, .md and .png; returns the table."""
    text = table(rows)
    plot(rows, out.with_suffix(".png"))
    write_json(out.with_suffix(".json"), {"size": asdict(size), "runs": rows})
    out.with_suffix(".md").write_text(text + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("demo", "study"))
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--pipeline", choices=("ffcv", "dali", "reference"), default="ffcv")
    args = parser.parse_args()
    name = "demo" if args.what == "demo" else args.size
    size, runs = SIZES[name], RUNS / (f"demo_{args.pipeline}" if name == "demo" else f"study_{name}")
    files = {"train": convert("train", size.images), "test": convert("test", size.test)}
    with ThreadPoolExecutor(size.workers) as pool:  # of the first seed all arms, then of the next
        order = [(arm, seed) for seed in range(size.seeds) for arm in size.arms]
        jobs = [pool.submit(train, arm, seed, size, files, runs, args.pipeline) for arm, seed in order]
    found = evaluated([job.result() for job in jobs], size, files, runs, args.pipeline)
    rows = {arm: found[i :: len(size.arms)] for i, arm in enumerate(size.arms)}
    out = (runs if name == "demo" else ROOT / "bench" / "results") / f"study_{name}"
    text = report(rows, size, out)
    print(f"\n{text}\n\nplot: {out}.png")


if __name__ == "__main__":
    main()
