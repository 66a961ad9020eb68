"""Signals that ask a run to stop, and what ends a run that can no longer hear them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from fap.signals import SIGNALS

# Seconds:
PATIENCE = 10.0  # without progress after a signal; torchrun, Slurm and Kubernetes kill after 30
SAVING_PATIENCE = 120.0  # while a checkpoint is written, which may take a slow disk long
ONE_CTRL_C = 2.0  # torchrun and the shell may both hand on the same Ctrl-C
LOOK_EVERY = 1.0  # at the run's progress, once a signal has come
TIME_TO_SAY = 1.0

END = 0  # no signal's number: the listening thread ends
MOST_AT_ONCE = 64  # numbers read from the pipe


class Interrupted(BaseException):
    """A signal asked the run to leave. `exit_code` is the shell's convention.

    Like KeyboardInterrupt no Exception: while a run starts it is raised anywhere, also inside what
    tries something and falls back if that fails.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopSignal:
    """While entered, SIGNALS ask the run to save and leave, instead of killing the process.

    Until `run_begins` there is nothing to save: a signal raises Interrupted wherever the main
    thread is. After it, the signal's `number` is noted, and the run looks at it between steps. More
    signals change nothing, as schedulers send several; only a Ctrl-C that comes at least ONE_CTRL_C
    seconds after the first signal ends the process at once. What the process was told to ignore
    (nohup) it goes on to ignore.

    The main thread may hang in a collective, where Python's handlers do not run, because another
    rank hangs or is gone. So a thread listens too. If the run makes no progress (`beat`) for
    `patience` seconds and twice the longest pause so far, it ends the process: the last checkpoint
    stays.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.number: int | None = None
        self._pace = Pace(patience)
        self._watch = Watch(self._pace)

    def __enter__(self) -> StopSignal:
        self._watch.open()
        self._former = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self._former.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._note)
        self._watch.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Asked to leave, and leaving: the last of a scheduler's signals must not change the exit
        # code.
        leaving = self.number is not None and isinstance(error, SystemExit)
        for number, handler in self._former.items():
            if leaving:
                handler = signal.SIG_IGN
            signal.signal(number, handler)
        self._watch.close()

    def run_begins(self) -> None:
        """From here on there is something to save."""
        self._pace.starting = False

    def beat(self) -> None:
        """The run makes progress."""
        self._pace.beat()

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """A block that may take long without a beat."""
        return self._pace.saving()

    def _note(self, number: int, *_: Any) -> None:
        """The main thread's handler."""
        if self.number is None:
            self.number = number
            if self._pace.starting:
                raise Interrupted(number)


class Pace:
    """How a run moves, for the thread that has to tell a slow run from one that hangs."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.starting = True
        self.last_beat = 0.0  # of time.monotonic; 0: none yet
        self._is_saving = False
        self._longest_pause = 0.0

    def beat(self) -> None:
        now = time.monotonic()
        if self.last_beat:  # not before the first step, which also compiles and warms up
            self._longest_pause = max(self._longest_pause, now - self.last_beat)
        self.last_beat = now

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        self._is_saving = True
        try:
            yield
        finally:
            self.last_beat = time.monotonic()  # a pause, but not one between steps
            self._is_saving = False

    @property
    def limit(self) -> float:
        """Seconds without a beat after which a run that was asked to leave is taken to hang."""
        if self._is_saving:
            return SAVING_PATIENCE
        return self.patience + 2 * self._longest_pause


class Watch:
    """A thread that hears the signals too, and ends the process if nothing else does.

    Python writes the number of every signal that it handles into a pipe, even while the main thread
    sleeps in C code.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._first: int | None = None  # signal
        self._heard_at = 0.0

    def open(self) -> None:
        """Have signals written into the pipe, where they wait for the thread."""
        self._ear, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        self._former_wakeup = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._former_wakeup)
        os.write(self._mouth, bytes([END]))
        self._thread.join()
        os.close(self._ear)
        os.close(self._mouth)

    def _listen(self) -> None:
        while True:
            # Nothing to watch until a signal comes; then the run's progress.
            wait = None
            if self._first is not None:
                wait = min(LOOK_EVERY, self._pace.patience)
            ready, _, _ = select.select([self._ear], [], [], wait)
            if not ready:
                self._check_progress()
                continue
            for number in os.read(self._ear, MOST_AT_ONCE):
                if number == END:
                    return
                if number in SIGNALS:
                    self._hear(number)

    def _check_progress(self) -> None:
        assert self._first is not None
        # First the limit, then the beat: if a save ends just now, its limit must not be exchanged
        # for that of a step while the beat is still that of before the save.
        limit = self._pace.limit
        quiet_since = max(self._heard_at, self._pace.last_beat)
        if time.monotonic() - quiet_since >= limit:
            name = signal.Signals(self._first).name
            why = f"{name}, but no progress for {limit:.0f} s (does another rank hang?)"
            _end(self._first, why)

    def _hear(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._first is None:
            self._first = number
            self._heard_at = time.monotonic()
            if not self._pace.starting:
                _say(f"{name}: saving and leaving after this step")
        elif number == signal.SIGINT and time.monotonic() - self._heard_at >= ONE_CTRL_C:
            _end(number, "Ctrl-C again")
        else:
            _say(f"{name}: already leaving; Ctrl-C ends at once")


def _end(number: int, why: str) -> None:
    _say(f"{why}: ending without a save, the last checkpoint stays")
    os._exit(128 + number)


def _say(message: str) -> None:
    """Print in a thread of its own: the main thread may hang in the middle of a print."""

    def say() -> None:
        print(f"fap-train: {message}", file=sys.stderr, flush=True)

    said = threading.Thread(target=say, daemon=True)
    said.start()
    said.join(TIME_TO_SAY)
