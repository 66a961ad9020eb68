"""Does it work? Arms trained on CIFAR-10 by `fap-train`, evaluated by `fap-eval`, compared in one
table and one plot.

`python -m bench.study study --size small|full` runs every arm over several seeds; finished runs are
kept, so an interrupted study goes on where it stopped. The short, explained version is
`bench.demo`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.figure
import numpy as np
from scipy import stats

from bench.commands import fap, stopping
from bench.common import ROOT, write_json
from fap.cli.output import survive
from pipelines import open_store
from pipelines.corrupt import NAMES
from pipelines.machine import usable_cores

RUNS = ROOT / "runs"
RESULTS = ROOT / "bench" / "results"


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
    "small": Size(
        ("vanilla", "noise", "advprop_pgd1", "fast_advprop"), 3, "cifar_resnet8", 8_000, 1_000, 15, (9, 13), 128, 2, NAMES
    ),
    "full": Size(
        ("vanilla", "noise", "fast_advprop", *(f"fast_advprop_{k}" for k in ("no_shuffle", "mean", "pipelined"))), 5,
        "cifar_resnet18", 50_000, 10_000, 30, (15, 24, 28), 256, 1, ("all",),
    ),
}  # fmt: skip


def convert(split: str, count: int, log: Path | None = None) -> Path:
    """The first `count` images of CIFAR-10 as `.beton`, made once; what fap-convert says goes to
    `log`, if given.
    """
    file = ROOT / "data" / f"cifar10_{split}_{count}.beton"
    if not file.exists():
        fap("convert", "cifar10", str(file), "--split", split, "--limit", str(count), log=log)
    return file


Files = dict[str, Path]  # the `.beton` of train and test


def train(arm: str, seed: int, size: Size, files: Files, runs: Path, pipeline: str) -> Path:
    """One run, or what is left of it. Returns its folder."""
    folder = runs / arm / f"seed{seed}"
    if (folder / "result.json").exists():
        print(f"{arm}, seed {seed}: already trained, in {folder}", flush=True)
        return folder
    words = [
        f"configs/cifar10/{arm}.yaml", f"name={arm}", f"model.name={size.model}", "model.num_classes=10",
        f"optim.clean_batch={size.clean_batch}", f"budget.epochs={size.epochs}",
        f"budget.milestones={list(size.milestones)}", f"seed={seed}", "resume=auto",
        f"data.train={files['train']}", f"data.val={files['test']}",
        f"run.dir={runs}", "--pipeline", pipeline,
    ]  # fmt: skip
    threads, log = None, None
    if size.workers > 1:
        threads = 1
        decoding = max(1, usable_cores() // size.workers)
        words += [
            "run.torch_threads=1",
            f"data.threads={decoding}",
            f"run.eval_every={size.epochs}",
        ]
        log = folder.parent / f"seed{seed}.log"
    print(f"\n{arm}, seed {seed}: training" + (f", see {log}" if log else ""), flush=True)
    fap("train", *words, log=log, threads=threads)
    return folder


def same_settings(runs: Path, settings: Mapping[str, Any], files: Files) -> None:
    """Note in `runs` what its runs are made with, the content of the data included. SystemExit
    where that was other.
    """
    content = {}
    for split, file in files.items():
        with closing(open_store(file)) as store:
            content[split] = store.identity()
    now = json.dumps({**settings, "data": content}, indent=1)
    note = runs / "settings.json"
    if note.exists() and note.read_text() != now:
        raise SystemExit(
            f"{runs} holds runs with other settings or other data, see {note}; move it away to"
            " start anew"
        )
    runs.mkdir(parents=True, exist_ok=True)
    note.write_text(now)


def last_checkpoint(folder: Path) -> Path:
    """Of a run that has one."""
    return sorted((folder / "checkpoints").glob("step_*.safetensors"))[-1]


def evaluated(
    folders: list[Path], size: Size, files: Files, runs: Path, pipeline: str
) -> list[dict[str, Any]]:
    """Summaries of the runs, with fap-eval's report on each one's last checkpoint."""
    last = [str(last_checkpoint(f)) for f in folders]
    words = ["--data", str(files["test"]), "--pipeline", pipeline, "--out", str(runs / "eval")]
    fap("eval", *last, *words, "--corrupt", *size.corrupt)
    reports = json.loads((runs / "eval" / "report.json").read_text())
    return [summary(folder, report) for folder, report in zip(folders, reports, strict=True)]


def summary(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """One run in numbers, accuracies in percent; `corruptions`, by name, are means over the
    severities.
    """
    result = json.loads((folder / "result.json").read_text())
    epochs = [
        r
        for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if "epoch_acc_clean" in r
    ]
    by_name: dict[str, list[float]] = {}
    for key, found in report["results"].items():
        if key.startswith("computed/"):
            by_name.setdefault(key.split("/")[1], []).append(100 * found["top1"])
    corruptions = {name: fmean(values) for name, values in by_name.items()}
    return {
        "seed": result["seed"],
        "clean": 100 * report["results"]["clean"]["top1"],
        "corrupted": fmean(corruptions.values()),
        "corruptions": corruptions,
        "train_clean": 100 * epochs[-1]["epoch_acc_clean"],
        "train_adv": 100 * epochs[-1]["epoch_acc_adv"] if "epoch_acc_adv" in epochs[-1] else None,
        "steps": result["steps"],
        "image_passes": result["image_passes"],
        "seconds": result["seconds"],
    }


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: mean +- std per arm, differences to vanilla paired by seed with 95% confidence
    intervals.

    Cost is compared by image passes. Seconds are those of a clock on the wall: runs that shared the
    machine with different neighbours cannot be compared by them.
    """
    head = ["arm", "n", "clean %", "corrupted %", "clean - vanilla", "corrupted - vanilla", "train adv / clean %",
            "image passes", "image passes / vanilla", "seconds"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]

    def column(arm: str, key: str) -> np.ndarray:
        return np.array([run[key] for run in rows[arm]], dtype=float)

    for arm, runs in rows.items():
        cells = [arm, str(len(runs)), *(mean_std(column(arm, k)) for k in ("clean", "corrupted"))]
        cells += [
            "" if arm == "vanilla" else interval(column(arm, k) - column("vanilla", k))
            for k in ("clean", "corrupted")
        ]
        adv, clean = column(arm, "train_adv"), column(arm, "train_clean")
        cells += ["" if np.isnan(adv).any() else f"{adv.mean():.1f} / {clean.mean():.1f}"]
        passes = runs[0]["image_passes"]
        cells += [f"{passes:,}", f"{passes / rows['vanilla'][0]['image_passes']:.3f}"]
        cells += [f"{np.median(column(arm, 'seconds')):.0f}"]
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


def bars(axes: Any, groups: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """`groups`: by label, by arm, one value per seed. A bar is their mean, a dot one seed."""
    arms = list(next(iter(groups.values())))
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        at = np.arange(len(groups)) + (i + 0.5) * width
        values = np.array([group[arm] for group in groups.values()])  # (groups, seeds)
        axes.bar(at, values.mean(1), width, label=arm, color=f"C{i}", alpha=0.6)
        axes.plot(at, values, ".", color="black", markersize=4)
    axes.set_xticks(np.arange(len(groups)) + 0.4, list(groups))
    axes.set_ylabel("percent right")
    axes.set_ylim(bottom=0)


def plot(rows: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Accuracy on clean and on corrupted test images; what each corruption does is in fap-eval's
    plot.
    """
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    bars(
        axes,
        {
            k: {arm: [run[k] for run in runs] for arm, runs in rows.items()}
            for k in ("clean", "corrupted")
        },
    )
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("study",))
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--pipeline", choices=("ffcv", "dali", "reference"), default="ffcv")
    args = parser.parse_args()
    survive()
    size, runs = SIZES[args.size], RUNS / f"study_{args.size}"
    files = {"train": convert("train", size.images), "test": convert("test", size.test)}
    settings = {
        k: v for k, v in asdict(size).items() if k not in ("arms", "seeds", "workers", "corrupt")
    }
    same_settings(runs, settings, files)
    with (
        ThreadPoolExecutor(size.workers) as pool,
        stopping(),
    ):  # of the first seed all arms, then of the next
        order = [(arm, seed) for seed in range(size.seeds) for arm in size.arms]
        jobs = [
            pool.submit(train, arm, seed, size, files, runs, args.pipeline) for arm, seed in order
        ]
        folders = [job.result() for job in jobs]
    found = evaluated(folders, size, files, runs, args.pipeline)
    rows = {arm: found[i :: len(size.arms)] for i, arm in enumerate(size.arms)}
    out = RESULTS / f"study_{args.size}"
    text = report(rows, size, out)
    print(f"\n{text}\n\nplot: {out}.png")


if __name__ == "__main__":
    main()
