"""Calls run ahead of their consumer: in order, never more than allowed, none left behind."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipelines.ahead import run_ahead


class Counted:
    """Calls that know how many of them were taken and how many have run."""

    def __init__(self, n: int, seconds: float = 0.0) -> None:
        self.n = n
        self.seconds = seconds
        self.taken = 0
        self.ran: list[int] = []

    def calls(self) -> Iterator[Callable[[], int]]:
        for number in range(self.n):
            self.taken += 1
            yield self.call(number)

    def call(self, number: int) -> Callable[[], int]:
        def run() -> int:
            time.sleep(self.seconds)
            self.ran.append(number)
            return number

        return run


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("ahead", [1, 2, 5, 50])
def test_results_come_in_the_order_of_the_calls(threads: int, ahead: int) -> None:
    def call(number: int) -> Callable[[], int]:
        def run() -> int:
            time.sleep((number * 7 % 5) / 1000)  # the later ones are often done first
            return number

        return run

    assert list(run_ahead((call(n) for n in range(20)), threads, ahead)) == list(range(20))


def test_nothing_comes_of_no_calls() -> None:
    assert list(run_ahead([], threads=2, ahead=3)) == []


def test_no_more_calls_are_taken_than_allowed() -> None:
    """While the consumer holds a result, ahead - 1 others are in the making."""
    counted = Counted(20)
    for result in run_ahead(counted.calls(), threads=2, ahead=4):
        assert counted.taken == min(result + 4, 20)


def test_leaving_early_cancels_what_waits_and_ends_the_threads() -> None:
    before = threading.active_count()
    counted = Counted(20, seconds=0.05)
    results = run_ahead(counted.calls(), threads=1, ahead=10)
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before
    assert len(counted.ran) <= 3  # the result, and what ran when the consumer left
    assert counted.taken == 10


def test_an_error_is_raised_in_its_turn() -> None:
    def fail() -> int:
        raise ValueError("the third call")

    counted = Counted(9)
    calls = [counted.call(0), counted.call(1), fail, counted.call(3)]
    results = run_ahead(calls, threads=2, ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="the third call"):
        next(results)
