"""Everything that a GPU machine measures, in order of value, in as much time as it has.

    python -m bench.gpu.suite                           # all of it, 30 to 60 minutes by estimate: `make gpu`
    python -m bench.gpu.suite --seconds 540             # what fits; the targets come first
    python -m bench.gpu.suite --only parity/ kernels    # cells whose names hold one of these
    python -m bench.gpu.suite --dry-run                 # every part at toy size, on a CPU

Each cell (`bench.gpu.cells`) is a process with a time limit. After each one `suite.json` and
`table.md` are written anew, so an interruption loses one cell. A cell that fails says why, and
stops nothing.
"""

import argparse
import importlib
import importlib.util
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import ROOT, environment
from bench.gpu.cells import REAL, STUDY_SECONDS, TOY, Cell, cells
from bench.gpu.table import table

GRACE_S = 5  # between SIGTERM and SIGKILL
SHOWN_LINES = 4  # of a cell's log
TOY_PROCESSES = 3  # cells of a dry run at the same time
PRELOADED = (
    "fap.run.train",
    "pipelines.convert",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)  # for a dry run's forks


class Interrupted(BaseException):
    """SIGTERM: leave as Ctrl-C does."""


@dataclass
class Running:
    """A cell whose process runs."""

    cell: Cell
    words: list[str]
    folder: Path
    process: "subprocess.Popen[bytes] | Fork"
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
            kill(self.process.pid, signal.SIGKILL if self.signals_sent else signal.SIGTERM)
            self.signals_sent += 1
        return False


class Suite:
    """Runs cells and keeps the record of what they found."""

    def __init__(
        self, chosen: Sequence[Cell], out: Path, seconds: float, dry_run: bool, folder: Path
    ) -> None:
        self.cells, self.out, self.dry_run = chosen, out, dry_run
        self.deadline = time.monotonic() + seconds
        self.folder = folder  # of the cells' logs and results
        self.begun = 0
        self.environment = environment()
        self.records: dict[str, dict[str, Any]] = {}
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
                time.sleep(0.05)
        finally:
            for one in self.running:
                kill(one.process.pid, signal.SIGKILL)
            self.write()
        return sum(record["state"] != "measured" for record in self.records.values())

    def content(self) -> dict[str, Any]:
        """What suite.json holds."""
        ordered = [self.records[c.name] for c in self.cells if c.name in self.records]
        missing = [c.name for c in self.cells if c.name not in self.records]
        return {
            "environment": self.environment,
            "dry_run": self.dry_run,
            "cells": ordered,
            "not_reached": missing,
        }

    def tables(self) -> str:
        try:
            return table(self.content())
        except Exception as error:  # the figures are worth more than their table
            return f"the table could not be made of suite.json: {type(error).__name__}: {error}"

    def write(self) -> None:
        """suite.json and table.md, each replaced at once."""
        content, tables = self.content(), self.tables()
        for name, text in (("suite.json", json.dumps(content, indent=1)), ("table.md", tables)):
            part = self.out / f"{name}.part"
            try:
                part.write_text(text + "\n")
                part.replace(self.out / name)
            except (
                OSError
            ) as error:  # a full disk costs this record; the next cell may find room again
                say(f"WARNING: {self.out / name} was not written: {error}")

    # ------------------------------------------------------------------ one cell

    def _may_start(self, cell: Cell) -> bool:
        """Timed cells run alone, those marked `at_once` beside each other; at toy size a few of
        either.
        """
        if any(r.cell.at_once != cell.at_once for r in self.running):
            return False
        if self.dry_run:
            return len(self.running) < TOY_PROCESSES
        return cell.at_once or not self.running

    def _start(self, cell: Cell) -> None:
        self.begun += 1
        left = self.deadline - time.monotonic()
        absent = [package for package in cell.needs if not importable(package)]
        if absent or left < cell.usual_s:
            why = f"{max(0, left):.0f} s left, it takes about {cell.usual_s} s"
            self._record(
                cell, "not measured", 0.0, why=f"{absent[0]} is not installed" if absent else why
            )
            return
        limit = min(cell.limit_s, left)
        say(
            f"== {self.begun}/{len(self.cells)} {cell.name} (at most {limit:.0f} s, {left:.0f} s"
            " left)"
        )
        folder = self.folder / cell.name.replace(" ", "_").replace(":", "").replace(",", "")
        folder.mkdir(parents=True, exist_ok=True)
        for former in folder.glob("*.json"):  # of an earlier suite
            former.unlink()
        words = [word.replace(STUDY_SECONDS, str(int(limit) - 10)) for word in cell.words]
        if cell.results:
            words += ["--out", str(folder)]
        start = forked if self.dry_run else spawned
        process = start(words, folder / "log.txt")
        self.running.append(Running(cell, words, folder, process, time.monotonic(), limit))

    def _finish(self, one: Running) -> None:
        log = (one.folder / "log.txt").read_text(errors="replace")
        lines = [line for line in log.splitlines() if line.strip()] or [""]
        for line in lines[-SHOWN_LINES:]:
            say(f"   {line[:220]}")
        found = results_in(one.folder)
        why = self._fault(one, found, lines[-1][:500])
        more: dict[str, Any] = {"words": shlex.join(one.words), "last_line": lines[-1][:500]}
        if why:
            more["why"] = why
        if found:
            more["found"] = found
        self._record(one.cell, "failed" if why else "measured", one.seconds, **more)

    def _record(self, cell: Cell, state: str, seconds: float, **more: Any) -> None:
        self.records[cell.name] = {
            "cell": cell.name,
            "state": state,
            "seconds": round(seconds, 1),
            **more,
        }
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
        errors = [
            r["error"] for part in found.values() for r in part.get("results", []) if "error" in r
        ]
        if errors:
            return str(errors[0])
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
    """The JSON files that a cell wrote, by name, without their `environment`, which is the suite's."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text())
        except ValueError:  # the cell was ended while it wrote
            continue
        content.pop("environment", None)
        found[file.stem] = content
    return found


def importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


# ------------------------------------------------------------------ processes


def spawned(words: list[str], log: Path) -> "subprocess.Popen[bytes] | Fork":
    """`python -m WORDS` in a process group of its own."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", *words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def forked(words: list[str], log: Path) -> "subprocess.Popen[bytes] | Fork":
    """The same in a fork of this process, which has torch imported: seconds saved per cell. Not
    where CUDA is in use.
    """
    pid = os.fork()
    if pid:
        return Fork(pid)
    code = 1
    try:
        os.setsid()
        with log.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = [words[0], *words[1:]]
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Fork:
    """A forked child, to be waited for like a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code


def kill(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


# ------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu")
    parser.add_argument(
        "--seconds", type=float, default=7200.0, help="in all; default: %(default)s"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="cells whose names hold one of these",
    )
    parser.add_argument("--skip", nargs="+", default=[], metavar="WORD", help="cells to leave out")
    parser.add_argument("--images", type=Path, help="folder of the loaders' JPEGs; made if missing")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="every part at toy size, on a CPU; figures mean nothing",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the cells and their commands, run nothing"
    )
    a = parser.parse_args(argv)
    if a.dry_run:
        # Before torch is imported: cells are forks, which must find neither CUDA nor threads in
        # use.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch) if a.dry_run else a.out / "cells"
        images = a.images or (Path(scratch) if a.dry_run else ROOT / "data") / "bench_jpegs"
        every = cells(TOY if a.dry_run else REAL, images)
        if a.dry_run:  # the longest first: then the dry run is over soonest
            every.sort(key=lambda cell: cell.name != "study")
        chosen = [
            c
            for c in every
            if any(w in c.name for w in a.only) and not any(w in c.name for w in a.skip)
        ]
        if a.list:
            for cell in chosen:
                print(f"{cell.name:45s} <= {cell.limit_s:4d} s  python -m {shlex.join(cell.words)}")
            return 0
        if not chosen:
            parser.error(f"--only {' '.join(a.only)}: no cell has such a name; --list shows them")
        return measure(chosen, a, logs)


def measure(chosen: Sequence[Cell], a: argparse.Namespace, logs: Path) -> int:
    """Run the cells and say how it went."""
    for name in PRELOADED if a.dry_run else ():
        importlib.import_module(name)
    import torch

    if not a.dry_run and not torch.cuda.is_available():
        print(
            "bench.gpu.suite: torch sees no GPU here, so nothing is measured (fap-doctor says"
            " why).",
            file=sys.stderr,
        )
        print("--dry-run runs every part at toy size on the CPU.", file=sys.stderr)
        return 1
    try:
        a.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"bench.gpu.suite: --out {a.out}: {error.strerror}; give a folder that can be"
            " written to",
            file=sys.stderr,
        )
        return 2
    suite = Suite(chosen, a.out, a.seconds, a.dry_run, logs)
    signal.signal(signal.SIGTERM, _leave)
    begun = time.monotonic()
    try:
        missing = suite.run()
    except (KeyboardInterrupt, Interrupted) as stop:
        say(f"\nstopped; what was measured is in {a.out}")
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    say(f"\n{suite.tables()}\n")
    say(
        f"{len(chosen) - missing} of {len(chosen)} cells in {time.monotonic() - begun:.0f} s;"
        f" {a.out / 'table.md'}"
    )
    return int(missing > 0)


def _leave(*_: Any) -> None:
    raise Interrupted


if __name__ == "__main__":
    raise SystemExit(main())
