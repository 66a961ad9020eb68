"""How the plots of a report look: colours, the legend, error bars, labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fap.evaluate.compare import mean_std
from fap.evaluate.groups import Group
from pipelines.files import readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008): colours that the colour-blind tell apart, the darkest first.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vP*X"  # so that lines are told apart in black and white too
MOST_GROUPS = len(COLOURS)  # of a plot; the tables have all
BAR_SHARE = 0.8  # of the place of a row's bars
INCHES_PER_BAR = 0.19
FONT_SIZE = 11
LINES_OF_A_COLUMN = 4  # of the legend; with more it has two
DPI = 150
MOST_LABEL = 70  # characters
STYLE: Any = {
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
}
ERROR_BARS: dict[str, Any] = {"ecolor": "#333333", "capsize": 2, "error_kw": {"elinewidth": 1}}


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # one of its own needs no display

    return Figure(figsize=(width, height), layout="constrained")


def error_bars(stds: np.ndarray) -> np.ndarray | None:
    """Error bars, unless there is one seed everywhere."""
    return None if np.isnan(stds).all() else np.nan_to_num(stds)


def add_legend(figure: Figure, groups: Sequence[Group]) -> None:
    """Above the panels, a line for each group."""
    from matplotlib.patches import Patch

    drawn = groups[:MOST_GROUPS]
    handles = [
        Patch(color=colour, label=unmarked(group.name))
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


def legend_inches(groups: Sequence[Group]) -> float:
    n_lines = len(groups[:MOST_GROUPS]) + len(_legend_notes(groups))
    return 0.24 * (n_lines if n_lines <= LINES_OF_A_COLUMN else (n_lines + 1) // 2)


def wrapped(text: str) -> str:
    return text.replace(", ", ",\n")


def unmarked(text: str) -> str:
    """A label that matplotlib shows as it is.

    It reads `$` as mathematics, and leaves labels that start with `_` out of the legend.
    """
    return readable(text, MOST_LABEL).replace("$", r"\$").lstrip("_")


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    mean, std = mean_std(values)
    return mean, math.nan if std is None else std
