"""The plots of accuracy under corruptions: bars for each, lines over the severities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fap.evaluate.corrupted import benchmarks_of
from fap.evaluate.groups import Group
from fap.evaluate.plot_style import (
    BAR_SHARE,
    COLOURS,
    ERROR_BARS,
    MARKERS,
    MOST_GROUPS,
    add_legend,
    error_bars,
    legend_inches,
    mean_and_std,
    new_figure,
    unmarked,
    wrapped,
)
from fap.evaluate.titles import FAMILIES, family_of, title_of_benchmark

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHERS = "others"


class Curve(NamedTuple):
    """Of one group and some corruptions, over the severities. Percent."""

    severities: list[int]
    means: np.ndarray  # (severities,), over the seeds
    stds: np.ndarray  # (severities,); NaN of one seed


ByName = Mapping[str, Mapping[int, float]]  # by corruption and severity, fractions


def _benchmarks(groups: Sequence[Group]) -> dict[str, list[list[ByName]]]:
    """By benchmark, by group: what each seed measured."""
    of_groups = [
        [{m.benchmark: m.values for m in benchmarks_of(report)} for report in group.reports]
        for group in groups
    ]
    names = dict.fromkeys(name for seeds in of_groups for found in seeds for name in found)
    return {
        name: [[found.get(name, {}) for found in seeds] for seeds in of_groups] for name in names
    }


def corruptions(groups: Sequence[Group]) -> Figure | None:
    """Vertical bars for every corruption, and their mean; a panel for each benchmark."""
    drawn = groups[:MOST_GROUPS]
    benchmarks = _benchmarks(drawn)
    if not benchmarks:
        return None
    n_bars = [len(_ordered(by_group)) + 1 for by_group in benchmarks.values()]
    width = min(20.0, max(7.0, 1.8 + max(n_bars) * (0.3 + 0.1 * len(drawn))))
    figure = new_figure(width, 3.8 * len(benchmarks) + legend_inches(groups) + 0.3)
    panels = figure.subplots(len(benchmarks), 1, squeeze=False)[:, 0]
    for axes, (benchmark, by_group) in zip(panels, benchmarks.items(), strict=True):
        _draw_corruptions(axes, by_group)
        axes.set_title(title_of_benchmark(benchmark))
        axes.set_ylabel(f"{drawn[0].reports[0].task.measure}, percent")
    add_legend(figure, groups)
    return figure


def _ordered(by_group: Sequence[Sequence[ByName]]) -> list[str]:
    """The corruptions that anyone measured, by family."""
    found = list(dict.fromkeys(name for seeds in by_group for by_name in seeds for name in by_name))
    known = [name for names in FAMILIES.values() for name in names if name in found]
    return [*known, *(name for name in found if name not in known)]


def _draw_corruptions(axes: Any, by_group: Sequence[Sequence[ByName]]) -> None:
    names = _ordered(by_group)
    places = _places(names)
    bar = BAR_SHARE / len(by_group)
    for i, seeds in enumerate(by_group):
        found = []
        for name in names:
            values = [_mean(by_name[name]) for by_name in seeds if name in by_name]
            found.append(mean_and_std(values) if values else (math.nan, math.nan))
        # Of those that all groups measured: else the bars would be means of different things.
        means = [_mean_of(by_name, _common(by_group)) for by_name in seeds]
        heights, stds = np.array([mean_and_std(means), *found]).T
        middles = places + (i + 0.5 - len(by_group) / 2) * bar
        axes.bar(middles, heights, bar, color=COLOURS[i], yerr=error_bars(stds), **ERROR_BARS)
    axes.set_xticks(
        places,
        ["mean", *(unmarked(name.replace("_", " ")) for name in names)],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_xlim(places[0] - 0.6, places[-1] + 0.6)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")


def _places(names: Sequence[str]) -> np.ndarray:  # (1 + names,)
    """Of the mean and of each corruption: there is a gap wherever another family begins."""
    families = ["mean", *(family_of(name) for name in names)]
    steps = [1.0 if a == b else 1.5 for a, b in pairwise(families)]
    return np.cumsum([0.0, *steps])


def _mean(by_severity: Mapping[int, float]) -> float:
    return 100 * float(np.mean(list(by_severity.values())))


def _common(by_group: Sequence[Sequence[ByName]]) -> list[str]:
    everyones = [by_name.keys() for seeds in by_group for by_name in seeds]
    return [name for name in _ordered(by_group) if all(name in names for names in everyones)]


def _mean_of(by_name: ByName, names: Sequence[str]) -> float:
    if not names:
        return math.nan
    return float(np.mean([_mean(by_name[name]) for name in names]))


# ---------------------------------------------------------------------- severities


def severities(groups: Sequence[Group]) -> Figure | None:
    """Lines over the severities: a panel for each family and for the mean, a row per benchmark."""
    drawn = groups[:MOST_GROUPS]
    panels = {}
    for benchmark, by_group in _benchmarks(drawn).items():
        found = _severity_panels(by_group)
        if found:
            panels[benchmark] = found
    if not panels:
        return None
    n_columns = max(len(found) for found in panels.values())
    size = (max(5.0, 2.3 * n_columns + 0.6), 3.3 * len(panels) + legend_inches(groups) + 0.4)
    figure = new_figure(*size)
    grid = figure.subplots(len(panels), n_columns, squeeze=False, sharey="row")
    for row, (benchmark, found) in zip(grid, panels.items(), strict=True):
        for axes in row[len(found) :]:
            axes.set_visible(False)
        for axes, (title, curves) in zip(row, found.items(), strict=False):
            axes.set_title(title)
            _draw_lines(axes, curves)
            axes.set_xticks(range(1, 6))
            axes.set_xlim(0.8, 5.2)
            axes.set_xlabel("severity")
        measure = drawn[0].reports[0].task.measure
        row[0].set_ylabel(f"{wrapped(title_of_benchmark(benchmark))}\n{measure}, percent")
    add_legend(figure, groups)
    return figure


def _severity_panels(by_group: Sequence[Sequence[ByName]]) -> dict[str, list[Curve]]:
    """By the title of a panel, a curve for each group; empty where there are no two severities.

    Only what all groups measured at the same severities: a line is of the same corruptions all
    along, and so are the lines of one panel.
    """
    names = _common(by_group)
    by_seed = [by_name for seeds in by_group for by_name in seeds]
    at = [
        severity
        for severity in range(1, 6)
        if names and all(severity in by_name[name] for by_name in by_seed for name in names)
    ]
    if len(at) < 2:
        return {}
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family_of(name) or OTHERS, []).append(name)
    parts = {f"mean of {len(names)}": names}
    if len(families) > 1:
        parts |= {f"{family} ({len(some)})": some for family, some in families.items()}
    return {title: [_curve(seeds, some, at) for seeds in by_group] for title, some in parts.items()}


def _curve(seeds: Sequence[ByName], names: Sequence[str], at: list[int]) -> Curve:
    values = np.array([
        [np.mean([by_name[name][severity] for name in names]) for severity in at]
        for by_name in seeds
    ])  # fmt: skip
    stds = np.full(len(at), math.nan)
    if len(values) > 1:
        stds = values.std(0, ddof=1)
    return Curve(at, 100 * values.mean(0), 100 * stds)


def _draw_lines(axes: Any, curves: Sequence[Curve]) -> None:
    for i, (at, means, stds) in enumerate(curves):
        axes.plot(at, means, color=COLOURS[i], marker=MARKERS[i], markersize=5, linewidth=1.8)
        if not np.isnan(stds).any():
            low, high = means - stds, means + stds
            axes.fill_between(at, low, high, color=COLOURS[i], alpha=0.22, linewidth=0)
    axes.grid()
