"""Processes that work for an evaluation, and that can be stopped with no work left behind."""

import ctypes
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from contextlib import contextmanager, suppress
from itertools import repeat
from typing import Any

from pipelines.machine import usable_cores

# What the server that processes are forked from imports: once, and not again in each of them.
PRELOAD = [
    "pipelines.workers",
    "pipelines.corruptions",
    "pipelines.corrupt_store",
    "pipelines.corrupt_copies",
]


# Of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


class Workers(Executor):
    """Processes, started when first used: by default as many as this process may use cores.

    0 processes are one thread of this process: for little work, since processes take seconds to
    start.

    Processes need POSIX semaphores, a folder for a socket and room for more processes. Where a
    container has none (no or a full /dev/shm), threads do the same work slower, and `say` is told.
    Leaving the `with` block by an exception waits for no more than the calls under way; then all
    work ends in CancelledError, also what is still asked for.
    """

    def __init__(
        self, processes: int | None = None, say: Callable[[str], Any] = warnings.warn
    ) -> None:
        self.n = usable_cores() if processes is None else processes
        self.say = say
        self._lock = threading.Lock()
        self._pool: Executor | None = None
        self._stop: Callable[[], None]  # tells the pool's workers to do no more; set with the pool
        self._stopped = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with self._cancelling():
            return self._started().submit(_unless_stopped, fn, *args, **kwargs)

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Any,
        timeout: float | None = None,
        chunksize: int = 1,
    ) -> Iterator[Any]:
        with self._cancelling():
            return self._started().map(
                _unless_stopped, repeat(fn), *iterables, timeout=timeout, chunksize=chunksize
            )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def stop(self) -> None:
        """Give up all work: what waits is cancelled, only the calls under way are finished.

        Killing the processes instead would leave the executor's queues locked for ever.
        """
        with self._lock:
            self._stopped = True
            if self._pool is not None:
                self._stop()
        self.shutdown(wait=False, cancel_futures=True)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.shutdown()
        else:
            self.stop()

    @contextmanager
    def _cancelling(self) -> Iterator[None]:
        """Asking for work may meet `stop` halfway; the executor then says RuntimeError."""
        try:
            yield
        except RuntimeError:
            if self._stopped:
                raise CancelledError from None
            raise

    def _started(self) -> Executor:
        with self._lock:
            if self._stopped:
                raise CancelledError
            if self._pool is None:
                self._pool = self._start()
            return self._pool

    def _start(self) -> Executor:
        if self.n:
            try:
                return self._processes()
            except (OSError, ImportError, NotImplementedError, BrokenExecutor) as error:
                self.say(
                    f"warning: no worker processes here ({error}): "
                    "corruptions are computed in threads, slower"
                )
        stopped = threading.Event()
        self._stop = stopped.set
        return ThreadPoolExecutor(max(1, self.n), initializer=_start_thread, initargs=(stopped,))

    def _processes(self) -> ProcessPoolExecutor:
        """Started and tried, because what is missing shows at the first call."""
        # A fork of this process would be unsafe: it may have threads, and CUDA.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        stopped = context.Event()
        _EVENTS.append(stopped)
        pool = ProcessPoolExecutor(self.n, context, _start_process, (stopped,))
        # Ctrl-C reaches every process of a terminal. It is for us to handle: processes inherit what
        # is blocked here.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            first = pool.submit(os.getpid)
        except BaseException:
            pool.shutdown(wait=False)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        first.result()
        self._stop = stopped.set
        return pool


# Events are never freed: their semaphores have names, and a process that still starts while its
# pool is stopped looks them up.
_EVENTS: list[Any] = []

# In a thread or process of `Workers`: `stopped`, the event that tells it to do no more.
_LOCAL = threading.local()


def _start_thread(stopped: Any) -> None:
    _LOCAL.stopped = stopped


def _start_process(stopped: Any) -> None:
    _LOCAL.stopped = stopped
    _keep_memory()
    with suppress(ImportError):  # then it computes nothing here
        import cv2

        cv2.setNumThreads(1)  # there is a process per core
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _keep_memory() -> None:
    """Let malloc give freed arrays of some MB out again, not back to the kernel.

    A corruption makes many, one after the other. To map their pages anew each time takes up to
    three times as long as all the arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # bytes; the most that it takes
        mallopt(M_TRIM_THRESHOLD, 128 << 20)


def _unless_stopped(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Runs in a worker. A process takes many calls at once, which nobody can cancel but itself."""
    if _LOCAL.stopped.is_set():
        raise CancelledError
    return fn(*args, **kwargs)


def _end_with_parent() -> None:
    """A process that is killed cannot end its workers; they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
