"""What a run's time goes to."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Seconds since the last lap, and how many of them were spent waiting for the loader."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0

    def on(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; the time until each one comes is time waited."""
        asked = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def lap(self) -> tuple[float, float]:
        """Seconds, and seconds waited, of the lap that ends here."""
        now = time.perf_counter()
        seconds = now - self.start
        waited = self.waited
        self.start = now
        self.waited = 0.0
        return seconds, waited
