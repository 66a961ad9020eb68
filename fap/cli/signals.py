"""How a command ends that is told to, or cannot begin: one line and an exit code, no traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fap.cli.output import told
from fap.signals import SIGNALS

ENDED_BY_SIGNAL = 128  # the shell's convention: the exit code is this and the signal's number
STANDARD_ERROR = 2  # its descriptor; after `survive` the null device where it was closed
SECONDS_TO_END = 5


class Stopped(KeyboardInterrupt):
    """A signal asks the command to end. `exit_code` is the shell's convention."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = ENDED_BY_SIGNAL + number


@contextmanager
def importing(command: str) -> Iterator[None]:
    """While modules are imported, which takes seconds for torch: a signal ends the process at once.

    Nothing is lost yet. An exception may be swallowed inside an import; and Python remembers a
    KeyboardInterrupt that leaves an `exec`, as dataclasses use it: such a process ends itself by
    SIGINT in the end, whatever exit code it then gives.

    What the machine lacks (a package, a temporary folder with some room) is a line and exit code 1.
    """

    def leave(number: int, _: Any) -> None:
        # Not by `print`: the signal may have come in the middle of another one.
        os.write(STANDARD_ERROR, f"{command}: {_said(number)}\n".encode())
        os._exit(ENDED_BY_SIGNAL + number)

    with _handled_by(leave):
        try:
            yield
        except (ImportError, OSError) as error:
            print(f"{command}: {told(error)}", file=sys.stderr)
            raise SystemExit(1) from None


@contextmanager
def raising_stopped(*, tidying: bool = False) -> Iterator[None]:
    """Within the block a signal raises `Stopped`.

    A second signal has its usual effect; but if the block then has to take away what it began
    (`tidying`), it is ignored.
    """
    second = signal.SIG_IGN if tidying else signal.SIG_DFL

    def stop(number: int, _: Any) -> None:
        for each in SIGNALS:
            if signal.getsignal(each) is stop:
                signal.signal(each, second)
        raise Stopped(number)

    with _handled_by(stop):
        yield


def end(command: str, stopped: Stopped, what: str = "") -> int:
    """Say so, and return the exit code. Python waits for its threads, but here only for seconds.

    Where a worker process was killed in the middle of something, a thread may wait for it for ever.
    """
    print(f"{command}: {_said(stopped.number)}{what}", file=sys.stderr, flush=True)
    last = threading.Timer(SECONDS_TO_END, os._exit, (stopped.exit_code,))
    last.daemon = True
    last.start()
    return stopped.exit_code


def _said(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}"


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    caught = []
    if threading.current_thread() is threading.main_thread():  # no other one may set handlers
        # What nohup or a shell's background job ignores stays ignored.
        caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    former = {number: signal.signal(number, handler) for number in caught}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)
