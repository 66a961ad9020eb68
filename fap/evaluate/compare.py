"""Two ways of training compared over seeds: the mean difference, its 95% interval, effect size, p.

Pairs of one seed are compared by the paired t-test, else Welch's test is made. Both take the
seeds' numbers as normally distributed, and a few seeds say little about that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.extras import needs

LEVEL = 0.95  # of intervals
# Of the largest number compared: a spread below it is that of rounding, and tests nothing.
ROUNDING = 1e-9

UNDEFINED = "a seed's number is undefined"

Better = Literal["more", "less"]
Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Difference:
    """a - b, in the units of both. Where there is no interval, `why` says so."""

    mean: float
    n: int
    """Pairs; unpaired the seeds of the smaller side."""
    paired: bool
    low: float | None = None
    """The limits of the 95% interval; None without one, as the others."""
    high: float | None = None
    p: float | None = None
    """Of both sides: that a difference as large comes of chance alone."""
    effect: float | None = None
    """Paired: d_z, the mean over the standard deviation of the differences. Unpaired: Cohen's d,
    over the root of the mean variance of both sides."""
    why: str = ""

    @property
    def effect_name(self) -> str:
        return "d_z" if self.paired else "d"

    def verdict(self, better: Better) -> Verdict:
        """Of a against b; `undecided` where the interval includes 0, or there is none."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "undecided"
        return "better" if (self.low > 0) == (better == "more") else "worse"


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """The standard deviation is that of a sample (n - 1); None of one value."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()), None
    return float(array.mean()), float(array.std(ddof=1))


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """`a` and `b`: of the same seeds, in the same order. Raises ImportError without scipy."""
    ours, theirs = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or not len(ours):
        raise ValueError(f"{len(a)} numbers and {len(b)}: pairs need as many, at least one")
    gaps = ours - theirs
    n = len(gaps)
    mean = float(gaps.mean())
    if not math.isfinite(mean):
        return Difference(mean, n, True, why=UNDEFINED)
    if n < 2:
        return Difference(mean, n, True, why="one seed")
    std = float(gaps.std(ddof=1))
    if _is_rounding(std, ours, theirs):
        return Difference(mean, n, True, why="every seed has the same difference")
    return _tested(mean, std / math.sqrt(n), n - 1, n, True, mean / std)


def unpaired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """`a` and `b`: of other seeds (Welch's test). Raises ImportError without scipy."""
    ours, theirs = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    n = min(len(ours), len(theirs))
    if not n:
        raise ValueError(f"{len(a)} numbers and {len(b)}: both need at least one")
    mean = float(ours.mean() - theirs.mean())
    if not math.isfinite(mean):
        return Difference(mean, n, False, why=UNDEFINED)
    if n < 2:
        return Difference(mean, n, False, why="one seed")
    variances = np.array([ours.var(ddof=1), theirs.var(ddof=1)])
    std = math.sqrt(variances.mean())
    if _is_rounding(std, ours, theirs):
        return Difference(mean, n, False, why="no spread over the seeds")
    parts = variances / [len(ours), len(theirs)]  # of the difference's variance
    freedom = parts.sum() ** 2 / (parts**2 / [len(ours) - 1, len(theirs) - 1]).sum()
    return _tested(mean, math.sqrt(parts.sum()), float(freedom), n, False, mean / std)


def untested(a: Sequence[float], b: Sequence[float], *, is_paired: bool, why: str) -> Difference:
    """The difference of the means alone."""
    mean = float(np.mean(a) - np.mean(b))
    return Difference(mean, min(len(a), len(b)), is_paired, why=why)


def _is_rounding(std: float, a: np.ndarray, b: np.ndarray) -> bool:
    return std <= ROUNDING * max(np.abs(a).max(), np.abs(b).max())


def _tested(
    mean: float, error: float, freedom: float, n: int, is_paired: bool, effect: float
) -> Difference:
    """`error`: the standard error of `mean`."""
    with needs("statistics", "the interval of a difference"):
        from scipy import stats
    margin = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return Difference(mean, n, is_paired, mean - margin, mean + margin, p, effect)
