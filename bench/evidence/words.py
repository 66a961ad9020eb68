"""What a study's numbers show, in words that they decide.

A library of `bench.evidence`.
"""

from collections.abc import Iterator, Mapping, Sequence

from bench.evidence.arms import (
    ARMS,
    AUGMIX,
    BASE,
    CONTROL,
    OURS,
    OURS_AUGMIX,
    OURS_LATE,
    OURS_STEPS,
)
from bench.evidence.cost import Costs
from bench.evidence.numbers import MEASURES, Measure, Rows
from bench.evidence.studies import Part, Regime, Study
from bench.tables import with_interval
from fap.evaluate.compare import Difference
from fap.nets.norm import Bn

CORRUPTED = "main/corrupted"
HEADLINE = ("clean", CORRUPTED, "main/pgd10/1", "main/ece")
OF_NORMS = ("main/clean", CORRUPTED, "main/pgd10/1", "main/pgd10/2", "main/ece")
LEADS = {
    OURS: "At equal cost (equal image passes)",
    OURS_STEPS: "At equal optimiser steps, for 1.5 times the cost",
}


def words(rows: Rows, study: Study, costs: Costs) -> Iterator[str]:
    """Lines of plain text."""
    if OURS in costs:
        yield _cost(costs[OURS])
    if study.headline is not None:
        yield from _headline(rows, study.headline)
        yield from _control(rows, study.headline)
        yield from _norms(rows, study.headline)
    saturation = study.parts.get("saturation")
    if saturation is not None:
        yield from _saturation(rows, saturation)
    augmix = study.parts.get("AugMix")
    if augmix is not None:
        yield from _augmix(rows, augmix)


def _cost(cost: Mapping[str, float]) -> str:
    return (
        f"A run of Fast AdvProp takes {cost['ratio']:.2f} [{cost['low']:.2f}, {cost['high']:.2f}] "
        "times the seconds of a vanilla one: steps of both in turns, loading left out."
    )


def _headline(rows: Rows, part: Part) -> Iterator[str]:
    (regime,) = part.regimes
    for arm, lead in LEADS.items():
        found = _compared(rows, regime, arm, BASE)
        if found:
            yield f"{lead}, {regime.title}, Fast AdvProp against vanilla: {found}."


def _control(rows: Rows, part: Part) -> Iterator[str]:
    """Is it the gradient's sign that helps, or would a random one?"""
    (regime,) = part.regimes
    found = _compared(rows, regime, OURS, CONTROL)
    if found:
        yield f"Fast AdvProp against the noise control, whose signs are random: {found}."


def _norms(rows: Rows, part: Part) -> Iterator[str]:
    """Would the other norms be the better ones to use?"""
    (regime,) = part.regimes
    for base, lead in ((OURS, "its main ones"), (BASE, "vanilla")):
        found = _compared(rows, regime, OURS, base, OF_NORMS, norms="aux")
        if found:
            yield f"Fast AdvProp through its auxiliary norms against {lead}: {found}."


def _compared(
    rows: Rows,
    regime: Regime,
    arm: str,
    base: str,
    names: Sequence[str] = HEADLINE,
    norms: Bn = "main",  # of `arm`; those of `base` are the main ones
) -> str:
    """Empty where they have no seed in common."""
    parts = []
    for name in names:
        found = rows.difference(regime, arm, base, name.replace("main/", f"{norms}/"), name)
        if found is not None:
            parts.append(f"{MEASURES[name].title} {in_words(found, MEASURES[name])}")
    return "; ".join(parts)


def _saturation(rows: Rows, part: Part) -> Iterator[str]:
    """The gain by how long vanilla training is, of those regimes that were measured."""
    for arm in (OURS, OURS_LATE):
        answers = []
        for regime in part.regimes:
            found = rows.difference(regime, arm, BASE, CORRUPTED)
            if found is not None:
                learnt = rows.mean(regime, BASE, "train/clean")
                gain = in_words(found, MEASURES[CORRUPTED])
                answers.append(f"{regime.epochs} epochs ({learnt:.0f}% learnt) {gain}")
        if answers:
            what = f"{ARMS[arm].title}, {MEASURES[CORRUPTED].title} by epochs"
            yield f"{LEADS[OURS]}, {what}: {'; '.join(answers)}."


def _augmix(rows: Rows, part: Part) -> Iterator[str]:
    """Do the gains of both add up?"""
    (regime,) = part.regimes
    for norms, through in (("main", ""), ("aux", " through its auxiliary norms")):
        found = _compared(rows, regime, OURS_AUGMIX, AUGMIX, OF_NORMS, norms)
        if found:
            yield f"Fast AdvProp with AugMix{through} against AugMix alone: {found}."


def in_words(found: Difference, measure: Measure) -> str:
    """`+1.2 [+0.8, +1.6] better`."""
    if found.low is None:
        return f"{found.mean:+.1f} ({found.why})"
    return f"{with_interval(found)} {found.verdict(measure.better)}"
