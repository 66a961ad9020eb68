"""A study's table and plot, in which arms are compared seed by seed.

A library of `bench.study` and `bench.gpu.study`; `report` writes FILE.json, .md and .png.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from bench.common import write_json

MEASURES = ("clean", "corrupted")  # test images

HEAD = (
    "arm",
    "n",
    "clean %",
    "corrupted %",
    "clean - vanilla",
    "corrupted - vanilla",
    "train adv / clean %",
    "image passes",
    "image passes / vanilla",
    "seconds",
)

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # by arm, a summary per seed


def table(rows: Rows) -> str:
    """Markdown: mean +- std per arm, and differences to vanilla.

    Differences are paired by seed, with 95% confidence intervals. Cost is compared by image passes.
    Seconds are those of a clock on the wall: runs that shared the machine with different neighbours
    cannot be compared by them.
    """
    lines = [f"| {' | '.join(HEAD)} |", "|---" + "|--:" * (len(HEAD) - 1) + "|"]
    for arm in rows:
        lines.append(f"| {' | '.join(_cells(arm, rows))} |")
    return "\n".join(lines)


def _cells(arm: str, rows: Rows) -> list[str]:
    """An arm's line of the table."""
    runs = rows[arm]
    cells = [arm, str(len(runs))]
    for measure in MEASURES:
        cells.append(mean_std(_column(runs, measure)))
    for measure in MEASURES:
        gap = ""
        if arm != "vanilla":
            gap = interval(_column(runs, measure) - _column(rows["vanilla"], measure))
        cells.append(gap)
    train_adv = _column(runs, "train_adv")
    training = ""
    if not np.isnan(train_adv).any():
        training = f"{train_adv.mean():.1f} / {_column(runs, 'train_clean').mean():.1f}"
    cells.append(training)
    passes = runs[0]["image_passes"]
    cells.append(f"{passes:,}")
    cells.append(f"{passes / rows['vanilla'][0]['image_passes']:.3f}")
    cells.append(f"{np.median(_column(runs, 'seconds')):.0f}")
    return cells


def _column(runs: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """(seeds,): NaN where a run has no such number."""
    return np.array([run[key] for run in runs], dtype=float)


def mean_std(values: np.ndarray) -> str:
    said = f"{values.mean():.2f}"
    if len(values) > 1:
        said += f" ± {values.std(ddof=1):.2f}"
    return said


def interval(differences: np.ndarray) -> str:
    """Mean and 95% interval of the paired t-test."""
    mean = differences.mean()
    if len(differences) < 2:
        return f"{mean:+.2f}"
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def bars(axes: Any, groups: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw `groups`: by label, by arm, one value per seed. A bar is their mean, a dot one seed."""
    arms = list(next(iter(groups.values())))
    width = 0.8 / len(arms)
    left = np.arange(len(groups))
    for i, arm in enumerate(arms):
        at = left + (i + 0.5) * width
        values = np.array([group[arm] for group in groups.values()])  # (groups, seeds)
        axes.bar(at, values.mean(1), width, label=arm, color=f"C{i}", alpha=0.6)
        axes.plot(at, values, ".", color="black", markersize=4)
    axes.set_xticks(left + 0.4, list(groups))
    axes.set_ylabel("percent right")
    axes.set_ylim(bottom=0)


def plot(rows: Rows, file: Path) -> None:
    """Accuracy on clean and on corrupted images. fap-eval plots what each corruption does."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    groups = {}
    for measure in MEASURES:
        groups[measure] = {arm: [run[measure] for run in runs] for arm, runs in rows.items()}
    bars(axes, groups)
    axes.legend()
    figure.savefig(file, dpi=120)


def report(rows: Rows, size: Mapping[str, Any], out: Path) -> str:
    """Write OUT.json, .md and .png; returns the table."""
    text = table(rows)
    plot(rows, out.with_suffix(".png"))
    write_json(out.with_suffix(".json"), {"size": size, "runs": rows})
    out.with_suffix(".md").write_text(text + "\n")
    return text
