"""Corrupted batches, computed in worker processes, and kept as `.beton`."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from pipelines.ahead import run_ahead
from pipelines.corrupt import corrupt
from pipelines.loaders.base import Batch
from pipelines.machine import usable_cores
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.store import RAW


class Workers(Executor):
    """Processes for `corrupted`, started when first used: by default as many as this process may
    use cores.

    0 processes are one thread of this process: for little work, since processes take seconds to
    start.

    Processes need POSIX semaphores, a folder for a socket and room for more processes. Where a
    container has none (no or a full /dev/shm), threads do the same work slower, and `say` is told.
    Leaving the `with` block by an exception waits for no more than the images in hand; then all
    work ends in CancelledError, also what is still asked for.
    """

    def __init__(
        self, processes: int | None = None, say: Callable[[str], Any] = warnings.warn
    ) -> None:
        self.n = usable_cores() if processes is None else processes
        self.say = say
        self._lock = threading.Lock()
        self._pool: Executor | None = None
        self._stop: Callable[[], None]
        self._stopped = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with self._cancelling():
            return self._started().submit(fn, *args, **kwargs)

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Any,
        timeout: float | None = None,
        chunksize: int = 1,
    ) -> Iterator[Any]:
        with self._cancelling():
            return self._started().map(fn, *iterables, timeout=timeout, chunksize=chunksize)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def stop(self) -> None:
        """Give up all work: what waits is cancelled, and of what is under way only the images in
        hand are finished.

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
                    f"warning: no worker processes here ({error}): corruptions are computed in"
                    " threads, slower"
                )
        stopped = threading.Event()
        self._stop = stopped.set
        return ThreadPoolExecutor(max(1, self.n), initializer=_start_thread, initargs=(stopped,))

    def _processes(self) -> ProcessPoolExecutor:
        """Started and tried, because what is missing shows at the first call."""
        context = multiprocessing.get_context(
            "forkserver"
        )  # a fork of a process with threads or CUDA is unsafe
        context.set_forkserver_preload([__name__])
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


_EVENTS: list[
    Any
] = []  # never freed: a process that still starts while its pool is stopped looks them up by name

_LOCAL = threading.local()  # `stopped`, an event, in the threads and processes of `Workers`


def _start_thread(stopped: Any) -> None:
    _LOCAL.stopped = stopped


def _start_process(stopped: Any) -> None:
    _LOCAL.stopped = stopped
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _corrupt_unless_stopped(*args: Any) -> np.ndarray:
    stopped = getattr(_LOCAL, "stopped", None)  # None: in an executor of another kind
    if stopped is not None and stopped.is_set():
        raise CancelledError
    return corrupt(*args)


def _end_with_parent() -> None:
    """A process that is killed cannot end its workers; they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def corrupted(
    batches: Iterable[Batch],
    index: np.ndarray,
    *,
    name: str,
    severity: int,
    pool: Executor,
    seed: int = 0,
) -> Iterator[Batch]:
    """The batches with their images corrupted, in order and on their device; they may be kept.
    ValueError as `corrupt`.

    `index` (steps, B) is the plan's: the number of each row's image.
    """

    def work(batch: Batch, images: np.ndarray) -> Batch:
        arguments = images, repeat(name), repeat(severity), repeat(seed), index[batch.step]
        rows = [*pool.map(_corrupt_unless_stopped, *arguments, chunksize=16)]
        return replace(
            batch,
            images=torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).to(batch.images.device),
        )

    nhwc = ((b, b.images.permute(0, 2, 3, 1).cpu().numpy().copy()) for b in batches)
    calls = (partial(work, batch, images) for batch, images in nhwc)
    with closing(
        run_ahead(calls, 3, 3)
    ) as done:  # one is with the model, the work of two is under way
        yield from done


def build(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],  # images, and labels with -1 for padding
    dst: Path,
    *,
    capacity: int,
    classes: Sequence[str] | None,
    encoding: dict[str, Any],
) -> None:
    """Write the rows with a label, at most `capacity`, into a `.beton` of raw samples; `encoding`
    says what they are.
    """
    with BetonWriter(dst, capacity) as writer:
        for images, labels in batches:
            nhwc = images.permute(0, 2, 3, 1).cpu().numpy()
            for image, label in zip(nhwc, labels.tolist(), strict=True):
                if label >= 0:
                    writer.add(Sample(image.tobytes(), RAW, *image.shape[:2]), label)
        writer.commit(classes, encoding)
