"""The numbers of a report: one column for each checkpoint, and notes on what no number shows."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from fap.evaluate.published import CORRUPTION_TITLES, SEVERITIES, SINGLE_TITLES
from fap.evaluate.work import Report
from fap.tasks.base import CorruptionMean, Result

# Benchmarks of one set, told by the task's primary metric.
SINGLE = SINGLE_TITLES
# Benchmarks of corruptions at five severities.
CORRUPTIONS = {"computed": "computed here, not the published files", **CORRUPTION_TITLES}
OF_CIFAR = ("cifar10_c", "cifar100_c")
FOLDER = "folder/"  # of the keys of a user's own sets
ATTACK = "attack/"  # keys of sets under attack begin with it: attack/METHOD/EPS
AUX_NOTE = (
    "aux BN: through the auxiliary norms, which trained on what was attacked; an exported "
    "model has the main ones (docs/glossary.md)"
)
MOST_LISTED = 10  # lines of one sort
MOST_ABSENT = 3  # corruptions that a note names
MOST_PARTS = 4  # of a note


class Number(NamedTuple):
    """Percent, but for what the task says is none, such as a loss."""

    ours: float
    paper: float | None = None


class Table(NamedTuple):
    """One checkpoint's column."""

    rows: dict[str, Number]
    notes: list[str]


def table_of(report: Report) -> Table:
    """The column and the notes of one checkpoint."""
    rows = _plain_rows(report)
    notes = _label_notes(report.labels)
    if report.settings["bn"] == "aux":
        notes.append(AUX_NOTE)
    notes += _attack_notes(report)
    for measured in _corruption_benchmarks(report):
        refused = measured.refused()
        rows |= measured.rows(refused)
        notes += [
            f"{title} ({measured.words}): not computed: {why}" for title, why in refused.items()
        ]
        notes += measured.notes(refused)
    notes += [f"not used: {line}" for line in capped(report.unused)]
    return Table(rows, notes)


def capped(lines: Sequence[str]) -> list[str]:
    """The first lines, and how many more there are."""
    if len(lines) <= MOST_LISTED:
        return list(lines)
    return [*lines[:MOST_LISTED], f"and {len(lines) - MOST_LISTED} more"]


def _plain_rows(report: Report) -> dict[str, Number]:
    """Clean images by every metric, and after the first of them the benchmarks of one set."""
    task = report.task
    clean = report.results["clean"]
    primary = task.primary
    rows = {task.rows[primary]: Number(100 * clean[primary], report.paper.get(primary))}
    for key, words in SINGLE.items():
        if key in report.results:
            reached = 100 * report.results[key][primary]
            rows[f"{words} {task.percents[primary]}"] = Number(reached, report.paper.get(key))
    rows |= _attack_rows(report)
    rows |= _shape_rows(report)
    for key, result in report.results.items():
        if key.startswith(FOLDER):
            title = f"{key.removeprefix(FOLDER)} {task.percents[primary]}"
            rows[title] = Number(100 * result[primary])
    for metric, title in task.rows.items():
        if metric == primary or metric not in clean:  # such as AP of a size that no object has
            continue
        value = clean[metric]
        if metric in task.percents:
            value *= 100
        rows[title] = Number(value)
    return rows


def _attack_rows(report: Report) -> dict[str, Number]:
    """The first metric under each attack."""
    task = report.task
    rows = {}
    for key, result in report.results.items():
        if key.startswith(ATTACK):
            _, method, eps = key.split("/")
            title = f"{task.percents[task.primary]} under {method}, eps {eps}"
            rows[title] = Number(100 * result[task.primary])
    return rows


def _attack_notes(report: Report) -> list[str]:
    """What a reader must know of the attacks."""
    keys = [key for key in report.results if key.startswith(ATTACK)]
    if not keys:
        return []
    count = report.results[keys[0]]["count"]  # the images of all attacks are the same
    how = dict.fromkeys(f"{key.split('/')[1]}: {report.settings[key]}" for key in keys)
    return [
        f"attacks: on {count:,} of the clean images, through the norms of the column; L-infinity, "
        f"untargeted, eps in grey levels of 0..255 ({'; '.join(how)})"
    ]


def _shape_rows(report: Report) -> dict[str, Number]:
    """Of cue conflict images; no bias where nothing was taken for its shape or its texture."""
    found = report.results.get("cue_conflict")
    if found is None:
        return {}
    rows = {"cue conflict, taken for the shape": Number(100 * found["top1"])}
    rows["cue conflict, taken for the texture"] = Number(100 * found["texture"])
    if not math.isnan(found["shape_bias"]):
        rows["shape bias (cue conflict)"] = Number(100 * found["shape_bias"])
    return rows


def _label_notes(labels: Mapping[str, str]) -> list[str]:
    """One line for each way in which labels were matched."""
    ways: defaultdict[str, list[str]] = defaultdict(list)
    for key, how in labels.items():
        benchmark = key if key.startswith(FOLDER) else key.split("/")[0]
        if benchmark not in ways[how]:
            ways[how].append(benchmark)
    if len(ways) == 1:
        return [f"labels of all sets: {how}" for how in ways]
    return [f"labels of {', '.join(benchmarks)}: {how}" for how, benchmarks in ways.items()]


# ---------------------------------------------------------------------- benchmarks of corruptions


@dataclass(frozen=True)
class _Measured:
    """What is known of one benchmark of corruptions."""

    benchmark: str  # one of CORRUPTIONS
    results: dict[str, dict[int, Result]]  # by corruption and severity
    report: Report

    @property
    def words(self) -> str:
        return CORRUPTIONS[self.benchmark]

    @property
    def means(self) -> Sequence[CorruptionMean]:
        """The task's; of ImageNet-C-bar none, which has corruptions of its own."""
        if self.benchmark == "imagenet_c_bar":
            return ()
        return self.report.task.means

    def refused(self) -> dict[str, str]:
        """The reason for each of the task's means that must not be computed, by its title."""
        reasons = {mean.title: self._why_not(mean) for mean in self.means}
        return {title: why for title, why in reasons.items() if why}

    def rows(self, refused: Mapping[str, str]) -> dict[str, Number]:
        """The mean of all sets, the task's means but for the refused ones, and each corruption."""
        task = self.report.task
        values = {
            name: {severity: task.measured(result) for severity, result in by.items()}
            for name, by in self.results.items()
        }
        all_sets = [value for by in values.values() for value in by.values()]
        every = f"{task.measure}, all {len(all_sets)} sets ({self.words})"
        rows = {every: Number(100 * fmean(all_sets))}

        by_corruption = {name: fmean(by.values()) for name, by in values.items()}
        clean = task.measured(self.report.results["clean"])
        for mean in self.means:
            if mean.title not in refused:
                covered = {name: by_corruption[name] for name in mean.corruptions}
                title = f"{task.measure}, {mean.title} ({self.words})"
                rows[title] = Number(mean.percent(covered, clean), self._paper(mean))

        for name, by in values.items():
            title = f"{task.measure}, {name} ({self.words}){_severities(by)}"
            rows[title] = Number(100 * by_corruption[name])
        return rows

    def notes(self, refused: Mapping[str, str]) -> list[str]:
        """What a reader must know of the means that were computed."""
        if self.benchmark != "computed":
            return []
        means = [mean for mean in self.means if mean.title not in refused]
        return [f"{mean.title}: {mean.note}" for mean in means if mean.note]

    def _paper(self, mean: CorruptionMean) -> float | None:
        """The paper's number; it has none for CIFAR-10-C and CIFAR-100-C."""
        if self.benchmark in OF_CIFAR:
            return None
        return self.report.paper.get(mean.paper)

    def _why_not(self, mean: CorruptionMean) -> str:
        """Why a mean must not be computed; empty where it may."""
        full_size = self.benchmark == "computed" and not self.report.small
        if mean.only_imagenet_c and self.benchmark != "imagenet_c" and not full_size:
            return mean.only_imagenet_c
        return lacking(self.results, mean.corruptions) or _odd_counts(self.results)


def _corruption_benchmarks(report: Report) -> list[_Measured]:
    """In the order of the results."""
    found: dict[str, dict[str, dict[int, Result]]] = {}
    for key, result in report.results.items():
        if key.split("/")[0] in CORRUPTIONS:
            benchmark, name, severity = key.split("/")
            found.setdefault(benchmark, {}).setdefault(name, {})[int(severity)] = result
    return [_Measured(benchmark, results, report) for benchmark, results in found.items()]


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
