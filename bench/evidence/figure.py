"""A study's figure: the gain over vanilla epochs, and what each method gains.

A library of `bench.evidence`.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from bench.evidence.arms import ARMS, BASE, OURS, OURS_STEPS
from bench.evidence.numbers import Rows
from bench.evidence.studies import Part, Study

CURVES = {  # arm and measure: colour, line
    (OURS, "main/corrupted"): ("C3", "-"),
    (OURS, "clean"): ("C0", "-"),
    (OURS_STEPS, "main/corrupted"): ("C3", ":"),
    (OURS_STEPS, "clean"): ("C0", ":"),
}
SPENT = {OURS: "equal cost", OURS_STEPS: "equal steps"}
IMAGES = {"clean": "clean images", "main/corrupted": "corrupted images"}
BARS = {"main/corrupted": "C3", "clean": "C0"}


def figure(rows: Rows, study: Study) -> Figure | None:
    """The curve where the study has one, and bars of its methods; None where it has neither."""
    saturation = study.parts.get("saturation")
    methods = study.methods
    if saturation is None and methods is None:
        return None
    n_panels = (saturation is not None) + (methods is not None)
    drawn = Figure(figsize=(6.5 * n_panels, 5.5), layout="constrained")
    panels = drawn.subplots(1, n_panels, squeeze=False)[0]
    if saturation is not None:
        curve(panels[0], rows, saturation)
    if methods is not None:
        bars(panels[-1], rows, methods)
    return drawn


def curve(axes: Any, rows: Rows, part: Part) -> None:
    """Differences to vanilla over how long it trained, with 95% intervals."""
    for (arm, measure), (colour, line) in CURVES.items():
        found = []
        for regime in part.regimes:
            difference = rows.difference(regime, arm, BASE, measure)
            if difference is not None and difference.low is not None:
                found.append((regime.epochs, difference))
        if not found:
            continue
        _with_intervals(
            axes.errorbar,
            [epochs for epochs, _ in found],
            [difference for _, difference in found],
            color=colour,
            linestyle=line,
            marker="o",
            label=f"{IMAGES[measure]}, {SPENT[arm]}",
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    epochs = [regime.epochs for regime in part.regimes]
    axes.set_xticks(epochs, [str(number) for number in epochs])
    axes.set_xlabel("epochs of vanilla training")
    axes.set_ylabel("Fast AdvProp - vanilla, points right")
    axes.legend()


def _with_intervals(draw: Any, at: Sequence[float], found: Sequence[Any], **how: Any) -> None:
    means = [difference.mean for difference in found]
    below = [difference.mean - difference.low for difference in found]
    above = [difference.high - difference.mean for difference in found]
    draw(at, means, yerr=[below, above], capsize=3, **how)


def bars(axes: Any, rows: Rows, part: Part) -> None:
    """Differences to vanilla by method, with 95% intervals."""
    (regime,) = part.regimes
    arms = [arm for arm in part.arms if arm != BASE]
    height = 0.8 / len(BARS)
    for i, (measure, colour) in enumerate(BARS.items()):
        for place, arm in enumerate(arms):
            difference = rows.difference(regime, arm, BASE, measure)
            if difference is None:
                continue
            error = None
            if difference.low is not None and difference.high is not None:
                error = [[difference.mean - difference.low], [difference.high - difference.mean]]
            axes.barh(
                place + (i + 0.5) * height,
                difference.mean,
                height,
                xerr=error,
                color=colour,
                alpha=0.7,
                label=IMAGES[measure] if place == 0 else None,
            )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks([place + 0.4 for place in range(len(arms))], [ARMS[arm].title for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel("minus vanilla, points right")
    axes.legend()
