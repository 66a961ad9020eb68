"""Worker processes: the work of threads, an end to it, and machines that allow no processes."""

import contextlib
import multiprocessing
import multiprocessing.synchronize
import platform
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest

from pipelines.corrupt import corrupt
from pipelines.workers import Workers
from tests.conftest import photo


def corrupted_by(workers: Executor, n: int = 40) -> np.ndarray:
    """n images with snow."""
    images = [photo(np.random.default_rng(i), 32, 32) for i in range(n)]
    return np.stack(
        list(workers.map(corrupt, images, repeat("snow"), repeat(2), repeat(0), range(n)))
    )


@pytest.mark.slow
def test_processes_make_the_same_images():
    with Workers(2, say=pytest.fail) as processes, Workers(0) as thread:
        assert np.array_equal(corrupted_by(processes), corrupted_by(thread))
        assert len(multiprocessing.active_children()) == 2


def page_faults(_: int) -> int:
    """Of a corruption that makes dozens of arrays of a megabyte."""
    image = np.zeros((224, 224, 3), np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    corrupt(image, "zoom_blur", 3)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_a_process_keeps_the_memory_that_it_frees():
    """Else every image would cost twelve thousand page faults, and most of the time."""
    with Workers(1, say=pytest.fail) as workers:
        faults = list(workers.map(page_faults, range(6)))
    assert min(faults) < 1000
    assert faults[-1] < 1000


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory"),
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied"),
        OSError(38, "Function not implemented"),
        NotImplementedError("no sem_open"),
        ImportError("no synchronize"),
    ],
)
def test_without_semaphores_threads_do_the_work(monkeypatch, error):
    """No /dev/shm, a full or a read-only one: what creating a POSIX semaphore then raises."""

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", fails)
    said: list[str] = []
    with Workers(2, say=said.append) as workers, ThreadPoolExecutor(1) as thread:
        assert np.array_equal(corrupted_by(workers), corrupted_by(thread))
    assert len(said) == 1
    assert f"no worker processes here ({error})" in said[0]


def test_without_room_for_processes_threads_do_the_work(monkeypatch):
    def fails(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(ProcessPoolExecutor, "submit", fails)
    said: list[str] = []
    with Workers(2, say=said.append) as workers, ThreadPoolExecutor(1) as thread:
        assert np.array_equal(corrupted_by(workers), corrupted_by(thread))
    assert len(said) == 1


def slow_call(done: Path, _: int) -> None:
    time.sleep(0.3)
    with done.open("ab") as file:
        file.write(b".")


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_workers_drop_what_waits(processes, tmp_path):
    """An exception, Ctrl-C say, waits for the calls in hand.

    It does not for the hundreds that were asked for.
    """
    done = tmp_path / "done"
    done.touch()
    workers = Workers(processes)

    def work() -> None:
        with contextlib.suppress(CancelledError):
            list(workers.map(slow_call, repeat(done), range(200), chunksize=16))

    waiting = threading.Thread(target=work)
    waiting.start()
    while not done.stat().st_size:
        time.sleep(0.01)
    before = done.stat().st_size
    workers.__exit__(KeyboardInterrupt, None, None)
    waiting.join(60)
    assert not waiting.is_alive()
    # About one call in each worker. A process takes 16 at a time, two of them at least 30 more.
    assert done.stat().st_size - before < 20


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_workers_cancel_what_is_still_asked_for(processes):
    def stopping_halfway():
        for number in range(100):
            if number == 50:
                workers.stop()
            yield number

    workers = Workers(processes)
    with pytest.raises(CancelledError):
        workers.map(abs, stopping_halfway())
    never_started = Workers(processes)
    never_started.stop()
    for stopped in (workers, never_started):
        with pytest.raises(CancelledError):
            stopped.submit(abs, -1)
        with pytest.raises(CancelledError):
            stopped.map(abs, [-1])


@pytest.mark.slow
def test_workers_of_a_killed_process_end():
    child = """
import multiprocessing, os, signal
from pipelines.workers import Workers
workers = Workers(2)
workers.submit(os.getpid).result()
print(*[p.pid for p in multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    out = subprocess.run([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True).stdout
    pids = [int(word) for word in out.split()]
    assert pids
    until = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    """Runs, that is, and is no zombie that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
