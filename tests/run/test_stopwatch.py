"""What a run's time goes to."""

import time
from collections.abc import Iterator

from fap.run.stopwatch import Stopwatch


def test_waiting_is_the_time_until_a_batch_comes() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    watch = Stopwatch()
    for _ in watch.on(slow()):
        time.sleep(0.02)
    seconds, waited = watch.lap()
    assert 0.15 <= waited <= seconds - 0.06
    seconds, waited = watch.lap()
    assert waited == 0
    assert seconds < 0.05
