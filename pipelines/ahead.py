"""Run calls ahead of their consumer, in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def run_ahead(
    calls: Iterable[Callable[[], T]], threads: int, ahead: int
) -> Generator[T, None, None]:
    """Results of the calls, in order, from a pool of threads.

    While the consumer holds one result, at most `ahead` - 1 calls have been started: they wait, run
    or are done. A call is not taken from `calls` earlier. Closing the generator cancels what waits
    and returns when what runs has ended.

    Raises:
        Whatever a call raises, in its turn; the calls after it are cancelled.
    """
    pool = ThreadPoolExecutor(threads)
    started: deque[Future[T]] = deque()
    try:
        for call in calls:
            started.append(pool.submit(call))
            if len(started) == ahead:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
