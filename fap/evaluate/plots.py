"""The plots of a report. Accuracy and error are never on one axis, and a group has one colour.

A plot is drawn only where there is something to draw: `PLOTS` says what each one is, and its
function gives None otherwise.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fap.evaluate import by_class
from fap.evaluate.corruption_plots import corruptions, severities
from fap.evaluate.groups import Group, head, rows_of
from fap.evaluate.plot_style import (
    BAR_SHARE,
    COLOURS,
    DPI,
    ERROR_BARS,
    FONT_SIZE,
    INCHES_PER_BAR,
    MARKERS,
    MOST_GROUPS,
    STYLE,
    add_legend,
    error_bars,
    legend_inches,
    mean_and_std,
    new_figure,
    unmarked,
)
from fap.evaluate.titles import CLEAN, attacked, title_of_method
from fap.evaluate.work import Report
from fap.tasks.class_counts import ClassCounts
from pipelines.extras import needs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SETS = 60  # rows of bars


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
    height = 1.6 + INCHES_PER_BAR * len(rows) * (len(drawn) + 0.8) + legend_inches(groups)
    figure = new_figure(9, height)
    axes = figure.add_subplot(xlabel=f"{base.reports[0].task.rows[_primary(base)]}, percent")
    bar = BAR_SHARE / len(drawn)
    most = 0.0
    for i, group in enumerate(drawn):
        means, stds = _means(group, rows)
        middles = np.arange(len(rows)) + (i + 0.5 - len(drawn) / 2) * bar
        axes.barh(middles, means, bar, color=COLOURS[i], xerr=error_bars(stds), **ERROR_BARS)
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
    axes.set_yticks(np.arange(len(rows)), [unmarked(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * most or 1)
    axes.grid(axis="x")
    add_legend(figure, groups)
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
        found.append(mean_and_std(values) if values else (math.nan, math.nan))
    means, stds = np.array(found).T
    return means, stds


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
    figure = new_figure(max(5.0, 4.2 * len(methods)), 3.6 + legend_inches(groups))
    panels = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    for axes, (method, keys) in zip(panels, methods.items(), strict=True):
        for i, group in enumerate(drawn):
            points = _attack_points(group, keys)
            if points:
                eps, means, stds = np.array(points).T
                style = {"marker": MARKERS[i], "markersize": 6, "linewidth": 1.8, "capsize": 3}
                axes.errorbar(eps, means, error_bars(stds), color=COLOURS[i], **style)
        axes.set_title(title_of_method(method))
        axes.set_xlabel("eps, grey levels of 255")
        axes.set_xlim(left=0)
        axes.grid()
    panels[0].set_ylim(bottom=0)  # after all: it fixes the top of the axis that they share
    panels[0].set_ylabel(f"{drawn[0].reports[0].task.rows[_primary(drawn[0])]}, percent")
    add_legend(figure, groups)
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
        points.append((0.0, *mean_and_std(clean)))
    return sorted(points)


def _attack_point(group: Group, key: str) -> tuple[float, float, float] | None:
    attack = attacked(key)
    assert attack is not None
    eps = _eps(attack.eps)
    assert eps is not None
    values = [100 * r.results[key][r.task.primary] for r in group.reports if key in r.results]
    return (eps, *mean_and_std(values)) if values else None


# ---------------------------------------------------------------------- confusion


def confusion(report: Report, counts: ClassCounts) -> Figure:
    """The share of each class that was taken for each other one."""
    assert counts.confusion is not None
    figure = new_figure(8, 8)
    title = unmarked(head(report, tells_bn=report.settings["bn"] == "aux"))
    axes = figure.add_subplot(xlabel="taken for", ylabel="class", title=title)
    n_images = np.maximum(counts.n_images, 1)[:, None]
    shown = axes.imshow(100 * counts.confusion / n_images, vmin=0, vmax=100, cmap="Blues")
    names = [unmarked(name) for name in by_class.names_of(counts, report.names)]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(shown, label="percent of the class", shrink=0.8)
    return figure


# ---------------------------------------------------------------------- all

PLOTS: dict[str, Callable[[Sequence[Group]], Figure | None]] = {
    "report.png": accuracy,
    "corruptions.png": corruptions,
    "severity.png": severities,
    "attacks.png": attacks,
}
