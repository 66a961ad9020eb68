"""What a run's time goes to."""

from collections.abc import Iterator

import pytest

from fap.run import stopwatch
from fap.run.stopwatch import Stopwatch


class Clock:
    """The stopwatch's `time`, which passes when told."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


def test_waiting_is_the_time_until_a_batch_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)

    def batches() -> Iterator[int]:
        for number in range(3):
            clock.now += 5
            yield number

    watch = Stopwatch()
    for _ in watch.on(batches()):
        clock.now += 2
    assert watch.lap() == (21, 15)
    clock.now += 1
    assert watch.lap() == (1, 0)
