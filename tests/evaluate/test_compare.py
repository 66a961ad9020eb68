"""Two ways of training compared over seeds: against scipy's tests, and by hand."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fap.evaluate.compare import Difference, mean_std, paired, unpaired, untested


@pytest.mark.parametrize("draw", range(20))
def test_a_paired_difference_is_scipys(draw: int) -> None:
    rng = np.random.default_rng()
    n = int(rng.integers(2, 12))
    b = rng.normal(50, 5, n)
    a = b + rng.normal(rng.normal(), 1, n)
    found = paired(a.tolist(), b.tolist())
    twin = stats.ttest_rel(a, b)
    interval = twin.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(twin.pvalue)
    assert found.effect == pytest.approx(twin.statistic / math.sqrt(n))
    assert (found.n, found.paired, found.effect_name) == (n, True, "d_z")
    assert found.mean == pytest.approx((a - b).mean())


@pytest.mark.parametrize("draw", range(20))
def test_an_unpaired_difference_is_welchs(draw: int) -> None:
    rng = np.random.default_rng()
    a = rng.normal(50, rng.uniform(0.1, 5), rng.integers(2, 9))
    b = rng.normal(51, rng.uniform(0.1, 5), rng.integers(2, 9))
    found = unpaired(a.tolist(), b.tolist())
    twin = stats.ttest_ind(a, b, equal_var=False)
    interval = twin.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(twin.pvalue)
    spread = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    assert found.effect == pytest.approx((a.mean() - b.mean()) / spread)
    assert (found.n, found.paired, found.effect_name) == (min(len(a), len(b)), False, "d")


def test_numbers_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1; t(2) has its 97.5% point at 4.302653.
    found = paired([11, 22, 33], [10, 20, 30])
    assert (found.mean, found.effect) == (2, 2)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.p == pytest.approx(0.074180, abs=1e-6)
    assert found.verdict("more") == "undecided"
    assert mean_std([1, 2, 3]) == (2, 1)
    assert mean_std([5]) == (5, None)


@pytest.mark.parametrize(("low", "high", "more", "less"), [
    (0.1, 0.5, "better", "worse"),
    (-0.5, -0.1, "worse", "better"),
    (-0.1, 0.5, "undecided", "undecided"),
    (0.0, 0.5, "undecided", "undecided"),
    (None, None, "undecided", "undecided"),
])  # fmt: skip
def test_the_verdict_is_the_intervals(low: Any, high: Any, more: str, less: str) -> None:
    found = Difference(0.2, 3, True, low, high)
    assert (found.verdict("more"), found.verdict("less")) == (more, less)


@pytest.mark.parametrize("test", [paired, unpaired])
def test_one_seed_and_no_spread_have_no_interval(test: Any) -> None:
    one = test([3.0], [1.0])
    assert (one.mean, one.low, one.high, one.p, one.effect) == (2, None, None, None, None)
    assert one.why == "one seed"
    same = test([50.0, 50.0, 50.0], [50.0, 50.0, 50.0])
    assert (same.mean, same.low, same.p) == (0, None, None)
    # The same difference to every seed but for rounding, of which a test would make p = 0.
    close = test([100 * 0.3] * 3, [100 * (0.1 + 0.1), 20.0, 100 * 0.2])
    assert close.mean == pytest.approx(10)
    assert (close.low, close.p, close.verdict("more")) == (None, None, "undecided")
    assert close.why


def test_pairs_that_differ_alike_have_no_interval() -> None:
    found = paired([1.3, 2.3, 5.3], [1.0, 2.0, 5.0])
    assert found.mean == pytest.approx(0.3)
    assert found.low is None
    assert found.why == "every seed has the same difference"


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="3 numbers and 2"):
        paired([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="0 numbers and 0"):
        paired([], [])
    with pytest.raises(ValueError, match="both need at least one"):
        unpaired([1], [])


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    with pytest.raises(ImportError, match=r"pip install 'fap\[statistics\]'"):
        paired([1, 2, 4], [1, 1, 1])
    assert untested([1, 3], [0, 1], is_paired=True, why="no scipy") == Difference(
        1.5, 2, True, why="no scipy"
    )


@pytest.mark.parametrize("test", [paired, unpaired])
def test_an_undefined_number_decides_nothing(test: Any) -> None:
    """A seed that diverged has no calibration error."""
    found = test([1.0, float("nan")], [2.0, 3.0])
    assert (found.low, found.p, found.why) == (None, None, "a seed's number is undefined")
    assert found.verdict("more") == found.verdict("less") == "undecided"
