"""A study's figure: the gain over vanilla epochs, and what each method gains.

A library of `bench.evidence`.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from bench.evidence.arms import ARMS, BASE, OURS, OURS_LATE
from bench.evidence.numbers import Rows
from bench.evidence.studies import Part, Study
from fap.evaluate.compare import Difference

DRAWN = {  # measure: its name, its colour
    "clean": ("clean images", "C0"),
    "main/corrupted": ("corrupted images", "C3"),
    "main/pgd10/2": ("attacked images (PGD-10, eps 2)", "C2"),
}
STYLES = {OURS: "-", OURS_LATE: "--"}  # of the curves' lines
FEWEST_FOR_INTERVAL = 3  # seeds: the interval of two is a dozen standard errors wide


def figure(rows: Rows, study: Study) -> Figure | None:
    """The curve where the study has one, and bars of its methods; None where it has neither."""
    saturation = study.parts.get("saturation")
    methods = study.methods
    if saturation is None and methods is None:
        return None
    n_panels = (saturation is not None) + (methods is not None)
    drawn = Figure(figsize=(6.5 * n_panels, 6.5), layout="constrained")
    panels = drawn.subplots(1, n_panels, squeeze=False)[0]
    if saturation is not None:
        curve(panels[0], rows, saturation)
    if methods is not None:
        bars(panels[-1], rows, methods)
    panels[0].legend(loc="lower right")
    drawn.suptitle(f"95% intervals where there are {FEWEST_FOR_INTERVAL} seeds or more")
    return drawn


def curve(axes: Any, rows: Rows, part: Part) -> None:
    """Fast AdvProp less vanilla over how long vanilla trained; dashed where it begins late."""
    for arm, style in STYLES.items():
        for measure, (name, colour) in DRAWN.items():
            found = {}
            for regime in part.regimes:
                difference = rows.difference(regime, arm, BASE, measure)
                if difference is not None:
                    found[regime.epochs] = difference
            means = [difference.mean for difference in found.values()]
            errors = _errors(list(found.values()))
            line = {"color": colour, "linestyle": style, "marker": "o", "capsize": 3}
            axes.errorbar(
                list(found), means, yerr=errors, label=name if arm == OURS else None, **line
            )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    epochs = [regime.epochs for regime in part.regimes]
    axes.set_xticks(epochs, [str(number) for number in epochs])
    axes.set_xlabel("epochs of vanilla training, and image passes as many")
    axes.set_ylabel(f"minus vanilla, points right; dashed: {ARMS[OURS_LATE].title}")


def bars(axes: Any, rows: Rows, part: Part) -> None:
    """Every method less vanilla."""
    (regime,) = part.regimes
    arms = [arm for arm in part.arms if arm != BASE and rows.of(regime, arm)]
    height = 0.8 / len(DRAWN)
    for i, (measure, (name, colour)) in enumerate(DRAWN.items()):
        found = {}
        for place, arm in enumerate(arms):
            difference = rows.difference(regime, arm, BASE, measure)
            if difference is not None:
                found[place + (i + 0.5) * height] = difference
        means = [difference.mean for difference in found.values()]
        errors = _errors(list(found.values()))
        axes.barh(list(found), means, height, xerr=errors, color=colour, alpha=0.7, label=name)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks([place + 0.4 for place in range(len(arms))], [ARMS[arm].title for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel("minus vanilla, points right")


def _errors(found: Sequence[Difference]) -> list[list[float]]:
    """How far the 95% intervals go below and above the means; 0 where the seeds are too few."""
    below, above = [], []
    for difference in found:
        low = high = difference.mean
        if difference.n >= FEWEST_FOR_INTERVAL and difference.low is not None:
            assert difference.high is not None
            low, high = difference.low, difference.high
        below.append(difference.mean - low)
        above.append(high - difference.mean)
    return [below, above]
