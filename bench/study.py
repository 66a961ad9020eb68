"""Does it work? Every method trained on CIFAR-10 over several seeds, and compared.

    python -m bench.study study --size small|full      # make study

`fap-train` trains, `fap-eval` evaluates. Writes bench/results/study_SIZE.json, .md and .png.
Finished runs are kept, so an interrupted study goes on where it stopped. The short, explained
version is `bench.demo`.
"""

import argparse
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.commands import fap, stopping
from bench.common import RESULTS, ROOT
from bench.study_report import report
from fap.cli.output import survive
from pipelines import open_store
from pipelines.back_ends import BACK_ENDS
from pipelines.corrupt import NAMES
from pipelines.machine import usable_cores

RUNS = ROOT / "runs"

Files = dict[str, Path]  # the `.beton` of train and test


@dataclass(frozen=True)
class Size:
    """How much a study trains and measures."""

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
        arms=("vanilla", "noise", "advprop_pgd1", "fast_advprop"),
        seeds=3,
        model="cifar_resnet8",
        images=8_000,
        test=1_000,
        epochs=15,
        milestones=(9, 13),
        clean_batch=128,
        workers=2,
        corrupt=NAMES,
    ),
    "full": Size(
        arms=(
            "vanilla",
            "noise",
            "fast_advprop",
            "fast_advprop_no_shuffle",
            "fast_advprop_mean",
            "fast_advprop_pipelined",
        ),
        seeds=5,
        model="cifar_resnet18",
        images=50_000,
        test=10_000,
        epochs=30,
        milestones=(15, 24, 28),
        clean_batch=256,
        workers=1,
        corrupt=("all",),
    ),
}
NOT_OF_A_RUN = ("arms", "seeds", "workers", "corrupt")  # may differ between studies of one folder


# ------------------------------------------------------------------ runs


def convert(split: str, count: int, log: Path | None = None) -> Path:
    """The first `count` images of CIFAR-10 as `.beton`, made once.

    What fap-convert says goes to `log`, if given.
    """
    file = ROOT / "data" / f"cifar10_{split}_{count}.beton"
    if not file.exists():
        fap("convert", "cifar10", str(file), "--split", split, "--limit", str(count), log=log)
    return file


def train(arm: str, seed: int, size: Size, files: Files, runs: Path, pipeline: str) -> Path:
    """One run, or what is left of it. Returns its folder."""
    folder = runs / arm / f"seed{seed}"
    if (folder / "result.json").exists():
        print(f"{arm}, seed {seed}: already trained, in {folder}", flush=True)
        return folder
    words = [
        f"configs/cifar10/{arm}.yaml",
        f"name={arm}",
        f"model.name={size.model}",
        "model.num_classes=10",
        f"optim.clean_batch={size.clean_batch}",
        f"budget.epochs={size.epochs}",
        f"budget.milestones={list(size.milestones)}",
        f"seed={seed}",
        "resume=auto",
        f"data.train={files['train']}",
        f"data.val={files['test']}",
        f"run.dir={runs}",
        "--pipeline",
        pipeline,
    ]
    threads = None
    log = None
    said = f"\n{arm}, seed {seed}: training"
    if size.workers > 1:
        threads = 1
        decoding = max(1, usable_cores() // size.workers)
        words += ["run.torch_threads=1", f"data.threads={decoding}"]
        words += [f"run.eval_every={size.epochs}"]
        log = folder.parent / f"seed{seed}.log"
        said += f", see {log}"
    print(said, flush=True)
    fap("train", *words, log=log, threads=threads)
    return folder


def same_settings(runs: Path, settings: Mapping[str, Any], files: Files) -> None:
    """Note in `runs` what its runs are made with, the content of the data included.

    Raises SystemExit where that was other.
    """
    content = {}
    for split, file in files.items():
        with closing(open_store(file)) as store:
            content[split] = store.identity()
    now = json.dumps({**settings, "data": content}, indent=1)
    note = runs / "settings.json"
    if note.exists() and note.read_text() != now:
        raise SystemExit(
            f"{runs} holds runs with other settings or other data, see {note}; "
            "move it away to start anew"
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
    last = [str(last_checkpoint(folder)) for folder in folders]
    words = ["--data", str(files["test"]), "--pipeline", pipeline, "--out", str(runs / "eval")]
    fap("eval", *last, *words, "--corrupt", *size.corrupt)
    reports = json.loads((runs / "eval" / "report.json").read_text())
    return [summary(folder, report) for folder, report in zip(folders, reports, strict=True)]


def summary(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """One run in numbers, accuracies in percent.

    `corruptions`, by name, are means over the severities.
    """
    result = json.loads((folder / "result.json").read_text())
    last_epoch: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "epoch_acc_clean" in record:
            last_epoch = record
    by_name: dict[str, list[float]] = {}
    for key, found in report["results"].items():
        if key.startswith("computed/"):
            name = key.split("/")[1]
            by_name.setdefault(name, []).append(100 * found["top1"])
    corruptions = {name: fmean(values) for name, values in by_name.items()}
    train_adv = None  # of a method without adversarial rows
    if "epoch_acc_adv" in last_epoch:
        train_adv = 100 * last_epoch["epoch_acc_adv"]
    return {
        "seed": result["seed"],
        "clean": 100 * report["results"]["clean"]["top1"],
        "corrupted": fmean(corruptions.values()),
        "corruptions": corruptions,
        "train_clean": 100 * last_epoch["epoch_acc_clean"],
        "train_adv": train_adv,
        "steps": result["steps"],
        "image_passes": result["image_passes"],
        "seconds": result["seconds"],
    }


# ------------------------------------------------------------------ the command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("study",))
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--pipeline", choices=tuple(BACK_ENDS), default="ffcv")
    args = parser.parse_args()
    survive()
    size = SIZES[args.size]
    runs = RUNS / f"study_{args.size}"
    files = {"train": convert("train", size.images), "test": convert("test", size.test)}
    settings = {k: v for k, v in asdict(size).items() if k not in NOT_OF_A_RUN}
    same_settings(runs, settings, files)
    jobs = []
    with ThreadPoolExecutor(size.workers) as pool, stopping():
        for seed in range(size.seeds):  # of the first seed all arms, then of the next
            for arm in size.arms:
                jobs.append(pool.submit(train, arm, seed, size, files, runs, args.pipeline))
        folders = [job.result() for job in jobs]
    found = evaluated(folders, size, files, runs, args.pipeline)
    rows = {arm: found[i :: len(size.arms)] for i, arm in enumerate(size.arms)}
    out = RESULTS / f"study_{args.size}"
    text = report(rows, asdict(size), out)
    print(f"\n{text}\n\nplot: {out}.png")


if __name__ == "__main__":
    main()
