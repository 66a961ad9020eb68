"""The plots of a report. Accuracy and error are never on one axis, and a group has one colour.

A plot is drawn only where there is something to draw: `PLOTS` says what each one is, and its
function gives None otherwise.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fap.evaluate import by_class
from fap.evaluate.compare import mean_std
from fap.evaluate.corrupted import benchmarks_of
from fap.evaluate.groups import Group, head, rows_of
from fap.evaluate.titles import (
    CLEAN,
    FAMILIES,
    attacked,
    family_of,
    title_of_benchmark,
    title_of_method,
)
from fap.evaluate.work import Report
from fap.tasks.class_counts import ClassCounts
from pipelines.extras import needs
from pipelines.files import readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008): colours that the colour-blind tell apart, the darkest first.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vP*X"  # so that lines are told apart in black and white too
MOST_GROUPS = len(COLOURS)  # of a plot; the tables have all
MOST_SETS = 60  # rows of bars
BAR_SHARE = 0.8  # of the place of a row's bars
INCHES_PER_BAR = 0.19
FONT_SIZE = 11
LINES_OF_A_COLUMN = 4  # of the legend; with more it has two
DPI = 150
MOST_LABEL = 70  # characters
OTHERS = "others"
STYLE: Any = {
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
}


def png(draw: Callable[..., Figure | None], *of: Any) -> bytes | None:
    """What one of this module's functions draws; None if that is nothing. Raises ImportError."""
    with needs("plots", "the plot of a report"):
        import matplotlib
    with matplotlib.rc_context(STYLE):
        figure = draw(*of)
        if figure is None:
            return None
        file = io.BytesIO()
        figure.savefig(file, dpi=DPI, format="png")
    return file.getvalue()


# ---------------------------------------------------------------------- accuracy


def accuracy(groups: Sequence[Group]) -> Figure | None:
    """Horizontal bars: the task's first metric on every single set and under every attack."""
    drawn = groups[:MOST_GROUPS]
    base = drawn[0]
    rows = [row for row in rows_of(drawn) if _part(drawn, row) == "accuracy"][:MOST_SETS]
    height = 1.6 + INCHES_PER_BAR * len(rows) * (len(drawn) + 0.8) + _legend_inches(groups)
    figure = _figure(9, height)
    axes = figure.add_subplot(xlabel=f"{base.reports[0].task.rows[_primary(base)]}, percent")
    bar = BAR_SHARE / len(drawn)
    most = 0.0
    for i, group in enumerate(drawn):
        means, stds = _means(group, rows)
        middles = np.arange(len(rows)) + (i + 0.5 - len(drawn) / 2) * bar
        axes.barh(middles, means, bar, color=COLOURS[i], xerr=_bars_of(stds), **_ERROR_BARS)
        ends = np.nan_to_num(means) + np.nan_to_num(stds)
        for middle, mean, end in zip(middles, means, ends, strict=True):
            if not math.isnan(mean):
                axes.annotate(
                    f"{mean:.1f}",
                    (end, middle),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=FONT_SIZE - 2.5,
                )
        most = max(most, *ends)
    axes.set_yticks(np.arange(len(rows)), [_unmarked(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * most or 1)
    axes.grid(axis="x")
    _legend(figure, groups)
    return figure


def _primary(group: Group) -> str:
    return group.reports[0].task.primary


def _part(groups: Sequence[Group], row: str) -> str:
    numbers = [group.number(row) for group in groups]
    return next(number.part for number in numbers if number is not None)


def _means(group: Group, rows: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:  # (rows,) each
    """Means and standard deviations; NaN where there are none."""
    found = []
    for row in rows:
        values = list(group.values(row).values())
        found.append(_mean_std(values) if values else (math.nan, math.nan))
    means, stds = np.array(found).T
    return means, stds


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    mean, std = mean_std(values)
    return mean, math.nan if std is None else std


# ---------------------------------------------------------------------- corruptions


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
    figure = _figure(width, 3.8 * len(benchmarks) + _legend_inches(groups) + 0.3)
    panels = figure.subplots(len(benchmarks), 1, squeeze=False)[:, 0]
    for axes, (benchmark, by_group) in zip(panels, benchmarks.items(), strict=True):
        _draw_corruptions(axes, by_group)
        axes.set_title(title_of_benchmark(benchmark))
        axes.set_ylabel(f"{drawn[0].reports[0].task.measure}, percent")
    _legend(figure, groups)
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
            found.append(_mean_std(values) if values else (math.nan, math.nan))
        # Of those that all groups measured: else the bars would be means of different things.
        means = [_mean_of(by_name, _common(by_group)) for by_name in seeds]
        heights, stds = np.array([_mean_std(means), *found]).T
        middles = places + (i + 0.5 - len(by_group) / 2) * bar
        axes.bar(middles, heights, bar, color=COLOURS[i], yerr=_bars_of(stds), **_ERROR_BARS)
    axes.set_xticks(
        places,
        ["mean", *(_unmarked(name.replace("_", " ")) for name in names)],
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
    size = (max(5.0, 2.3 * n_columns + 0.6), 3.3 * len(panels) + _legend_inches(groups) + 0.4)
    figure = _figure(*size)
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
        row[0].set_ylabel(f"{_wrapped(title_of_benchmark(benchmark))}\n{measure}, percent")
    _legend(figure, groups)
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


# ---------------------------------------------------------------------- attacks


def attacks(groups: Sequence[Group]) -> Figure | None:
    """Accuracy over eps, a panel for each method."""
    drawn = groups[:MOST_GROUPS]
    methods: dict[str, list[str]] = {}
    for report in (report for group in drawn for report in group.reports):
        for key in report.results:
            attack = attacked(key)
            if attack is not None and _eps(attack.eps) is not None:
                keys = methods.setdefault(attack.method, [])
                keys += [key] if key not in keys else []
    methods = {method: keys for method, keys in methods.items() if len(keys) > 1}
    if not methods:  # a single strength makes no line
        return None
    figure = _figure(max(5.0, 4.2 * len(methods)), 3.6 + _legend_inches(groups))
    panels = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    for axes, (method, keys) in zip(panels, methods.items(), strict=True):
        for i, group in enumerate(drawn):
            points = _attack_points(group, keys)
            if points:
                eps, means, stds = np.array(points).T
                style = {"marker": MARKERS[i], "markersize": 6, "linewidth": 1.8, "capsize": 3}
                axes.errorbar(eps, means, _bars_of(stds), color=COLOURS[i], **style)
        axes.set_title(title_of_method(method))
        axes.set_xlabel("eps, grey levels of 255")
        axes.set_xlim(left=0)
        axes.grid()
    panels[0].set_ylim(bottom=0)  # after all: it fixes the top of the axis that they share
    panels[0].set_ylabel(f"{drawn[0].reports[0].task.rows[_primary(drawn[0])]}, percent")
    _legend(figure, groups)
    return figure


def _eps(text: str) -> float | None:
    """None for what is no number."""
    try:
        eps = float(text)
    except ValueError:
        return None
    return eps if math.isfinite(eps) else None


def _attack_points(group: Group, keys: Sequence[str]) -> list[tuple[float, float, float]]:
    """(eps, mean, standard deviation), by eps; begins with the clean images if all are attacked."""
    points = []
    for key in keys:
        point = _attack_point(group, key)
        if point is not None:
            points.append(point)
    everyone = [report.results for report in group.reports]
    if points and all(
        results[CLEAN]["count"] == results[key]["count"]
        for results in everyone
        for key in keys
        if key in results
    ):
        primary = _primary(group)
        clean = [100 * results[CLEAN][primary] for results in everyone]
        points.append((0.0, *_mean_std(clean)))
    return sorted(points)


def _attack_point(group: Group, key: str) -> tuple[float, float, float] | None:
    attack = attacked(key)
    assert attack is not None
    eps = _eps(attack.eps)
    assert eps is not None
    values = [100 * r.results[key][r.task.primary] for r in group.reports if key in r.results]
    return (eps, *_mean_std(values)) if values else None


# ---------------------------------------------------------------------- confusion


def confusion(report: Report, counts: ClassCounts) -> Figure:
    """The share of each class that was taken for each other one."""
    assert counts.confusion is not None
    figure = _figure(8, 8)
    title = _unmarked(head(report, tells_bn=report.settings["bn"] == "aux"))
    axes = figure.add_subplot(xlabel="taken for", ylabel="class", title=title)
    n_images = np.maximum(counts.n_images, 1)[:, None]
    shown = axes.imshow(100 * counts.confusion / n_images, vmin=0, vmax=100, cmap="Blues")
    names = [_unmarked(name) for name in by_class.names_of(counts, report.names)]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(shown, label="percent of the class", shrink=0.8)
    return figure


# ---------------------------------------------------------------------- all

_ERROR_BARS: dict[str, Any] = {"ecolor": "#333333", "capsize": 2, "error_kw": {"elinewidth": 1}}

PLOTS: dict[str, Callable[[Sequence[Group]], Figure | None]] = {
    "report.png": accuracy,
    "corruptions.png": corruptions,
    "severity.png": severities,
    "attacks.png": attacks,
}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # one of its own needs no display

    return Figure(figsize=(width, height), layout="constrained")


def _bars_of(stds: np.ndarray) -> np.ndarray | None:
    """Error bars, unless there is one seed everywhere."""
    return None if np.isnan(stds).all() else np.nan_to_num(stds)


def _legend(figure: Figure, groups: Sequence[Group]) -> None:
    """Above the panels, a line for each group."""
    from matplotlib.patches import Patch

    drawn = groups[:MOST_GROUPS]
    handles = [
        Patch(color=colour, label=_unmarked(group.name))
        for colour, group in zip(COLOURS, drawn, strict=False)
    ]
    handles += [Patch(alpha=0, label=line) for line in _legend_notes(groups)]
    n_columns = 1 if len(handles) <= LINES_OF_A_COLUMN else 2
    figure.legend(handles=handles, loc="outside upper left", frameon=False, ncols=n_columns)


def _legend_notes(groups: Sequence[Group]) -> list[str]:
    drawn = groups[:MOST_GROUPS]
    notes = []
    if any(len(group.reports) > 1 for group in drawn):
        notes.append("bars and bands: ± standard deviation over the seeds")
    if len(groups) > len(drawn):
        notes.append(f"{len(groups) - len(drawn)} more in the tables")
    return notes


def _legend_inches(groups: Sequence[Group]) -> float:
    n_lines = len(groups[:MOST_GROUPS]) + len(_legend_notes(groups))
    return 0.24 * (n_lines if n_lines <= LINES_OF_A_COLUMN else (n_lines + 1) // 2)


def _wrapped(text: str) -> str:
    return text.replace(", ", ",\n")


def _unmarked(text: str) -> str:
    """A label that matplotlib shows as it is.

    It reads `$` as mathematics, and leaves labels that start with `_` out of the legend.
    """
    return readable(text, MOST_LABEL).replace("$", r"\$").lstrip("_")
