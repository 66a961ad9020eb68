"""`fap-*` commands as processes of their own, which end with this one.

A library of the demo and of the study. Ctrl-C lets a training run save itself first.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.common import ROOT

SHOWN_LINES = 8  # of a failed command's log

_running: set[int] = set()  # process ids
_lock = threading.Lock()
_stopped = False


class Failed(SystemExit):
    """A command's exit code was not 0, or it was not started because all had been stopped."""


def fap(command: str, *words: str, log: Path | None = None, threads: int | None = None) -> float:
    """Run `fap-COMMAND` to its end. Returns its CPU seconds, user and system.

    Its output goes to the end of `log`, else where ours goes; `threads` are those of its
    arithmetic. Raises Failed.
    """
    argv = [sys.executable, "-m", f"fap.cli.{command}", *words]
    return run(argv, f"fap-{command} {words[0]}", log, threads)


def run(
    argv: Sequence[str], name: str, log: Path | None = None, threads: int | None = None
) -> float:
    """As `fap`, of any command; `name` is what messages call it."""
    environment = dict(os.environ)
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with _output_to(log) as out:
        with _lock:
            if _stopped:
                raise Failed(f"'{name}' was not started")
            # A process group of its own: a terminal's Ctrl-C reaches us alone, and we pass on one
            # signal, not two.
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                process_group=0,
            )
            _running.add(process.pid)
        # Wait, and leave the process as it is: its number stays taken until wait4 below. So under
        # the lock a signal can never reach another process that has got the number since.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with _lock:
            _running.remove(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        where = "its message is above"
        if log is not None:
            where = f"the end of {log}:\n{_end_of(log)}"
        raise Failed(f"'{name}' ended with exit code {process.returncode}; {where}")
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def _output_to(log: Path | None) -> Iterator[Any]:
    """A stream to the end of `log`; without one None, which is where our own output goes."""
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        yield stream


def _end_of(log: Path) -> str:
    text = log.read_text(errors="replace").replace("\r", "\n")  # a progress bar's repaintings
    return "\n".join(text.splitlines()[-SHOWN_LINES:])


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Leaving the block by an exception ends the commands that other threads run.

    SIGTERM and SIGHUP count as exceptions. Each command gets one SIGTERM, at which `fap-train`
    saves; from then on none is started.
    """
    global _stopped
    _stopped = False
    before = {s: signal.signal(s, _leave) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except BaseException:
        with _lock:
            _stopped = True
            for pid in _running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, *_: Any) -> None:
    sys.exit(128 + number)
