"""What sums up a benchmark of corruptions: means where every part was measured, else a note."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from fap.evaluate.numbers import Number, Part
from fap.evaluate.published import MADE_HERE, SEVERITIES
from fap.evaluate.titles import CALIBRATION, CLEAN, METRICS, corrupted, title_of_benchmark
from fap.evaluate.work import Report
from fap.tasks.base import CorruptionMean, Result

MOST_LISTED = 10  # lines of one sort
MOST_ABSENT = 3  # corruptions that a note names
MOST_PARTS = 4  # of a note
OF_THE_PAPER = ("computed", MADE_HERE, "imagenet_c")  # benchmarks of which it has numbers


def benchmarks_of(report: Report) -> list[Measured]:
    """In the order of the results."""
    found: dict[str, dict[str, dict[int, Result]]] = {}
    for key, result in report.results.items():
        one = corrupted(key)
        if one is not None:
            by_name = found.setdefault(one.benchmark, {})
            by_name.setdefault(one.corruption, {})[one.severity] = result
    return [Measured(benchmark, results, report) for benchmark, results in found.items()]


@dataclass(frozen=True)
class Measured:
    """What is known of one benchmark of corruptions."""

    benchmark: str
    results: dict[str, dict[int, Result]]  # by corruption and severity
    report: Report

    @property
    def words(self) -> str:
        return title_of_benchmark(self.benchmark)

    @cached_property
    def values(self) -> dict[str, dict[int, float]]:
        """The task's measure, a fraction, by corruption and severity."""
        measured = self.report.task.measured
        return {
            name: {severity: measured(result) for severity, result in by.items()}
            for name, by in self.results.items()
        }

    def rows(self) -> dict[str, Number]:
        """The mean of all sets and of what it adds to clean images, the task's means but for those
        that must not be computed, and each corruption.
        """
        task = self.report.task
        all_sets = [value for by in self.values.values() for value in by.values()]
        sets = f"all {len(all_sets)} sets ({self.words})"
        if len(all_sets) == 1:
            sets = f"1 set ({self.words})"
        mean = fmean(all_sets)
        rows = {f"{task.measure}, {sets}": self._number(100 * mean, headline=True)}

        by_corruption = {name: fmean(by.values()) for name, by in self.values.items()}
        clean = task.measured(self.report.results[CLEAN])
        for summary in self._means():
            covered = {name: by_corruption[name] for name in summary.corruptions}
            title = f"{task.measure}, {summary.title} ({self.words})"
            percent = summary.percent(covered, clean)
            rows[title] = self._number(percent, paper=self._paper(summary))
        if task.measure_better == "less" and not self._other_counts_than_clean():
            rows[f"{task.measure} above clean, {sets}"] = self._number(100 * (mean - clean))
        rows |= self._calibration(sets)

        for name, by in self.values.items():
            title = f"{task.measure}, {name} ({self.words}){_severities(by)}"
            rows[title] = self._number(100 * by_corruption[name], part="corruption")
        return rows

    def notes(self) -> list[str]:
        """Why means were not computed, and what a reader must know of those that were."""
        notes = [
            f"{title} ({self.words}): not computed: {why}" for title, why in self._refused().items()
        ]
        if self.benchmark in ("computed", MADE_HERE):
            notes += [f"{mean.title}: {mean.note}" for mean in self._means() if mean.note]
        return notes

    def _number(
        self,
        value: float,
        *,
        paper: float | None = None,
        part: Part = "mean",
        headline: bool = False,
    ) -> Number:
        better = self.report.task.measure_better
        return Number(value, paper, better=better, part=part, headline=headline)

    def _calibration(self, sets: str) -> dict[str, Number]:
        """The mean calibration error, where every set has one."""
        found = [result.get(CALIBRATION) for by in self.results.values() for result in by.values()]
        errors = [error for error in found if error is not None]
        if len(errors) < len(found):
            return {}
        number = Number(100 * fmean(errors), better="less", part="mean")
        return {f"{METRICS[CALIBRATION]}, {sets}": number}

    def _means(self) -> list[CorruptionMean]:
        """Those of the task's that may be computed."""
        refused = self._refused()
        return [mean for mean in self._about_this() if mean.title not in refused]

    def _refused(self) -> dict[str, str]:
        """The reason for each of the task's means that must not be computed, by its title."""
        reasons = {mean.title: self._why_not(mean) for mean in self._about_this()}
        return {title: why for title, why in reasons.items() if why}

    def _about_this(self) -> list[CorruptionMean]:
        """The task's means, but for those of other corruptions altogether."""
        means = self.report.task.means
        return [mean for mean in means if not self.results.keys().isdisjoint(mean.corruptions)]

    def _paper(self, mean: CorruptionMean) -> float | None:
        if self.benchmark not in OF_THE_PAPER or self.report.small:
            return None
        return self.report.paper.get(mean.paper)

    def _why_not(self, mean: CorruptionMean) -> str:
        """Why a mean must not be computed; empty where it may."""
        of_imagenet_c = self.benchmark in OF_THE_PAPER and not self.report.small
        if mean.only_imagenet_c and not of_imagenet_c:
            return mean.only_imagenet_c
        why = lacking(self.results, mean.corruptions) or _odd_counts(self.results)
        if not why and mean.of_clean:
            why = self._other_counts_than_clean()
        return why

    def _other_counts_than_clean(self) -> str:
        """Empty where clean and corrupted images are as many, and so may be the same."""
        clean = self.report.results[CLEAN]["count"]
        counts = {result["count"] for by in self.results.values() for result in by.values()}
        if counts == {clean}:
            return ""
        return f"clean images are {clean:,}, those of the sets {_named_counts(counts)}"


def capped(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    if len(lines) <= MOST_LISTED:
        return list(lines)
    return [*lines[:MOST_LISTED], f"and {len(lines) - MOST_LISTED} more"]


def lacking(measured: Mapping[str, Mapping[int, object]], corruptions: Sequence[str]) -> str:
    """What a mean over `corruptions` at five severities lacks; empty if nothing.

    Such as `no snow, fog; frost lacks severity 4`.
    """
    parts = []
    absent = [name for name in corruptions if name not in measured]
    if absent:
        part = f"no {', '.join(absent[:MOST_ABSENT])}"
        if len(absent) > MOST_ABSENT:
            part += f" and {len(absent) - MOST_ABSENT} more"
        parts.append(part)
    for name in corruptions:
        if name not in measured:
            continue
        missing = [severity for severity in SEVERITIES if severity not in measured[name]]
        if missing:
            parts.append(f"{name} lacks {_named(missing)}")
    if len(parts) > MOST_PARTS:
        shown = parts[: MOST_PARTS - 1]
        parts = [*shown, f"{len(parts) - len(shown)} more lack some"]
    return "; ".join(parts)


def _odd_counts(results: Mapping[str, Mapping[int, Result]]) -> str:
    """Which sets have another number of images than most; empty if none."""
    counts = Counter(result["count"] for by in results.values() for result in by.values())
    if len(counts) == 1:
        return ""
    usual = counts.most_common(1)[0][0]
    odd = [
        f"{name} at severity {severity} has {result['count']:,} images"
        for name, by in results.items()
        for severity, result in by.items()
        if result["count"] != usual
    ]
    return f"{'; '.join(capped(odd))}, but most sets have {usual:,}"


def _severities(by: Mapping[int, float]) -> str:
    """For a row's title: over which severities its mean is, unless it is over all."""
    if len(by) == len(SEVERITIES):
        return ""
    return f", over {_named(sorted(by))} only"


def _named(severities: Sequence[int]) -> str:
    numbers = ", ".join(str(severity) for severity in severities)
    if len(severities) == 1:
        return f"severity {numbers}"
    return f"severities {numbers}"


def _named_counts(counts: set[float]) -> str:
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
