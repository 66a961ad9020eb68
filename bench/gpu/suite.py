"""Everything that a GPU machine measures, in order of value, in as much time as it has.

    python -m bench.gpu.suite                         # `make gpu`: all of it, 30 to 60 minutes
    python -m bench.gpu.suite --seconds 540           # what fits; the targets come first
    python -m bench.gpu.suite --only parity/ kernels  # cells whose names hold one of these
    python -m bench.gpu.suite --dry-run               # every part at toy size, on a CPU

The minutes are an estimate. Each cell (`bench.gpu.cells`) is a process with a time limit. After
each one `suite.json` and `table.md` are written anew, so an interruption loses one cell. A cell
that fails says why, and stops nothing.
"""

import argparse
import importlib
import importlib.util
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import RESULTS, ROOT, environment
from bench.gpu.cells import REAL, STUDY_SECONDS, TOY, Cell, cells
from bench.gpu.processes import Process, forked, kill, signals_wait, spawned
from bench.gpu.table import table

GRACE_S = 5  # between SIGTERM and SIGKILL
LOOK_EVERY_S = 0.05
SHOWN_LINES = 4  # of a cell's log
SHOWN_COLUMNS = 220
LONGEST_LINE = 500  # characters of a line in the record
STUDY_SPARE_S = 10  # of its limit, so that the study ends by itself
TOY_PROCESSES = 3  # cells of a dry run at the same time
PRELOADED = (  # for a dry run's forks
    "fap.run.train",
    "pipelines.convert",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)


class Interrupted(BaseException):
    """SIGTERM: leave as Ctrl-C does."""


@dataclass
class Running:
    """A cell whose process runs."""

    cell: Cell
    words: list[str]
    folder: Path
    process: Process
    begun: float
    limit: float
    signals_sent: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def ended(self) -> bool:
        """Also sees to it that the process ends: SIGTERM at the limit, then SIGKILL."""
        if self.process.poll() is not None:
            kill(self.process.pid, signal.SIGKILL)  # what it may have left behind
            return True
        if self.seconds > self.limit + self.signals_sent * GRACE_S:
            number = signal.SIGKILL if self.signals_sent else signal.SIGTERM
            kill(self.process.pid, number)
            self.signals_sent += 1
        return False


class Suite:
    """Runs cells and keeps the record of what they found."""

    def __init__(
        self,
        chosen: Sequence[Cell],
        out: Path,
        seconds: float,
        dry_run: bool,
        folder: Path,  # of the cells' logs and results
    ) -> None:
        self.cells = chosen
        self.out = out
        self.dry_run = dry_run
        self.folder = folder
        self.deadline = time.monotonic() + seconds
        self.begun = 0  # cells
        self.environment = environment()
        self.records: dict[str, dict[str, Any]] = {}  # by cell
        self.running: list[Running] = []

    def run(self) -> int:
        """All cells; returns how many were not measured."""
        waiting = deque(self.cells)
        try:
            while waiting or self.running:
                while waiting and self._may_start(waiting[0]):
                    self._start(waiting.popleft())
                for one in [r for r in self.running if r.ended()]:
                    self.running.remove(one)
                    self._finish(one)
                time.sleep(LOOK_EVERY_S)
        finally:
            for one in self.running:
                kill(one.process.pid, signal.SIGKILL)
            self.write()
        return sum(record["state"] != "measured" for record in self.records.values())

    def content(self) -> dict[str, Any]:
        """What suite.json holds."""
        return {
            "environment": self.environment,
            "dry_run": self.dry_run,
            "cells": [self.records[c.name] for c in self.cells if c.name in self.records],
            "not_reached": [c.name for c in self.cells if c.name not in self.records],
        }

    def tables(self) -> str:
        try:
            return table(self.content())
        except Exception as error:  # the figures are worth more than their table
            return f"the table could not be made of suite.json: {type(error).__name__}: {error}"

    def write(self) -> None:
        """suite.json and table.md, each replaced at once."""
        content = json.dumps(self.content(), indent=1)
        for name, text in (("suite.json", content), ("table.md", self.tables())):
            part = self.out / f"{name}.part"
            try:
                part.write_text(text + "\n")
                part.replace(self.out / name)
            # A full disk costs this record; the next cell may find room again.
            except OSError as error:
                say(f"WARNING: {self.out / name} was not written: {error}")

    # ------------------------------------------------------------------ one cell

    def _may_start(self, cell: Cell) -> bool:
        """Timed cells run alone, those marked `at_once` beside each other.

        At toy size a few of either run at the same time.
        """
        if any(one.cell.at_once != cell.at_once for one in self.running):
            return False
        if self.dry_run:
            return len(self.running) < TOY_PROCESSES
        return cell.at_once or not self.running

    def _start(self, cell: Cell) -> None:
        self.begun += 1
        left = self.deadline - time.monotonic()
        why = why_not(cell, left)
        if why:
            self._record(cell, "not measured", 0.0, why=why)
            return
        limit = min(cell.limit_s, left)
        say(
            f"== {self.begun}/{len(self.cells)} {cell.name} "
            f"(at most {limit:.0f} s, {left:.0f} s left)"
        )
        folder = self.folder / cell.name.replace(" ", "_").replace(":", "").replace(",", "")
        folder.mkdir(parents=True, exist_ok=True)
        for former in folder.glob("*.json"):  # of an earlier suite
            former.unlink()
        study_seconds = str(int(limit) - STUDY_SPARE_S)
        words = [word.replace(STUDY_SECONDS, study_seconds) for word in cell.words]
        if cell.results:
            words += ["--out", str(folder)]
        start = forked if self.dry_run else spawned
        # Whoever stops the suite now, stops this cell too: it is started and noted, or neither.
        with signals_wait():
            process = start(words, folder / "log.txt")
            self.running.append(Running(cell, words, folder, process, time.monotonic(), limit))

    def _finish(self, one: Running) -> None:
        log = (one.folder / "log.txt").read_text(errors="replace")
        lines = [line for line in log.splitlines() if line.strip()] or [""]
        for line in lines[-SHOWN_LINES:]:
            say(f"   {line[:SHOWN_COLUMNS]}")
        last = lines[-1][:LONGEST_LINE]
        found = results_in(one.folder)
        more: dict[str, Any] = {"words": shlex.join(one.words), "last_line": last}
        state = "measured"
        why = self._fault(one, found, last)
        if why:
            state = "failed"
            more["why"] = why
        if found:
            more["found"] = found
        self._record(one.cell, state, one.seconds, **more)

    def _record(self, cell: Cell, state: str, seconds: float, **more: Any) -> None:
        record = {"cell": cell.name, "state": state, "seconds": round(seconds, 1)}
        self.records[cell.name] = record | more
        if state != "measured":
            say(f"-- {cell.name}: {state}: {more['why']}")
        self.write()

    def _fault(self, one: Running, found: dict[str, Any], last: str) -> str:
        """Why the cell counts as not measured; empty if it does not."""
        code = one.process.poll()
        if one.signals_sent:
            return f"ended after {one.limit:.0f} s: {last}"
        if code != 0:
            return f"exit status {code}: {last}"
        for part in found.values():
            for result in part.get("results", []):
                if "error" in result:
                    return str(result["error"])
        if one.cell.results and not any(found.values()):
            return "it measured nothing"
        if one.cell.name == "tests" and not self.dry_run and " passed" not in last:
            return f"no GPU test ran: {last}"
        return ""


def say(text: str) -> None:
    """A line for the user. A reader that went away (`| head`) ends the lines, not the suite."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def results_in(folder: Path) -> dict[str, Any]:
    """The JSON files that a cell wrote, by name; without their `environment`, the suite's own."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text())
        except ValueError:  # the cell was ended while it wrote
            continue
        content.pop("environment", None)
        found[file.stem] = content
    return found


def why_not(cell: Cell, seconds_left: float) -> str:
    """Why a cell cannot be measured here and now; empty if it can."""
    for package in cell.needs:
        if not importable(package):
            return f"{package} is not installed"
    if seconds_left < cell.usual_s:
        return f"{max(0, seconds_left):.0f} s left, it takes about {cell.usual_s} s"
    return ""


def importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


# ------------------------------------------------------------------ the command


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=RESULTS / "gpu")
    made.add_argument("--seconds", type=float, default=7200.0, help="in all; default: %(default)s")
    made.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="cells whose names hold one of these",
    )
    made.add_argument("--skip", nargs="+", default=[], metavar="WORD", help="cells to leave out")
    made.add_argument("--images", type=Path, help="folder of the loaders' JPEGs; made if missing")
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="every part at toy size, on a CPU; figures mean nothing",
    )
    made.add_argument(
        "--list", action="store_true", help="print the cells and their commands, run nothing"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser()
    a = options.parse_args(argv)
    if a.dry_run:
        # Before torch is imported: cells are forks, which must find neither CUDA nor threads in
        # use.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        sizes = REAL
        logs = a.out / "cells"
        data = ROOT / "data"
        if a.dry_run:
            sizes = TOY
            logs = data = Path(scratch)
        images = a.images or data / "bench_jpegs"
        every = cells(sizes, images)
        if a.dry_run:  # the longest first: then the dry run is over soonest
            every.sort(key=is_not_the_study)
        chosen = [cell for cell in every if wanted(cell, a.only, a.skip)]
        if a.list:
            for cell in chosen:
                print(f"{cell.name:45s} <= {cell.limit_s:4d} s  python -m {shlex.join(cell.words)}")
            return 0
        if not chosen:
            words = " ".join(a.only)
            options.error(f"--only {words}: no cell has such a name; --list shows them")
        return measure(chosen, a, logs)


def wanted(cell: Cell, only: Sequence[str], skip: Sequence[str]) -> bool:
    if any(word in cell.name for word in skip):
        return False
    return any(word in cell.name for word in only)


def is_not_the_study(cell: Cell) -> bool:
    return cell.name != "study"


def measure(chosen: Sequence[Cell], a: argparse.Namespace, logs: Path) -> int:
    """Run the cells and say how it went."""
    if a.dry_run:
        for name in PRELOADED:
            importlib.import_module(name)
    import torch

    if not a.dry_run and not torch.cuda.is_available():
        print(
            "bench.gpu.suite: torch sees no GPU here, so nothing is measured "
            "(fap-doctor says why).\n"
            "--dry-run runs every part at toy size on the CPU.",
            file=sys.stderr,
        )
        return 1
    try:
        a.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"bench.gpu.suite: --out {a.out}: {error.strerror}; "
            "give a folder that can be written to",
            file=sys.stderr,
        )
        return 2
    suite = Suite(chosen, a.out, a.seconds, a.dry_run, logs)
    signal.signal(signal.SIGTERM, _leave)
    begun = time.monotonic()
    try:
        missing = suite.run()
    except KeyboardInterrupt:
        say(f"\nstopped; what was measured is in {a.out}")
        return 128 + signal.SIGINT
    except Interrupted:
        say(f"\nstopped; what was measured is in {a.out}")
        return 128 + signal.SIGTERM
    say(f"\n{suite.tables()}\n")
    say(
        f"{len(chosen) - missing} of {len(chosen)} cells in {time.monotonic() - begun:.0f} s; "
        f"{a.out / 'table.md'}"
    )
    return int(missing > 0)


def _leave(*_: Any) -> None:
    raise Interrupted


if __name__ == "__main__":
    raise SystemExit(main())
