"""The demo's numbers in words: a table, the single seeds, and a verdict that the numbers decide.

A library of `bench.demo`. A run is a dictionary: `seed`; `train_clean`, `clean`, `corrupted`,
`adversarial` and `corruptions` (by name) in percent of images that are right; `steps`,
`image_passes`, `cpu_seconds` (None if the run was interrupted).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from bench.tables import markdown, with_interval
from fap.evaluate.compare import Difference, paired

Runs = Sequence[Mapping[str, Any]]
Rows = Mapping[str, Runs]  # by arm, each arm's in the order of the seeds

# The arms.
BASE = "vanilla"
EQUAL_COST = "fast_advprop"
EQUAL_STEPS = "fast_advprop_equal_steps"
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
    """Percent right of one of MEASURES, or under one corruption."""
    if measure in run:
        return run[measure]
    return run["corruptions"][measure]


def difference(ours: Runs, base: Runs, measure: str) -> Difference:
    """In points, paired by seed: runs of the same seeds in the same order."""
    assert [run["seed"] for run in ours] == [run["seed"] for run in base]
    ours_right = [value(run, measure) for run in ours]
    base_right = [value(run, measure) for run in base]
    return paired(ours_right, base_right)


# ------------------------------------------------------------------ tables


def mean_right(runs: Runs, measure: str) -> str:
    return f"{fmean(value(run, measure) for run in runs):.1f}"


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
        seconds = [run["cpu_seconds"] for run in runs if run["cpu_seconds"] is not None]
        line = [LABELS[arm], mean_right(runs, "train_clean")]
        for measure in MEASURES:
            line.append(mean_right(runs, measure))
        line.append(f"{runs[0]['steps']:,}")
        line.append(f"{runs[0]['image_passes']:,}")
        line.append(f"{median(seconds):.0f}" if seconds else "not known")
        lines.append(line)
    return markdown(head, lines)


def seeds_table(rows: Rows) -> str:
    """A line per seed and arm, then the differences to vanilla with their intervals."""
    head = ["every seed", *MEASURES.values()]
    lines = []
    for i, run in enumerate(rows[BASE]):
        for arm, runs in rows.items():
            accuracies = [f"{value(runs[i], measure):.1f}" for measure in MEASURES]
            lines.append([f"seed {run['seed']}, {LABELS[arm]}", *accuracies])
    for arm, runs in rows.items():
        if arm == BASE:
            continue
        gaps = [with_interval(difference(runs, rows[BASE], measure)) for measure in MEASURES]
        lines.append([f"{LABELS[arm]} - vanilla, {seeds_in_words(len(runs), one='1')}", *gaps])
    return markdown(head, lines)


def corruptions_table(rows: Rows) -> str:
    """A line per corruption: mean accuracies, then the differences to vanilla."""
    others = [arm for arm in rows if arm != BASE]
    head = ["percent right under"]
    head += [LABELS[arm] for arm in rows]
    head += [f"{LABELS[arm]} - vanilla" for arm in others]
    lines = []
    for name in rows[BASE][0]["corruptions"]:
        means = [mean_right(runs, name) for runs in rows.values()]
        gaps = [with_interval(difference(rows[arm], rows[BASE], name)) for arm in others]
        lines.append([name, *means, *gaps])
    return markdown(head, lines)


# ------------------------------------------------------------------ the verdict


Paper = Mapping[str, Mapping[str, float]]  # by arm: top1 and imagenet_c, in percent


def verdict(cost: Cost, rows: Rows, images: int, paper: Paper) -> list[str]:
    """Lines of Markdown that the numbers decide.

    In short; the cost; each comparison; what this size cannot show.
    """
    base = rows[BASE]
    ours = rows[EQUAL_COST]
    said = [f"- {headline(cost, rows)}", f"- {cost_sentence(cost, rows)}"]
    steps = f"{ours[0]['steps']:,} optimiser steps against {base[0]['steps']:,}"
    said += comparison(f"At equal cost ({steps}), Fast AdvProp compared with vanilla:", ours, base)
    if EQUAL_STEPS in rows:
        times = rows[EQUAL_STEPS][0]["image_passes"] / base[0]["image_passes"]
        lead = f"With as many optimiser steps as vanilla, at {times:.2f} times its image passes:"
        said += comparison(lead, rows[EQUAL_STEPS], base)
    said.append(f"- {limits_sentence(rows, images, paper)}")
    return said


def headline(cost: Cost, rows: Rows) -> str:
    """What is decided and what is not, at equal cost."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for measure, name in MEASURES.items():
        found[difference(rows[EQUAL_COST], rows[BASE], measure).verdict("more")].append(name)
    parts = [f"{answer} on {', '.join(names)}" for answer, names in found.items() if names]
    return (
        f"In short: Fast AdvProp, at {cost.ratio:.2f} times the cost of vanilla training, "
        f"is here {'; '.join(parts)}."
    )


def cost_sentence(cost: Cost, rows: Rows) -> str:
    """Four answers: cheaper, within 5%, dearer, not decided."""
    if cost.high < 1:
        judged = "it is cheaper"
    elif cost.high <= MOST_COST:
        judged = "at most 5% more, which the project allows itself"
    elif cost.low > MOST_COST:
        judged = "more than the 5% that the project allows itself"
    else:
        judged = "whether that is at most 5% more is undecided"
    passes = rows[EQUAL_COST][0]["image_passes"] / rows[BASE][0]["image_passes"]
    return (
        f"Cost: a Fast AdvProp run costs {cost.ratio:.2f} times what a vanilla run costs "
        f"(95% interval {cost.low:.2f} to {cost.high:.2f}; {passes:.2f} times the image passes): "
        f"{judged}. Steps of both took turns in one process."
    )


def comparison(lead: str, ours: Runs, base: Runs) -> list[str]:
    """A line with the lead, then one per measure."""
    lines = [f"- {lead}"]
    for measure, name in MEASURES.items():
        where = name
        if measure == "corrupted":
            where += f" (mean of {len(base[0]['corruptions'])})"
        start = fmean(value(run, measure) for run in base)
        lines.append(f"  - {where}: {answer(difference(ours, base, measure), start)}")
    return lines


def answer(d: Difference, start: float) -> str:
    """Better, worse, undecided, one seed, or no spread. `start` is vanilla's percentage."""
    more = "more" if d.mean >= 0 else "fewer"
    gap = f"{abs(d.mean):.1f} points {more} right than vanilla's {start:.1f}%"
    if d.n < 2:
        return f"{gap}; one seed has no interval and decides nothing"
    if d.low is None or d.high is None:
        return f"{gap}; no interval, which decides nothing: {d.why}"
    gap += f" (95% interval {d.low:+.1f} to {d.high:+.1f}, {d.n} seeds)"
    judged = d.verdict("more")
    if judged == "undecided":
        return f"{gap}: undecided, the interval includes 0"
    return f"{gap}: {judged}, as far as {d.n} seeds of this size show"


def limits_sentence(rows: Rows, images: int, paper: Paper) -> str:
    """What the size of this demo leaves open, and the paper's numbers where it matters."""
    n = len(rows[BASE])
    seeds = seeds_in_words(n, one="one")
    wide = ""
    if n > 1:
        wide = f" Intervals of {seeds} are wide, and chance alone decides one in twenty."
    ours = paper[EQUAL_COST]
    base = paper[BASE]
    return (
        f"What this cannot show: results of {seeds} of a tiny network on {images} images "
        f"say nothing about ImageNet.{wide} There, with a ResNet-50 at equal cost, "
        f"the paper reports {base['top1']} -> {ours['top1']}% right on clean images "
        f"and {base['imagenet_c']} -> {ours['imagenet_c']}% wrong under corruptions."
    )


def seeds_in_words(n: int, one: str) -> str:
    return f"{one} seed" if n == 1 else f"{n} seeds"
