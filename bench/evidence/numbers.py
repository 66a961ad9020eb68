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
    "main/clean": Measure("right on the first clean images"),  # those that are corrupted
    "main/corrupted": Measure("right on corrupted images"),
    "main/lost": Measure("lost to corruptions", better="less"),  # of what is right on clean ones
    "main/pgd10/1": Measure("right under PGD-10, eps 1"),
    "main/pgd10/2": Measure("right under PGD-10, eps 2"),
    "main/pgd10/4": Measure("right under PGD-10, eps 4"),
    "main/autoattack/1": Measure("right under AutoAttack, eps 1"),
    "main/autoattack/2": Measure("right under AutoAttack, eps 2"),
    "main/autoattack/4": Measure("right under AutoAttack, eps 4"),
    "main/ece": Measure("calibration error", better="less"),
}


def number(row: Row, name: str) -> float | None:
    """One of the row's numbers, None if it was not measured.

    `NORMS/lost` is the difference of two of them.
    """
    numbers = row["numbers"]
    norms, _, what = name.partition("/")
    if what == "lost" and f"{norms}/corrupted" in numbers:
        return numbers[f"{norms}/clean"] - numbers[f"{norms}/corrupted"]
    return numbers.get(name)


@dataclass(frozen=True)
class Rows:
    """All rows of a study."""

    rows: Sequence[Row]

    def of(self, regime: Regime, arm: str) -> list[Row]:
        """In the order of the seeds."""
        found = [row for row in self.rows if (row["regime"], row["arm"]) == (regime.name, arm)]
        return sorted(found, key=lambda row: row["seed"])

    def by_seed(self, regime: Regime, arm: str, name: str) -> dict[int, float]:
        """Where it was measured."""
        found = {row["seed"]: number(row, name) for row in self.of(regime, arm)}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, regime: Regime, arm: str, name: str) -> float:
        """NaN where it was not measured."""
        values = self.by_seed(regime, arm, name).values()
        return fmean(values) if values else float("nan")

    def difference(
        self, regime: Regime, arm: str, base: str, name: str, base_name: str | None = None
    ) -> Difference | None:
        """`arm` minus `base`, in points, over the seeds for which both have it; None without any.

        `base_name`: the number of `base`, where it is another one than `name`.
        """
        ours = self.by_seed(regime, arm, name)
        theirs = self.by_seed(regime, base, base_name or name)
        seeds = [seed for seed in ours if seed in theirs]
        if not seeds:
            return None
        return paired([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
