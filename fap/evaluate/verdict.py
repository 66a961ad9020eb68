"""The first lines of a report: what was evaluated, on which images, at what cost, and what the
numbers decide against the baseline. Nothing is said that they do not show.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fap.evaluate.cells import cell_of, cost_ratio, interval_in_words
from fap.evaluate.compare import Difference, Verdict
from fap.evaluate.groups import Group, difference, paired_seeds, rows_of
from fap.evaluate.numbers import Number
from fap.evaluate.titles import (
    ATTACK,
    CLEAN,
    NOT_KNOWN,
    corrupted,
    title_of_benchmark,
    title_of_single,
)
from fap.evaluate.work import Report

PASSES = "image passes"  # the row of the table that cost is compared by
STEPS = "optimiser steps"
VERDICTS: tuple[Verdict, ...] = ("better", "worse", "undecided")
MOST_NAMED = 12  # rows of a verdict
MOST_GROUPS = 8  # that lines are about


def opening(groups: Sequence[Group]) -> list[str]:
    """Lines of text, the baseline's group first in `groups`."""
    base = groups[0]
    said = [_who(groups), _images(base.reports[0]), _cost(groups)]
    others = groups[1:]
    said += [_against(group, base) for group in others[:MOST_GROUPS]]
    if len(others) > MOST_GROUPS:
        said.append(f"and {len(others) - MOST_GROUPS} more, see the table of differences")
    n_intervals = sum(_n_intervals(group, base) for group in others)
    if n_intervals:
        said.append(
            f"Each of these {n_intervals} intervals stands alone: where nothing differs, one in "
            "twenty excludes 0 by chance."
        )
    return said


def _who(groups: Sequence[Group]) -> str:
    base = groups[0]
    if len(groups) == 1:
        return f"Evaluated: {base.name}{_architecture(base)}."
    names = [f"{group.name}{_architecture(group)}" for group in groups[: MOST_GROUPS + 1]]
    if len(groups) > len(names):
        names.append(f"and {len(groups) - len(names)} more")
    return f"Compared: {'; '.join(names)}. The first is the baseline."


def _architecture(group: Group) -> str:
    training = group.reports[0].training
    return "" if training is None else f" ({training.settings['model.name']})"


def _images(report: Report) -> str:
    """How many, set by set; the corruptions of a benchmark as one."""
    parts = []
    n_sets: dict[str, int] = {}
    n_attacks = 0
    for key, result in report.results.items():
        one = corrupted(key)
        if one is not None:
            n_sets[one.benchmark] = n_sets.get(one.benchmark, 0) + 1
        elif key.startswith(f"{ATTACK}/"):
            n_attacks += 1
        else:
            parts.append(f"{result['count']:,} {title_of_single(key).rstrip(',')}")
    parts += [
        f"{_plural(n, 'corrupted set')} ({title_of_benchmark(benchmark)})"
        for benchmark, n in n_sets.items()
    ]
    if n_attacks:
        parts.append(f"{_plural(n_attacks, 'attack')}")
    return f"Images: {', '.join(parts)}; {CLEAN} ones are {report.settings['data']}."


def _plural(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _cost(groups: Sequence[Group]) -> str:
    """Image passes, and how many times the baseline's."""
    base = groups[0]
    parts = []
    for group in groups[: MOST_GROUPS + 1]:
        passes = cell_of(group, PASSES)
        told = NOT_KNOWN
        if passes:
            told = f"{passes} image passes in {cell_of(group, STEPS)} steps"
        ratio = None if group is base else cost_ratio(group, base, PASSES)
        if ratio is not None:
            told += f" ({ratio:.2f} times the baseline's)"
        parts.append(told if len(groups) == 1 else f"{group.short}: {told}")
    if all(part.endswith(NOT_KNOWN) for part in parts):
        return f"Cost of training: {NOT_KNOWN}."
    return f"Cost of training: {'; '.join(parts)}."


def _against(group: Group, base: Group) -> str:
    """`B, against the baseline (...): better on ImageNet-R top-1. Undecided on ...`."""
    lead = f"{group.short}, against the baseline ({_how(group, base)}):"
    found: dict[Verdict, list[str]] = {verdict: [] for verdict in VERDICTS}
    differences: dict[str, Difference] = {}
    for row, number in _headlines(group, base).items():
        gap = difference(group, base, row)
        if gap is None or number.better is None:
            continue
        differences[row] = gap
        found[gap.verdict(number.better)].append(row)
    if not differences:
        return f"{lead} no number in common."
    if _n_intervals(group, base) == 0:
        why = next(iter(differences.values())).why
        return f"{group.short}, against the baseline: undecided, there is no interval ({why})."
    parts = []
    for verdict, rows in found.items():
        if rows and verdict == "undecided":
            parts.append(f"undecided on {_named(rows)}")
        elif rows:
            gaps = [f"{row} {interval_in_words(differences[row])}" for row in rows]
            parts.append(f"{verdict} on {_listed(gaps)}")
    told = ". ".join([parts[0], *(part[0].upper() + part[1:] for part in parts[1:])])
    return f"{lead} {told}."


def _headlines(group: Group, base: Group) -> dict[str, Number]:
    """The few rows that the words are about, of those that both have."""
    found = {}
    for row in rows_of([base]):
        number = base.number(row)
        if number is not None and number.headline and group.number(row) is not None:
            found[row] = number
    return found


def _n_intervals(group: Group, base: Group) -> int:
    gaps = [difference(group, base, row) for row in _headlines(group, base)]
    return sum(gap is not None and gap.low is not None for gap in gaps)


def _named(rows: Sequence[str]) -> str:
    return _listed(_merged(rows))


def _listed(rows: Sequence[str]) -> str:
    separator = "; " if any("," in row for row in rows) else ", "
    named = separator.join(rows[:MOST_NAMED])
    return named if len(rows) <= MOST_NAMED else f"{named} and {len(rows) - MOST_NAMED} more"


def _merged(rows: Sequence[str]) -> list[str]:
    """Attacks of one method as one: `accuracy under FGSM (eps 1, 2)`."""
    found: dict[str, list[str]] = {}
    for row in rows:
        match = re.fullmatch(r"(accuracy under .*), eps (.*) / 255", row)
        name, eps = match.groups() if match else (row, "")
        found.setdefault(name, []).append(eps)
    return [
        name if eps == [""] else f"{name} (eps {', '.join(eps)})" for name, eps in found.items()
    ]


def _how(group: Group, base: Group) -> str:
    paired = paired_seeds(group, base)
    if paired:
        word = "seed" if len(paired) == len(group.seeds) == len(base.seeds) else "common seed"
        return f"{_plural(len(paired), word)}, paired, 95% intervals"
    counts = f"{len(group.seeds)} and {_plural(len(base.seeds), 'seed')}"
    return f"{counts}, unpaired, 95% intervals of Welch's test"
