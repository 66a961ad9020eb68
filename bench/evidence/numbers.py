"""The rows of a study as numbers: what is compared, seed by seed, and with what.

A library of `bench.evidence`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from bench.evidence.measure import Row
from bench.evidence.studies import Regime
from fap.evaluate.compare import Better, Difference, paired


class Measure(NamedTuple):
    """A number that is compared, in percent."""

    title: str
    better: Better = "more"


MEASURES = {
    "clean": Measure("right on clean images"),
    "main/corrupted": Measure("right on corrupted images"),
    "main/lost": Measure("lost to corruptions", better="less"),  # of what is right on clean ones
    "main/pgd10/1": Measure("right under PGD-10, eps 1"),
    "main/pgd10/2": Measure("right under PGD-10, eps 2"),
    "main/pgd10/4": Measure("right under PGD-10, eps 4"),
    "main/ece": Measure("calibration error", better="less"),
}


def number(row: Row, name: str) -> float:
    """One of the row's numbers; `NORMS/lost` is the difference of two of them."""
    norms, _, what = name.partition("/")
    if what == "lost":
        return number(row, f"{norms}/clean") - number(row, f"{norms}/corrupted")
    return row["numbers"][name]


@dataclass(frozen=True)
class Rows:
    """All rows of a study."""

    rows: Sequence[Row]

    def of(self, regime: Regime, arm: str) -> list[Row]:
        """In the order of the seeds."""
        found = [row for row in self.rows if (row["regime"], row["arm"]) == (regime.name, arm)]
        return sorted(found, key=lambda row: row["seed"])

    def mean(self, regime: Regime, arm: str, name: str) -> float:
        return fmean(number(row, name) for row in self.of(regime, arm))

    def difference(self, regime: Regime, arm: str, base: str, name: str) -> Difference | None:
        """`arm` minus `base`, in points, over the seeds that both have; None without any."""
        ours = {row["seed"]: number(row, name) for row in self.of(regime, arm)}
        theirs = {row["seed"]: number(row, name) for row in self.of(regime, base)}
        seeds = [seed for seed in ours if seed in theirs]
        if not seeds:
            return None
        return paired([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
