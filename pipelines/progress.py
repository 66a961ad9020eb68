"""Work on many items with threads, in order, and show how far it is."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TypeVar

from tqdm import tqdm

from pipelines.ahead import run_ahead

Item = TypeVar("Item")
Result = TypeVar("Result")

WAITING_PER_THREAD = 4  # tasks of each thread that run, wait or are done


def in_order(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    threads: int,
    chunk: int,  # items of one task
    what: str,
    unit: str = "img",
) -> Generator[Result, None, None]:
    """The results of `work` for all items, in order, few of them waiting.

    A terminal shows a progress bar with `what`. The threads need no semaphores, unlike
    multiprocessing's pools, which fail without /dev/shm.
    """

    def task(first: int) -> Callable[[], list[Result]]:
        def results() -> list[Result]:
            return [work(item) for item in items[first : first + chunk]]

        return results

    tasks = (task(first) for first in range(0, len(items), chunk))
    with (
        tqdm(total=len(items), desc=what, unit=unit, delay=1, disable=None) as progress,
        closing(run_ahead(tasks, threads, WAITING_PER_THREAD * threads)) as done,
    ):
        for results in done:
            yield from results
            progress.update(len(results))
