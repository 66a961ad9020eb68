"""The process that a run lives in: signals that ask it to stop, what its time goes to, and torch's
settings.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch

from fap.config import Config
from fap.signals import SIGNALS
from pipelines.machine import usable_cores

T = TypeVar("T")

PATIENCE = (
    10.0  # seconds without progress after a signal; torchrun, Slurm and Kubernetes kill after 30
)
SAVING_PATIENCE = 120.0  # while a checkpoint is written, which may take a slow disk long
ONE_CTRL_C = 2.0  # seconds: torchrun and the shell may both hand on the same Ctrl-C
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


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
        self.patience = patience
        self._starting = True
        self._saving = False
        self._last_beat: float | None = None
        self._longest_pause = 0.0

    def __enter__(self) -> StopSignal:
        self._ear, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        self._former_wakeup = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        self._former = {s: signal.getsignal(s) for s in SIGNALS}
        for s, handler in self._former.items():
            if handler is not signal.SIG_IGN:
                signal.signal(s, self._note)
        self._watch = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._watch.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Asked to leave, and leaving: the last of a scheduler's signals must not change the exit
        # code.
        leaving = self.number is not None and isinstance(error, SystemExit)
        for s, handler in self._former.items():
            signal.signal(s, signal.SIG_IGN if leaving else handler)
        signal.set_wakeup_fd(self._former_wakeup)
        os.write(self._mouth, b"\0")  # no signal's number: the thread ends
        self._watch.join()
        os.close(self._ear)
        os.close(self._mouth)

    def run_begins(self) -> None:
        """From here on there is something to save."""
        self._starting = False

    def beat(self) -> None:
        """The run makes progress."""
        now = time.monotonic()
        if self._last_beat is not None:  # the first step also compiles and warms up
            self._longest_pause = max(self._longest_pause, now - self._last_beat)
        self._last_beat = now

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A block that may take long without a beat."""
        self._saving = True
        try:
            yield
        finally:
            self._last_beat = time.monotonic()  # a pause, but not one between steps
            self._saving = False

    # ------------------------------------------------------------------ the main thread's handler

    def _note(self, number: int, *_: Any) -> None:
        if self.number is None:
            self.number = number
            if self._starting:
                raise Interrupted(number)

    # ------------------------------------------------------------------ the thread

    def _listen(self) -> None:
        first: int | None = None
        heard_at = 0.0
        while True:
            # Nothing to watch until a signal comes; then look about every second.
            wait = None if first is None else min(1.0, self.patience)
            ready, _, _ = select.select([self._ear], [], [], wait)
            if not ready and first is not None:
                quiet_since = max(heard_at, self._last_beat or 0.0)
                limit = self._limit()
                if time.monotonic() - quiet_since >= limit:
                    name = signal.Signals(first).name
                    self._end(
                        first,
                        f"{name}, but no progress for {limit:.0f} s (does another rank hang?)",
                    )
                continue
            for number in os.read(self._ear, 64):
                if number == 0:
                    return
                if number not in SIGNALS:
                    continue
                name = signal.Signals(number).name
                if first is None:
                    first = number
                    heard_at = time.monotonic()
                    if not self._starting:
                        self._say(f"{name}: saving and leaving after this step")
                elif number == signal.SIGINT and time.monotonic() - heard_at >= ONE_CTRL_C:
                    self._end(number, "Ctrl-C again")
                else:
                    self._say(f"{name}: already leaving; Ctrl-C ends at once")

    def _limit(self) -> float:
        return SAVING_PATIENCE if self._saving else self.patience + 2 * self._longest_pause

    def _end(self, number: int, why: str) -> None:
        self._say(f"{why}: ending without a save, the last checkpoint stays")
        os._exit(128 + number)

    def _say(self, message: str) -> None:
        """Print beside the main thread, which may hang in the middle of a print."""
        said = threading.Thread(
            target=print,
            args=(f"fap-train: {message}",),
            kwargs={"file": sys.stderr, "flush": True},
        )
        said.daemon = True
        said.start()
        said.join(1.0)


class Stopwatch:
    """Seconds since the last lap, and how many of them were spent waiting for the loader."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0

    def on(self, batches: Iterable[T]) -> Iterator[T]:
        before = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - before
            yield batch
            before = time.perf_counter()

    def lap(self) -> tuple[float, float]:
        former, self.start = self.start, time.perf_counter()
        waited, self.waited = self.waited, 0.0
        return self.start - former, waited


def limit_threads(wanted: int | None = None) -> None:
    """torch's CPU threads: `wanted`, else its own default, which knows nothing of a container's CPU
    quota, or fewer.
    """
    torch.set_num_threads(wanted or min(torch.get_num_threads(), usable_cores()))


def set_up_torch(device: torch.device) -> None:
    """What makes every step of this process faster and changes no result but by rounding."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        # glibc keeps what a step frees: else the next step's page faults take a fifth of its time
        # (bench/NOTES.md).
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def norm_kernel(config: Config, device: torch.device) -> Literal["auto", "triton", "framework"]:
    """`run.norm_kernel` as `fap.nets.norm.NormState` says it. ValueError where Triton cannot run."""
    wanted = config.run.norm_kernel
    if wanted == "framework" or config.run.compile:  # the framework's is what a compiler fuses
        return "framework"
    if wanted == "triton":
        lacks = ""
        if device.type != "cuda":
            lacks = "it needs a GPU"
        elif find_spec("triton") is None:
            lacks = "it needs the package triton"
        if lacks:
            raise ValueError(f"run.norm_kernel = 'triton': {lacks}; use 'auto' or 'framework'")
    return wanted
