"""The report as a page of Markdown: words, the table of groups, differences, every seed, notes."""

from __future__ import annotations

from collections.abc import Sequence

from fap.evaluate import by_class
from fap.evaluate.cells import cell_of, difference_cell
from fap.evaluate.groups import Group, head, notes_on, paired_seeds, rows_of, single
from fap.evaluate.titles import CLEAN, NOT_KNOWN
from fap.evaluate.verdict import opening
from pipelines.files import readable


def page(groups: Sequence[Group]) -> str:
    """The baseline is the first group."""
    several_seeds = any(len(group.reports) > 1 for group in groups)
    lines = [*(f"- {plain(line)}" for line in opening(groups)), "", _caption(groups), ""]
    lines += _table([group.name for group in groups], groups)
    if len(groups) > 1:
        lines += ["", "## Differences", "", _of_differences(groups), "", *_differences(groups)]
    if several_seeds:
        tells_bn = len(_bns(groups)) > 1
        seeds = [one for group in groups for one in single(group, tells_bn=tells_bn)]
        lines += ["", "## Every seed", ""]
        lines += _table([one.name for one in seeds], seeds, paper=False)
    notes = [f"- {plain(note)}" for note in _notes(groups)] + _classes(groups)
    if notes and len(groups) + several_seeds > 1:
        lines += ["", "## Notes"]
    if notes:
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Text out of a file or a path, for a table's cell: one line, no column of its own."""
    return readable(text, 2000).replace("|", "\\|")


def _caption(groups: Sequence[Group]) -> str:
    report = groups[0].reports[0]
    spread = ""
    if any(len(group.reports) > 1 for group in groups):
        spread = "; mean ± standard deviation (n - 1) over the seeds"
    count = report.results[CLEAN]["count"]
    data = plain(str(report.settings["data"]))
    return f"{count} images of {data}, {' and '.join(_bns(groups))} BN; percent{spread}."


def _bns(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(r.settings["bn"] for group in groups for r in group.reports))


def _table(names: Sequence[str], groups: Sequence[Group], *, paper: bool = True) -> list[str]:
    lines = _head(names)
    for row in rows_of(groups):
        cells = [
            plain(cell_of(group, row, paper=paper)) or _absent(row, groups) for group in groups
        ]
        lines.append(f"| {plain(row)} | {' | '.join(cells)} |")
    return lines


def _head(names: Sequence[str]) -> list[str]:
    return [f"| | {' | '.join(map(plain, names))} |", "|---" + "|--:" * len(names) + "|"]


def _absent(row: str, groups: Sequence[Group]) -> str:
    """A cost that others have is said to be lacking."""
    numbers = [group.number(row) for group in groups]
    is_cost = any(number is not None and number.part == "cost" for number in numbers)
    return NOT_KNOWN if is_cost else ""


def _of_differences(groups: Sequence[Group]) -> str:
    base = groups[0]
    said = f"Each column minus {plain(base.short)}, the baseline."
    tested = [group for group in groups[1:] if min(len(group.seeds), len(base.seeds)) > 1]
    if not tested:
        return f"{said} One seed has no interval and decides nothing."
    said += (
        " In brackets the 95% interval of the t-test, paired over the seeds that both have (d_z:"
        " mean over standard deviation of the pairs' differences)"
    )
    if not all(paired_seeds(group, base) for group in tested):
        said += ", else Welch's, unpaired (d: Cohen's)"
    return f"{said}. Better or worse is said where it excludes 0."


def _differences(groups: Sequence[Group]) -> list[str]:
    base, *others = groups
    lines = _head([f"{group.short}{_pairing(group, base)}" for group in others])
    for row in rows_of([base]):
        cells = [plain(difference_cell(group, base, row)) for group in others]
        if any(cells):
            lines.append(f"| {plain(row)} | {' | '.join(cells)} |")
    return lines


def _pairing(group: Group, base: Group) -> str:
    if min(len(group.seeds), len(base.seeds)) < 2:
        return ""
    return " (paired)" if paired_seeds(group, base) else " (unpaired)"


def _notes(groups: Sequence[Group]) -> list[str]:
    of_tables = [note for group in groups for table in group.tables for note in table.notes]
    return list(dict.fromkeys([*of_tables, *notes_on(groups)]))


def _classes(groups: Sequence[Group]) -> list[str]:
    """The classes that each group finds hardest, of several seeds the first."""
    tells_bn = len(_bns(groups)) > 1
    n_checkpoints = sum(len(group.reports) for group in groups)
    lines: list[str] = []
    for group in groups:
        report = group.reports[0]
        if report.counts is None:
            continue
        of_whom = ""
        number = None
        if n_checkpoints > 1:
            of_whom = f" of {plain(head(report, tells_bn=tells_bn))}"
            number = group.numbers[0]
        found = by_class.hardest(report.counts, report.names, number)
        lines += [f"- {title}{of_whom}: {plain(what)}" for title, what in found]
    return lines
