"""A study conducted: trained as far as the time goes, measured, reported.

A library of `bench.evidence` and of `bench.gpu.study`.
"""

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bench.commands import Failed, stopping
from bench.evidence.measure import Measure, Row
from bench.evidence.runs import Runs
from bench.evidence.studies import TESTED, Run, Study

TRAINING_SHARE = 0.55  # of the seconds; the rest is for the evaluation of what was trained
MARGIN = 1.1  # a run may take so many times the longest


@dataclass
class Clock:
    """How long a run takes, so that none is begun that would not end in time."""

    seconds: float  # for training
    begun: float = field(default_factory=time.monotonic)
    longest: float = 0.0  # run, in seconds

    def allows_another(self) -> bool:
        return time.monotonic() - self.begun + MARGIN * self.longest < self.seconds


def conduct(
    study: Study, runs: Runs, measure: Measure, seconds: float, known: list[Row]
) -> list[Row]:
    """The rows of all runs: the `known` ones, and what was trained in the seconds and before.

    Raises SystemExit where there are none.
    """
    known_names = {row["run"] for row in known}
    wanted = [run for run in study.runs() if run.name not in known_names]
    train(wanted, runs, Clock(TRAINING_SHARE * seconds))
    finished = [run for run in wanted if runs.finished(run)]
    rows = list(known)
    if finished:
        with stopping():
            rows += measure.rows(finished)
    if not rows:
        raise SystemExit(f"no run was done in {seconds:.0f} s")
    return rows


def train(wanted: Sequence[Run], runs: Runs, clock: Clock) -> None:
    """What is not trained yet, several side by side, as far as the clock allows.

    A run that fails is no other's fault: it is said, and has no row.
    """
    todo = [run for run in wanted if not runs.finished(run)]
    say(f"{len(todo)} runs to train, {len(wanted) - len(todo)} were trained before")

    def one(run: Run) -> None:
        if not clock.allows_another():
            return
        begun = time.monotonic()
        try:
            runs.train_one(run)
        except Failed as error:
            print(f"{run.name}: {error}", file=sys.stderr, flush=True)
            return
        seconds = time.monotonic() - begun
        clock.longest = max(clock.longest, seconds)
        say(f"{run.name}: trained in {seconds:.0f} s")

    with ThreadPoolExecutor(runs.workers) as pool, stopping():
        jobs = [pool.submit(one, run) for run in todo]
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()


def known_rows(file: Path, study: Study) -> list[Row]:
    """The rows of a study that was reported before, on another machine perhaps.

    Only those of this study's regimes and arms, as they are defined now. Raises SystemExit for a
    file whose rows were measured otherwise.
    """
    found = json.loads(file.read_text())
    now = study.tree()
    for name in TESTED:
        was = found["study"][name]
        if was not in (0, now[name]):  # 0: nothing was measured so
            raise SystemExit(
                f"{file}: its rows were measured on {name} = {was} images, "
                f"those of this study on {now[name]}; they cannot be added"
            )

    def is_ours(row: Row) -> bool:
        for what in ("regime", "arm"):
            name = row[what]
            if name not in now[f"{what}s"]:
                return False
            if found["study"][f"{what}s"][name] != now[f"{what}s"][name]:
                return False
        return True

    return [row for row in found["rows"] if is_ours(row)]


def say(line: str) -> None:
    print(line, flush=True)
