"""Which checkpoints are one way of training, how groups are called, and how they compare.

Checkpoints belong together if their runs differ in nothing but the seed: by the settings in the
checkpoints and the content of the training images, not by names.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fap.evaluate.compare import Difference, paired, unpaired, untested
from fap.evaluate.load import WhichWeights
from fap.evaluate.numbers import Number
from fap.evaluate.results import digest
from fap.evaluate.table import Table, table_of
from fap.evaluate.work import Report
from fap.run_settings import differing
from pipelines.files import listed, readable

MOST_SETTINGS = 6  # that a note names
SEED_FOLLOWS = r"([-_.]+(seed|s)?)?[-_.]*$"  # the end of what names have in common


@dataclass(frozen=True)
class Group:
    """One way of training, a report for each of its seeds."""

    name: str  # in tables and plots: with its seeds
    short: str  # in words: without them where that is enough
    reports: tuple[Report, ...]
    tables: tuple[Table, ...]
    numbers: tuple[int, ...]  # of the reports, from 1 on, in the order in which they were given

    @property
    def seeds(self) -> list[int]:
        return [report.seed for report in self.reports]

    def number(self, row: str) -> Number | None:
        """Of the first seed that has it: what the row's numbers are."""
        return next((t.rows[row] for t in self.tables if row in t.rows), None)

    def values(self, row: str) -> dict[int, float]:
        """By seed, for the seeds that have the row."""
        return {
            report.seed: table.rows[row].ours
            for report, table in zip(self.reports, self.tables, strict=True)
            if row in table.rows
        }


def groups_of(reports: Sequence[Report]) -> list[Group]:
    """In the order in which their first checkpoints were given; the first one is the baseline."""
    bns = {report.settings["bn"] for report in reports}
    by_way: dict[str, list[Report]] = {}
    for report in reports:
        by_way.setdefault(_way(report), []).append(report)
    parts = [part for same in by_way.values() for part in _without_repeated_seeds(same)]
    parts.sort(key=lambda part: _place(part[0], reports))
    names = _different([_name(part, tells_bn=len(bns) > 1) for part in parts])
    shorts = [_common_name(part) for part in parts]
    if len(set(shorts)) < len(shorts):
        shorts = names
    return [
        Group(
            name,
            short,
            tuple(part),
            tuple(table_of(report) for report in part),
            tuple(1 + _place(report, reports) for report in part),
        )
        for name, short, part in zip(names, shorts, parts, strict=True)
    ]


def single(group: Group, *, tells_bn: bool) -> list[Group]:
    """Each checkpoint of a group as one of its own."""
    heads = [head(report, tells_bn=tells_bn) for report in group.reports]
    return [
        Group(name, name, (report,), (table,), (number,))
        for name, report, table, number in zip(
            heads, group.reports, group.tables, group.numbers, strict=True
        )
    ]


def _place(report: Report, reports: Sequence[Report]) -> int:
    return next(place for place, one in enumerate(reports) if one is report)


def _way(report: Report) -> str:
    """What checkpoints of one way of training have in common. Other weights stand alone."""
    what: dict[str, Any] = {"bn": report.settings["bn"], "weights": report.weights}
    if report.training is None:
        what |= {"content": report.content, "file": report.checkpoint}
    else:
        what |= {"settings": report.training.settings, "data": report.training.data}
    return digest(what)


def _without_repeated_seeds(reports: list[Report]) -> list[list[Report]]:
    """One group, unless a seed is there twice: then one for each step, or for each checkpoint."""
    if _has_each_seed_once(reports):
        return [reports]
    by_step: dict[int, list[Report]] = {}
    for report in reports:
        by_step.setdefault(report.step, []).append(report)
    parts: list[list[Report]] = []
    for same in by_step.values():
        parts += [same] if _has_each_seed_once(same) else [[report] for report in same]
    return parts


def _has_each_seed_once(reports: Sequence[Report]) -> bool:
    return len({report.seed for report in reports}) == len(reports)


# ---------------------------------------------------------------------- names


def head(report: Report, *, tells_bn: bool = False) -> str:
    """A checkpoint's name in tables and plots; weights that no run made have no seed."""
    name = report.name
    if report.training is not None:
        step = f"step {report.step}{of_average(report.weights)}"
        name = f"{name}, seed {report.seed}, {step}"
    return f"{name}, {report.settings['bn']} BN" if tells_bn else name


def of_average(weights: WhichWeights) -> str:
    return ", EMA" if weights == "ema" else ""


def _name(reports: Sequence[Report], *, tells_bn: bool) -> str:
    """`vanilla, 3 seeds (0, 1, 2), step 500`; that of a lone checkpoint says its seed."""
    first = reports[0]
    if len(reports) == 1:
        return head(first, tells_bn=tells_bn)
    seeds = ", ".join(str(report.seed) for report in reports)
    steps = sorted({report.step for report in reports})
    step = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    name = f"{_common_name(reports)}, {len(reports)} seeds ({seeds}), {step}"
    name += of_average(first.weights)
    return f"{name}, {first.settings['bn']} BN" if tells_bn else name


def _common_name(reports: Sequence[Report]) -> str:
    """Their name, or what their names begin with, or all of them."""
    names = list(dict.fromkeys(report.name for report in reports))
    if len(names) == 1:
        return names[0]
    common = os.path.commonprefix(names)  # noqa: RUF071 (of texts, not of paths)
    return re.sub(SEED_FOLLOWS, "", common) or listed(names)


def _different(names: Sequence[str]) -> list[str]:
    """A number is added to names that are there twice."""
    n_times = Counter(names)
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if n_times[name] == 1 else f"{name} [{seen[name]}]")
    return found


# ---------------------------------------------------------------------- comparison


def rows_of(groups: Iterable[Group]) -> list[str]:
    """The titles of all rows, in the order of the tables."""
    tables = [table for group in groups for table in group.tables]
    return list(dict.fromkeys(row for table in tables for row in table.rows))


def difference(group: Group, base: Group, row: str) -> Difference | None:
    """`group` minus `base`, in the row's unit; None where either has no number.

    Paired over the seeds that both have, if these are several, or all. Without scipy there is no
    interval.
    """
    ours, theirs = group.values(row), base.values(row)
    if not ours or not theirs:
        return None
    seeds = [seed for seed in ours if seed in theirs]
    is_paired = len(seeds) > 1 or ours.keys() == theirs.keys()
    a, b = list(ours.values()), list(theirs.values())
    if is_paired:
        a, b = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    try:
        return paired(a, b) if is_paired else unpaired(a, b)
    except ImportError as error:
        return untested(a, b, is_paired=is_paired, why=str(error))


def paired_seeds(group: Group, base: Group) -> list[int]:
    """The seeds that pair them; none where they are compared unpaired."""
    common = [seed for seed in group.seeds if seed in base.seeds]
    return common if len(common) > 1 or sorted(group.seeds) == sorted(base.seeds) else []


def notes_on(groups: Sequence[Group]) -> list[str]:
    """What readers must know of the groups: unequal steps in one, settings that set them apart."""
    notes = []
    for group in groups:
        if len({report.step for report in group.reports}) > 1:
            notes.append(f"{group.short}: its checkpoints are of different steps")
        notes += _unfinished(group)
    base = groups[0]
    for group in groups[1:]:
        told = _apart(group, base)
        if told:
            notes.append(f"{group.short} is trained with {told} than {base.short}")
    return notes


def _unfinished(group: Group) -> list[str]:
    """Of checkpoints from the middle of a run: their numbers cost more than their steps."""
    found = []
    for report in group.reports:
        training = report.training
        if training is None or training.steps_of_run is None:
            continue
        if training.steps < training.steps_of_run:
            found.append(
                f"{head(report)}: from the middle of its run, which was set to "
                f"{training.steps_of_run:,} steps; its cost is that up to the checkpoint"
            )
    return found


def _apart(group: Group, base: Group) -> str:
    """`other settings (...) and other images`; empty where nothing is known, or nothing differs."""
    ours, theirs = group.reports[0].training, base.reports[0].training
    if ours is None or theirs is None:
        return ""
    told = []
    fields = differing(ours.settings, theirs.settings)
    if fields:
        values = [
            f"{field} = {_value(ours.settings, field)}, not {_value(theirs.settings, field)}"
            for field in fields[:MOST_SETTINGS]
        ]
        if len(fields) > MOST_SETTINGS:
            values.append(f"and {len(fields) - MOST_SETTINGS} more")
        told.append(f"other settings ({'; '.join(values)})")
    if ours.data != theirs.data:
        told.append("other images")
    return " and ".join(told)


def _value(settings: dict[str, Any], field: str) -> str:
    return readable(str(settings[field]), 60)
