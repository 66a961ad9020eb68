"""The report as files for other programs: a spreadsheet, LaTeX, JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from fap.evaluate.by_class import csv_of
from fap.evaluate.cells import cell_of, cost_ratio, interval_in_words, signed
from fap.evaluate.compare import Difference, mean_std
from fap.evaluate.groups import Group, difference, rows_of
from fap.evaluate.titles import attacked, corrupted
from fap.evaluate.work import Report

CSV_HEAD = (
    *("group", "checkpoint", "name", "seed", "step", "weights", "bn"),
    *("set", "corruption", "severity", "attack", "eps_255", "metric", "value", "count"),
)
TEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": r"$\pm$",
}
OUTER_COMMA = re.compile(r", (?![^(]*\))")  # not those of `(0, 1, 2)`
SPECIAL = re.compile("[" + re.escape("".join(TEX_ESCAPES)) + "]")


# ---------------------------------------------------------------------- a spreadsheet


def csv_file(groups: Sequence[Group]) -> bytes:
    """A line for each checkpoint, set and metric. Fractions are fractions, not percent."""
    rows: list[Sequence[object]] = [CSV_HEAD]
    for number, group in enumerate(groups, 1):
        for report in group.reports:
            rows += [(number, *row) for row in _csv_rows(report)]
    return csv_of(rows)


def _csv_rows(report: Report) -> list[tuple[object, ...]]:
    seed_and_step: tuple[object, object] = ("", "")
    if report.training is not None:
        seed_and_step = (report.seed, report.step)
    which = (report.checkpoint, report.name, *seed_and_step, report.weights, report.settings["bn"])
    return [
        (*which, *_csv_set(key), metric, repr(value), result["count"])
        for key, result in report.results.items()
        for metric, value in result.items()
        if metric != "count"
    ]


def _csv_set(key: str) -> tuple[object, ...]:
    """Set, corruption, severity, attack, eps."""
    one = corrupted(key)
    if one is not None:
        return (*one, "", "")
    attack = attacked(key)
    if attack is not None:
        return ("attack", "", "", *attack)
    return (key, "", "", "", "")


# ---------------------------------------------------------------------- LaTeX


def tex_file(groups: Sequence[Group]) -> bytes:
    """Two tables of booktabs: all but the single corruptions, and these."""
    lines = [r"% \usepackage{booktabs}"]
    for is_corruption in (False, True):
        rows = []
        for row in rows_of(groups):
            numbers = [group.number(row) for group in groups]
            part = next(number.part for number in numbers if number is not None)
            if (part == "corruption") == is_corruption:
                rows.append(row)
        if rows:
            lines += _tabular(rows, groups)
    return ("\n".join(lines) + "\n").encode()


def _tabular(rows: Sequence[str], groups: Sequence[Group]) -> list[str]:
    base, *others = groups
    heads = ["", *(group.name for group in groups), *(f"{g.name}, difference" for g in others)]
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule"]
    lines += [f"{' & '.join(map(_tex_head, heads))} \\\\", r"\midrule"]
    for row in rows:
        cells = [row, *(cell_of(group, row) for group in groups)]
        cells += [_tex_difference(group, base, row) for group in others]
        lines.append(f"{' & '.join(map(tex, cells))} \\\\")
    return [*lines, r"\bottomrule", r"\end{tabular}", ""]


def _tex_head(text: str) -> str:
    """Broken at its commas: a column is as wide as its numbers, not as its name."""
    parts = OUTER_COMMA.split(text)
    if len(parts) == 1:
        return tex(text)
    stacked = r",\\".join(map(tex, parts))
    return rf"\shortstack[r]{{{stacked}}}"


def _tex_difference(group: Group, base: Group, row: str) -> str:
    """With its interval, where it has one; of a cost how many times the baseline's."""
    number = base.number(row)
    if number is not None and number.part == "cost":
        ratio = cost_ratio(group, base, row)
        return "" if ratio is None else f"{ratio:.2f} times"
    found = difference(group, base, row)
    if found is None:
        return ""
    return interval_in_words(found) if found.low is not None else signed(found.mean)


def tex(text: str) -> str:
    """Text that LaTeX shows as it is. What is not ASCII is escaped as Python would."""
    plain = "".join(c if c in TEX_ESCAPES else _ascii(c) for c in text)
    return SPECIAL.sub(lambda match: TEX_ESCAPES[match[0]], plain)


def _ascii(character: str) -> str:
    if not character.isprintable():
        return " "
    return character.encode("ascii", "backslashreplace").decode()


# ---------------------------------------------------------------------- JSON


def reports_json(groups: Sequence[Group], reports: Sequence[Report]) -> bytes:
    """A tree for each checkpoint, in the order in which they were given."""
    places = {id(r): (n, i) for n, g in enumerate(groups) for i, r in enumerate(g.reports)}
    trees = []
    for report in reports:
        number, place = places[id(report)]
        table = groups[number].tables[place]
        summary = {row: found.ours for row, found in table.rows.items()}
        own = {"group": number + 1, "summary": summary, "notes": table.notes}
        trees.append(_without_nan({**report.tree(), **own}))
    return json.dumps(trees, indent=1, allow_nan=False).encode()


def groups_json(groups: Sequence[Group]) -> bytes:
    """Mean and standard deviation over seeds, and the differences to the first group."""
    base = groups[0]
    trees = []
    for number, group in enumerate(groups, 1):
        tree: dict[str, Any] = {
            "group": number,
            "name": group.name,
            "seeds": group.seeds,
            "checkpoints": [report.checkpoint for report in group.reports],
            "rows": {row: _row_tree(group, row) for row in rows_of([group])},
        }
        if group is not base:
            found = {row: difference(group, base, row) for row in rows_of([base])}
            tree["minus_first_group"] = {
                row: _difference_tree(gap) for row, gap in found.items() if gap is not None
            }
        trees.append(tree)
    return json.dumps(trees, indent=1).encode()


def _row_tree(group: Group, row: str) -> dict[str, Any]:
    values = group.values(row)
    mean, std = mean_std(list(values.values()))
    by_seed = {str(seed): _finite(value) for seed, value in values.items()}
    number = group.number(row)
    assert number is not None
    return {
        "unit": number.unit,
        "mean": _finite(mean),
        "std": None if std is None else _finite(std),
        "seeds": by_seed,
    }


def _difference_tree(found: Difference) -> dict[str, Any]:
    effect = {found.effect_name: found.effect}
    tree = {"mean": found.mean, "low": found.low, "high": found.high, "p": found.p, **effect}
    return {**tree, "n": found.n, "paired": found.paired, "why_no_interval": found.why}


def _without_nan(tree: Any) -> Any:
    """None in place of what is no number."""
    if isinstance(tree, dict):
        return {name: _without_nan(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_nan(value) for value in tree]
    return _finite(tree) if isinstance(tree, float) else tree


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
