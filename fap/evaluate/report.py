"""What `fap-eval` tells: the plan before the work, then a page, its tables as files, and plots."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from fap.evaluate import by_class, plots
from fap.evaluate.corrupted import capped
from fap.evaluate.evaluation import Item
from fap.evaluate.groups import Group, groups_of, of_average
from fap.evaluate.page import page
from fap.evaluate.tables_out import csv_file, groups_json, reports_json, tex_file
from fap.evaluate.work import Report, Work
from fap.nets.norm import Bn
from fap.tasks.class_counts import ClassCounts
from pipelines.files import readable, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMED = 3  # classes, before the last one


# ---------------------------------------------------------------------- before the work


def plan(work: Work) -> str:
    """What will be evaluated, for the user to see a mistake before it costs hours."""
    config = work.config
    classes = f"{config.model.num_classes} classes"
    if work.classes is None:
        classes += " without names"
    else:
        classes += f" ({_some(work.classes)})"
    source = readable(work.model.source)
    step = f"step {work.step}{of_average(work.weights)}{_through_aux(work.bn)}"
    what = f"{config.name}, seed {config.seed}, {step}"
    if work.model.is_plain:
        what = "plain weights"
    lines = [f"{source}: {what}: {config.model.name}, {classes}"]
    lines += [f"  {source}: {note}" for note in work.notes]
    for benchmark, items in groupby(work.items, key=_benchmark):
        lines.append(f"  {benchmark}: {_in_words(benchmark, list(items))}")
    lines += [f"  not used: {line}" for line in capped(work.unused)]
    return "\n".join(lines)


def _benchmark(item: Item) -> str:
    benchmark, _, _ = item.set.key.partition("/")
    return item.set.key if benchmark == "folder" else benchmark


def _in_words(benchmark: str, items: Sequence[Item]) -> str:
    """`2 sets of 12 images, FOLDER, labels by name, 1 of them evaluated before`."""
    n_sets = f"{len(items)} set"
    if len(items) > 1:
        n_sets += "s"
    images = _range([item.count for item in items])
    source = _where(items[0].set.source, benchmark)
    hows = ", ".join(sorted({item.labels for item in items}))
    words = f"{n_sets} of {images} images, {source}, labels {hows}"
    n_known = sum(item.known is not None for item in items)
    if n_known:
        words += f", {n_known} of them evaluated before"
    return words


def _where(source: Path, benchmark: str) -> str:
    """The folder of a whole benchmark rather than that of its first set."""
    match benchmark:
        case "imagenet_c" | "imagenet_c_bar" | "fap_corrupt":
            source = source.parent.parent
        case "cifar10_c" | "cifar100_c":
            source = source.parent
    return readable(str(source), 300)


def _some(names: Sequence[str]) -> str:
    """The first names and the last one."""
    shortened = [readable(name, 60) for name in names]
    if len(names) <= MOST_NAMED + 1:
        return ", ".join(shortened)
    return f"{', '.join(shortened[:MOST_NAMED])} ... {shortened[-1]}"


def _range(counts: Sequence[int]) -> str:
    least = min(counts)
    most = max(counts)
    if least == most:
        return f"{least:,}"
    return f"{least:,} to {most:,}"


# ---------------------------------------------------------------------- after it

# What is written where there is something to write, beside the counts by class.
GROUPS = "groups.json"
BY_CLASS = re.compile(r"(per_class|confusion)(_[0-9]+)?\.(csv|png)")


def markdown(reports: Sequence[Report]) -> str:
    """The page: words, tables, notes."""
    return page(groups_of(reports))


def _through_aux(bn: Bn) -> str:
    return ", aux BN" if bn == "aux" else ""


def write_report(reports: Sequence[Report], out: Path) -> str:
    """Write report.md, .csv, .tex and .json, the counts by class and the plots, each whole or not
    at all. A former report's files that this one has not are removed.

    Raises OSError.

    Returns why there are no plots, if there are none: the numbers are worth more than they.
    """
    groups = groups_of(reports)
    files = {
        "report.md": page(groups).encode(errors="backslashreplace"),
        "report.csv": csv_file(groups),
        "report.tex": tex_file(groups),
        "report.json": reports_json(groups, reports),
    }
    if len(reports) > 1:
        files[GROUPS] = groups_json(groups)
    for file, report, counts in _files_by_class(reports, "per_class.csv"):
        files[file] = by_class.per_class_csv(counts, report.names)
    for file, report, counts in _files_by_class(reports, "confusion.csv"):
        if counts.confusion is not None:
            files[file] = by_class.confusion_csv(counts.confusion, report.names)
    for former in _former(out) - files.keys():
        (out / former).unlink(missing_ok=True)
    for name, content in files.items():
        write_whole(out / name, [content])
    try:
        _write_plots(groups, reports, out)
    except ImportError as error:
        return f"no {readable(out / 'report.png')}: {error}"
    return ""


def _former(out: Path) -> set[str]:
    """What an earlier report may have left that this one need not have: plots, counts by class."""
    by_class_files = {path.name for path in out.iterdir() if BY_CLASS.fullmatch(path.name)}
    return {GROUPS, *plots.PLOTS, *by_class_files}


def _write_plots(groups: Sequence[Group], reports: Sequence[Report], out: Path) -> None:
    """Raises ImportError, OSError."""
    for name, draw in plots.PLOTS.items():
        content = _plot(draw, groups)
        if content is not None:
            write_whole(out / name, [content])
    for file, report, counts in _files_by_class(reports, "confusion.png"):
        if by_class.is_drawn(counts):
            write_whole(out / file, [_confusion_plot(report, counts)])


def _plot(
    draw: Callable[[Sequence[Group]], Figure | None], groups: Sequence[Group]
) -> bytes | None:
    return plots.png(draw, groups)


def _confusion_plot(report: Report, counts: ClassCounts) -> bytes:
    content = plots.png(plots.confusion, report, counts)
    assert content is not None
    return content


def _files_by_class(
    reports: Sequence[Report], name: str
) -> Iterator[tuple[str, Report, ClassCounts]]:
    """A file of each checkpoint that has counts: NAME, or of several NAME_1, NAME_2 ..."""
    for number, report in enumerate(reports, 1):
        if report.counts is None:
            continue
        file = by_class.file_name(name, number if len(reports) > 1 else None)
        yield file, report, report.counts
