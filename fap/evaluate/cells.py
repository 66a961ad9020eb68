"""Numbers as text: of one checkpoint, of several seeds, of differences."""

from __future__ import annotations

import math

from fap.evaluate.compare import Difference, mean_std
from fap.evaluate.groups import Group, difference
from fap.evaluate.numbers import Unit

FEWEST_FOR_EFFECT = 3  # seeds: the effect size of two is chance
LEAST_P = 0.001  # below it no digits are shown


def value_in_words(value: float, unit: Unit) -> str:
    if math.isnan(value):
        return "undefined"
    match unit:
        case "count":
            return f"{value:,.0f}"
        case "seconds":
            return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
        case _:
            return f"{value:.2f}"


def cell_of(group: Group, row: str, *, paper: bool = True) -> str:
    """`76.50`, or of several seeds mean ± standard deviation; empty where nothing was measured.

    With the paper's number behind it.
    """
    number = group.number(row)
    if number is None:
        return ""
    values = list(group.values(row).values())
    mean, std = mean_std(values)
    text = value_in_words(mean, number.unit)
    same_count = number.unit == "count" and len(set(values)) == 1
    if std is not None and not math.isnan(std) and not same_count:
        text += f" ± {value_in_words(std, number.unit)}"
    if len(values) < len(group.reports):
        text += f", {len(values)} of {len(group.reports)} seeds"
    if paper and number.paper is not None:
        text += f" (paper {number.paper:g})"
    return text


def difference_cell(group: Group, base: Group, row: str) -> str:
    """`+1.20 [+0.31, +2.09] better; d_z 1.30, p 0.021`; a cost is told as a ratio."""
    number = base.number(row)
    if number is None:
        return ""
    if number.part == "cost":
        ratio = cost_ratio(group, base, row)
        return "" if ratio is None else f"{ratio:.2f} times"
    found = difference(group, base, row)
    if found is None:
        return ""
    text = interval_in_words(found)
    if number.better is not None and found.verdict(number.better) != "undecided":
        text += f" {found.verdict(number.better)}"
    return text + _test_in_words(found)


def cost_ratio(group: Group, base: Group, row: str) -> float | None:
    """Of the means; None where either is not known, or there was nothing to train.

    Seconds of runs beside other neighbours, or on other machines, are never divided.
    """
    number = base.number(row)
    if number is not None and number.unit == "seconds":
        return None
    ours, theirs = list(group.values(row).values()), list(base.values(row).values())
    if not ours or not theirs or not sum(theirs):
        return None
    return mean_std(ours)[0] / mean_std(theirs)[0]


def interval_in_words(found: Difference) -> str:
    """`+1.20 [+0.31, +2.09]`, or why there is no interval."""
    if math.isnan(found.mean):
        return f"undefined ({found.why})"
    text = signed(found.mean)
    if found.low is not None and found.high is not None:
        return f"{text} [{signed(found.low)}, {signed(found.high)}]"
    if found.n < 2:
        return text
    return f"{text} (no interval: {found.why})"


def signed(value: float) -> str:
    """`+0.00` of what rounds to nothing, never `-0.00`."""
    return f"{value:+.2f}".replace("-0.00", "+0.00") if abs(value) < 0.005 else f"{value:+.2f}"


def _test_in_words(found: Difference) -> str:
    if found.p is None or found.effect is None or found.n < FEWEST_FOR_EFFECT:
        return ""
    p = f"p {found.p:.3f}" if found.p >= LEAST_P else f"p < {LEAST_P}"
    return f"; {found.effect_name} {found.effect:.2f}, {p}"
