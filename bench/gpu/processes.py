"""A cell as a process: started, forked, killed.

A library of `bench.gpu.suite`.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from bench.common import ROOT


class Process(Protocol):
    """What the suite asks of a `subprocess.Popen` and of a `Fork`."""

    pid: int

    def poll(self) -> int | None: ...


def spawned(words: list[str], log: Path) -> Process:
    """`python -m WORDS` in a process group of its own."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def forked(words: list[str], log: Path) -> Process:
    """The same in a fork of this process, which has torch imported: seconds saved per cell.

    Not where CUDA is in use.
    """
    pid = os.fork()
    if pid:
        return Fork(pid)
    # From here on this is the child, which must never return into the suite's code.
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a new program
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with log.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = list(words)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = _exit_code(end)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_code(end: SystemExit) -> int:
    """As Python itself answers `sys.exit`: a message is printed and counts as 1."""
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code
    print(end.code, file=sys.stderr)
    return 1


class Fork:
    """A forked child, to be waited for like a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """A block in which Ctrl-C and SIGTERM have no effect; they have it right after.

    They are noted and not blocked: a process that is started in the block would inherit that.
    """
    came: list[int] = []

    def note(number: int, *_: Any) -> None:
        came.append(number)

    former = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


def kill(group: int, number: signal.Signals) -> None:
    """Send a signal to a process group; it may be gone."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return
