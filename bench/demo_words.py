"""The demo's numbers in words: a table, the single seeds, and a verdict that the numbers decide.

A run is a dictionary: `seed`; `train_clean`, `clean`, `corrupted`, `adversarial` and `corruptions`
(by name) in percent of images that are right; `steps`, `image_passes`, `cpu_seconds` (None if the
run was interrupted).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from scipy import stats

Runs = Sequence[Mapping[str, Any]]
Rows = Mapping[str, Runs]  # by arm, each arm's in the order of the seeds
BASE, EQUAL_COST, EQUAL_STEPS = "vanilla", "fast_advprop", "fast_advprop_equal_steps"
LABELS = {
    BASE: "vanilla",
    EQUAL_COST: "Fast AdvProp, equal cost",
    EQUAL_STEPS: "Fast AdvProp, equal steps",
}
MEASURES = {
    "clean": "clean images",
    "corrupted": "corrupted images",
    "gaussian_noise": "Gaussian noise",
    "adversarial": "adversarial images",
}
MOST_COST = 1.05  # of vanilla's: what the project allows itself


@dataclass(frozen=True)
class Cost:
    """Fast AdvProp's whole run over vanilla's, steps only, with its 95% bootstrap interval."""

    ratio: float
    low: float
    high: float
    seconds_per_step: dict[str, float]  # mean, by arm


def value(run: Mapping[str, Any], measure: str) -> float:
    return run[measure] if measure in run else run["corruptions"][measure]


@dataclass(frozen=True)
class Difference:
    """Mean over the seeds of one arm's accuracy minus another's, in points; limits of the paired
    t-test (95%).
    """

    n: int
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `undecided`: the interval includes 0, as that of one seed, which has
        no limits, does.
        """
        if self.low <= 0 <= self.high:
            return "undecided"
        return "better" if self.low > 0 else "worse"

    def __str__(self) -> str:
        if self.n < 2:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def difference(ours: Runs, base: Runs, measure: str) -> Difference:
    """Of runs of the same seeds."""
    assert [r["seed"] for r in ours] == [r["seed"] for r in base]
    gaps = np.array(
        [value(a, measure) - value(b, measure) for a, b in zip(ours, base, strict=True)]
    )
    n, mean = len(gaps), float(gaps.mean())
    if n < 2:
        return Difference(n, mean, -np.inf, np.inf)
    margin = float(stats.t.ppf(0.975, n - 1) * gaps.std(ddof=1) / np.sqrt(n))
    return Difference(n, mean, mean - margin, mean + margin)


# ------------------------------------------------------------------ tables


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up, so that it also reads well in a terminal."""
    rows = [list(head), *map(list, lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    out = []
    for row in (rows[0], rule, *rows[1:]):
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def main_table(rows: Rows) -> str:
    """A line per arm: mean accuracies and what a run took."""
    head = [
        "percent right on",
        "training images",
        *MEASURES.values(),
        "steps",
        "image passes",
        "CPU seconds",
    ]
    lines = []
    for arm, runs in rows.items():
        seconds = [r["cpu_seconds"] for r in runs if r["cpu_seconds"] is not None]
        lines.append(
            [
                LABELS[arm],
                f"{fmean(r['train_clean'] for r in runs):.1f}",
                *(f"{fmean(value(r, m) for r in runs):.1f}" for m in MEASURES),
                f"{runs[0]['steps']:,}",
                f"{runs[0]['image_passes']:,}",
                f"{median(seconds):.0f}" if seconds else "not known",
            ]
        )
    return markdown(head, lines)


def seeds_table(rows: Rows) -> str:
    """A line per seed and arm, then the differences to vanilla with their intervals."""
    n = len(rows[BASE])
    head = ["every seed", *MEASURES.values()]
    lines = []
    for i, run in enumerate(rows[BASE]):
        for arm, runs in rows.items():
            lines.append(
                [
                    f"seed {run['seed']}, {LABELS[arm]}",
                    *(f"{value(runs[i], m):.1f}" for m in MEASURES),
                ]
            )
    for arm, runs in rows.items():
        if arm != BASE:
            gaps = [str(difference(runs, rows[BASE], m)) for m in MEASURES]
            lines.append([f"{LABELS[arm]} - vanilla, {n} seed{'s' * (n > 1)}", *gaps])
    return markdown(head, lines)


def corruptions_table(rows: Rows) -> str:
    """A line per corruption: mean accuracies, then the differences to vanilla."""
    others = [arm for arm in rows if arm != BASE]
    head = [
        "percent right under",
        *(LABELS[arm] for arm in rows),
        *(f"{LABELS[arm]} - vanilla" for arm in others),
    ]
    lines = []
    for name in rows[BASE][0]["corruptions"]:
        means = [f"{fmean(value(r, name) for r in runs):.1f}" for runs in rows.values()]
        gaps = [str(difference(rows[arm], rows[BASE], name)) for arm in others]
        lines.append([name, *means, *gaps])
    return markdown(head, lines)


# ------------------------------------------------------------------ the verdict


def verdict(
    cost: Cost, rows: Rows, images: int, paper: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Lines of Markdown that the numbers decide: in short, the cost, each comparison, what this
    size cannot show.
    """
    base, ours = rows[BASE], rows[EQUAL_COST]
    said = [f"- {headline(cost, rows)}", f"- {cost_sentence(cost, rows)}"]
    steps = f"{ours[0]['steps']:,} optimiser steps against {base[0]['steps']:,}"
    said += comparison(f"At equal cost ({steps}), Fast AdvProp compared with vanilla:", ours, base)
    if EQUAL_STEPS in rows:
        times = rows[EQUAL_STEPS][0]["image_passes"] / base[0]["image_passes"]
        lead = f"With as many optimiser steps as vanilla, at {times:.2f} times its image passes:"
        said += comparison(lead, rows[EQUAL_STEPS], base)
    return [*said, f"- {limits_sentence(rows, images, paper)}"]


def headline(cost: Cost, rows: Rows) -> str:
    """What is decided and what is not, at equal cost."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for measure, name in MEASURES.items():
        found[difference(rows[EQUAL_COST], rows[BASE], measure).verdict].append(name)
    parts = [f"{answer} on {', '.join(names)}" for answer, names in found.items() if names]
    return (
        f"In short: Fast AdvProp, at {cost.ratio:.2f} times the cost of vanilla training, is here"
        f" {'; '.join(parts)}."
    )


def cost_sentence(cost: Cost, rows: Rows) -> str:
    """Four answers: cheaper, within 5%, dearer, not decided."""
    if cost.high < 1:
        answer = "it is cheaper"
    elif cost.high <= MOST_COST:
        answer = "at most 5% more, which the project allows itself"
    elif cost.low > MOST_COST:
        answer = "more than the 5% that the project allows itself"
    else:
        answer = "whether that is at most 5% more is undecided"
    passes = rows[EQUAL_COST][0]["image_passes"] / rows[BASE][0]["image_passes"]
    return (
        f"Cost: a Fast AdvProp run costs {cost.ratio:.2f} times what a vanilla run costs (95%"
        f" interval {cost.low:.2f} to {cost.high:.2f}; {passes:.2f} times the image passes):"
        f" {answer}. Steps of both took turns in one process."
    )


def comparison(lead: str, ours: Runs, base: Runs) -> list[str]:
    lines = [f"- {lead}"]
    for measure, name in MEASURES.items():
        where = name
        if measure == "corrupted":
            where += f" (mean of {len(base[0]['corruptions'])})"
        start = fmean(value(r, measure) for r in base)
        lines.append(f"  - {where}: {answer(difference(ours, base, measure), start)}")
    return lines


def answer(d: Difference, start: float) -> str:
    """Four answers: better, worse, undecided, one seed. `start` is vanilla's percentage."""
    more = "more" if d.mean >= 0 else "fewer"
    gap = f"{abs(d.mean):.1f} points {more} right than vanilla's {start:.1f}%"
    if d.n < 2:
        return f"{gap}; one seed has no interval and decides nothing"
    gap += f" (95% interval {d.low:+.1f} to {d.high:+.1f}, {d.n} seeds)"
    if d.verdict == "undecided":
        return f"{gap}: undecided, the interval includes 0"
    return f"{gap}: {d.verdict}, as far as {d.n} seeds of this size show"


def limits_sentence(rows: Rows, images: int, paper: Mapping[str, Mapping[str, float]]) -> str:
    """What the size of this demo leaves open, and the paper's numbers where it matters."""
    n = len(rows[BASE])
    seeds = "one seed" if n == 1 else f"{n} seeds"
    wide = ""
    if n > 1:
        wide = f" Intervals of {seeds} are wide, and chance alone decides one in twenty."
    ours, base = paper[EQUAL_COST], paper[BASE]
    return (
        f"What this cannot show: results of {seeds} of a tiny network on {images} images say"
        f" nothing about ImageNet.{wide} There, with a ResNet-50 at equal cost, the paper reports"
        f" {base['top1']} -> {ours['top1']}% right on clean images and {base['imagenet_c']} ->"
        f" {ours['imagenet_c']}% wrong under corruptions."
    )
