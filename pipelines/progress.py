"""Work on many items with threads, in order, and show how far it is."""

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any, TypeVar

from tqdm import tqdm

from pipelines.ahead import run_ahead

Item = TypeVar("Item")
Result = TypeVar("Result")

WAITING_PER_THREAD = 4  # tasks of each thread that run, wait or are done
SECONDS_PER_LINE = 60.0  # of a log file


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    chunk: int,  # items of one task
    what: str,
    unit: str = "img",
    *,
    total: int | None = None,  # items; needed where `items` has no length
) -> Generator[Result, None, None]:
    """The results of `work` for all items, in order, few of them waiting.

    Items are taken in this thread, when they are needed. A terminal shows a progress bar with
    `what`, a log file a line a minute. The threads need no semaphores, unlike multiprocessing's
    pools, which fail without /dev/shm.
    """

    def task(some: list[Item]) -> Callable[[], list[Result]]:
        def results() -> list[Result]:
            return [work(item) for item in some]

        return results

    if total is None:
        total = len(items)  # type: ignore[arg-type]
    tasks = (task(some) for some in _chunks(items, chunk))
    with (
        progress_of(total, what, unit) as update,
        closing(run_ahead(tasks, threads, WAITING_PER_THREAD * threads)) as done,
    ):
        for results in done:
            yield from results
            update(len(results))


def _chunks(items: Iterable[Item], chunk: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while some := list(islice(iterator, chunk)):
        yield some


def tracked(
    items: Iterable[Item],
    what: str,
    unit: str,
    total: int | None = None,  # of items; needed where they have no length
) -> Iterator[Item]:
    """The items, and how far whoever takes them is: as `progress_of`, a bar that vanishes."""
    if total is None:
        total = len(items)  # type: ignore[arg-type]
    with progress_of(total, what, unit, leave=False) as update:
        for item in items:
            yield item
            update(1)


@contextmanager
def progress_of(
    total: int | None, what: str, unit: str, *, leave: bool = True
) -> Iterator[Callable[[int], Any]]:
    """Show how far some work is, with the time that is left; gives what counts it.

    On a terminal it is a bar, which stays when it is done if `leave`; in a log file a line whenever
    a minute has passed.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        scale = unit == "B"
        with tqdm(total=total, desc=what, unit=unit, unit_scale=scale, delay=1, leave=leave) as bar:
            yield bar.update
    else:
        yield _Lines(total, what, unit).update


class _Lines:
    """Progress as lines of a log."""

    def __init__(self, total: int | None, what: str, unit: str) -> None:
        self._total = total
        self._what = what
        self._unit = unit
        self._n = 0
        self._began = time.monotonic()
        self._told = self._began

    def update(self, n: int) -> None:
        self._n += n
        now = time.monotonic()
        if now - self._told < SECONDS_PER_LINE:
            return
        self._told = now
        line = tqdm.format_meter(
            self._n,
            self._total or 0,
            now - self._began,
            prefix=self._what,
            unit=self._unit,
            unit_scale=self._unit == "B",
            bar_format="{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}, {rate_fmt},"
            " {remaining} left",
        )
        print(line, file=sys.stderr, flush=True)
