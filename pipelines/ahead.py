"""Run calls ahead of their consumer, in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def run_ahead(
    calls: Iterable[Callable[[], T]], threads: int, ahead: int
) -> Generator[T, None, None]:
    """Results of the calls, in order, from a pool of threads; at most `ahead` calls run or wait, or
    their results do.
    """
    pool, calls = ThreadPoolExecutor(threads), iter(calls)
    tasks: deque[Future[T]] = deque()
    try:
        while True:
            tasks.extend(map(pool.submit, islice(calls, ahead - len(tasks))))
            if not tasks:
                return
            yield tasks.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
