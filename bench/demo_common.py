"""What both demos share: the runs in a demo's folder, runs side by side, what is said.

A library of `bench.demo` and `bench.demo_detection`.
"""

import json
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

from bench.cifar import Files
from bench.commands import fap, stopping
from bench.common import ROOT
from pipelines import open_store

RUNS = ROOT / "runs"
MOST_WORKERS = 4  # runs side by side
SAY_EVERY_S = 30
WIDTH = 110  # of what is said, in characters
LONGEST_IN_SECONDS = 100  # a longer time is said in minutes


# ------------------------------------------------------------------ runs


class RunsInAFolder(ABC):
    """A run for each arm (a way of training) and seed, trained once.

    A demo inherits from it and says in `command` what an arm means.
    """

    folder: Path

    @abstractmethod
    def command(self, arm: str, seed: int) -> list[str]:
        """fap-train's words for one run, which puts itself into `run_folder`."""

    def run_folder(self, arm: str, seed: int) -> Path:
        return self.folder / arm / f"seed{seed}"

    def finished(self, arm: str, seed: int) -> bool:
        return (self.run_folder(arm, seed) / "result.json").exists()

    def log(self, name: str) -> Path:
        """Where a command says what it does."""
        return self.folder / "logs" / f"{name}.log"

    def train(self, arm: str, seed: int) -> None:
        """One run, or what is left of it."""
        if self.finished(arm, seed):
            return
        folder = self.run_folder(arm, seed)
        resumed = (folder / "checkpoints").exists()
        log = self.log(f"{arm}-seed{seed}")
        seconds = fap("train", *self.command(arm, seed), log=log, threads=1)
        if not resumed:  # the rest of an interrupted run has the seconds of a rest
            (folder / "cpu_seconds.json").write_text(json.dumps(seconds))


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


def cpu_seconds(run_folder: Path) -> float | None:
    """Of a whole run, start-up included; None if it was interrupted."""
    file = run_folder / "cpu_seconds.json"
    if not file.exists():
        return None
    return json.loads(file.read_text())


def last_epoch(folder: Path) -> dict[str, float]:
    """What a run counted in its last epoch."""
    found: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if any(name.startswith("epoch_acc_") for name in record):
            found = record
    return found


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


# ------------------------------------------------------------------ what is said


def say(text: str = "") -> None:
    """Lines of text, each wrapped to WIDTH."""
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip(" -")))
        print(textwrap.fill(line, WIDTH, subsequent_indent=indent), flush=True)


def minutes(seconds: float) -> str:
    if seconds >= LONGEST_IN_SECONDS:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s"
