"""What `fap-eval` tells: the plan before the work, then tables and a plot."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from fap.evaluate import by_class
from fap.evaluate.load import WhichWeights
from fap.evaluate.table import Number, Table, capped, table_of
from fap.evaluate.work import Item, Report, Work
from fap.nets.norm import Bn
from fap.tasks.class_counts import ClassCounts
from pipelines.extras import needs
from pipelines.files import readable, write_whole

MOST_NAMED = 3  # classes, before the last one
MOST_INCHES = 400  # of the plot's height: matplotlib draws at most 65,536 pixels
INCHES_PER_BAR = 0.2
BARS_OF_A_ROW = 0.8  # their share of its height


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
    step = f"step {work.step}{_of_average(work.weights)}{_through_aux(work.bn)}"
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
        case "imagenet_c" | "imagenet_c_bar":
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


def markdown(reports: Sequence[Report]) -> str:
    """The checkpoints side by side, then what no number shows."""
    tables = [table_of(report) for report in reports]
    settings = reports[0].settings
    norms = " and ".join(dict.fromkeys(report.settings["bn"] for report in reports))
    count = reports[0].results["clean"]["count"]
    lines = [
        f"{count} images of {_plain(settings['data'])}, {norms} BN; percent.",
        "",
        f"| | {' | '.join(_plain(head(report)) for report in reports)} |",
        "|---" + "|--:" * len(reports) + "|",
    ]
    for row in _all_rows(tables):
        lines.append(f"| {row} | {' | '.join(_cell(table.rows.get(row)) for table in tables)} |")
    notes = dict.fromkeys(note for table in tables for note in table.notes)
    if notes:
        lines += ["", *(f"- {_plain(note)}" for note in notes)]
    lines += _classes(reports, after=notes)
    return "\n".join(lines) + "\n"


def _classes(reports: Sequence[Report], after: Collection[str]) -> list[str]:
    """Below the notes: the classes that each checkpoint finds hardest."""
    lines: list[str] = []
    for report in reports:
        if report.counts is None:
            continue
        of_whom = f" of {_plain(head(report))}" if len(reports) > 1 else ""
        found = by_class.hardest(report.counts, report.names)
        lines += [f"- {title}{of_whom}: {_plain(what)}" for title, what in found]
    return lines if after or not lines else ["", *lines]


def head(report: Report) -> str:
    """A model's name in tables and plot."""
    if report.is_plain:
        return report.name
    step = f"step {report.step}{_of_average(report.weights)}"
    return f"{report.name}, seed {report.seed}, {step}{_through_aux(report.settings['bn'])}"


def _through_aux(bn: Bn) -> str:
    return ", aux BN" if bn == "aux" else ""


def _of_average(weights: WhichWeights) -> str:
    return ", EMA" if weights == "ema" else ""


def _all_rows(tables: Sequence[Table]) -> list[str]:
    return list(dict.fromkeys(row for table in tables for row in table.rows))


def _plain(text: str) -> str:
    """Text out of a file or a path, for a table's cell: one line, no column of its own."""
    return readable(text, 400).replace("|", "\\|")


def _cell(number: Number | None) -> str:
    if number is None:
        return ""
    if number.paper is None:
        return f"{number.ours:.2f}"
    return f"{number.ours:.2f} (paper {number.paper:g})"


def write_report(reports: Sequence[Report], out: Path) -> str:
    """Write report.md, report.json, the counts by class and report.png, each whole or not at all.

    Raises OSError.

    Returns why there is no plot, if there is none: the numbers are worth more than it.
    """
    write_whole(out / "report.md", [markdown(reports).encode(errors="backslashreplace")])
    trees = []
    for report in reports:
        table = table_of(report)
        summary = {row: number.ours for row, number in table.rows.items()}
        trees.append({**report.tree(), "summary": summary, "notes": table.notes})
    write_whole(out / "report.json", [json.dumps(trees, indent=1).encode()])
    for file, report, counts in _files_by_class(reports, out, "per_class.csv"):
        write_whole(file, [by_class.per_class_csv(counts, report.names)])
    for file, report, counts in _files_by_class(reports, out, "confusion.csv"):
        if counts.confusion is not None:
            write_whole(file, [by_class.confusion_csv(counts.confusion, report.names)])
    try:
        write_whole(out / "report.png", [_plot(reports)])
        for file, report, counts in _files_by_class(reports, out, "confusion.png"):
            if by_class.is_drawn(counts):
                write_whole(file, [_confusion_plot(report, counts)])
    except ImportError as error:
        return f"no {readable(out / 'report.png')}: {error}"
    return ""


def _files_by_class(
    reports: Sequence[Report], out: Path, name: str
) -> Iterator[tuple[Path, Report, ClassCounts]]:
    """A file of each checkpoint that has counts: NAME, or of several NAME_1, NAME_2 ..."""
    for number, report in enumerate(reports, 1):
        if report.counts is None:
            continue
        file = out / name
        if len(reports) > 1:
            file = file.with_stem(f"{file.stem}_{number}")
        yield file, report, report.counts


def _confusion_plot(report: Report, counts: ClassCounts) -> bytes:
    """A PNG. Raises ImportError."""
    with needs("plots", "the plot of a report"):
        from matplotlib.figure import Figure
    assert counts.confusion is not None
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.add_subplot(xlabel="taken for", ylabel="class", title=_unmarked(head(report)))
    n_images = np.maximum(counts.n_images, 1)[:, None]
    shown = axes.imshow(100 * counts.confusion / n_images, vmin=0, vmax=100, cmap="Blues")
    names = [_unmarked(name) for name in by_class.names_of(counts, report.names)]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(shown, label="percent of the class", shrink=0.8)
    file = io.BytesIO()
    figure.savefig(file, dpi=120)
    return file.getvalue()


def _plot(reports: Sequence[Report]) -> bytes:
    """A PNG: the rows that are percentages, a bar for each checkpoint. Raises ImportError."""
    with needs("plots", "the plot of a report"):
        from matplotlib.figure import Figure  # one of its own needs no display
    tables = [table_of(report) for report in reports]
    others = {
        title
        for report in reports
        for metric, title in report.task.rows.items()
        if metric not in report.task.percents
    }
    rows = [row for row in _all_rows(tables) if row not in others]
    height = min(MOST_INCHES, 1 + INCHES_PER_BAR * len(rows) * (1 + len(reports)))
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.add_subplot(xlabel="percent")
    bar = BARS_OF_A_ROW / len(reports)
    absent = Number(float("nan"))
    for i, (report, table) in enumerate(zip(reports, tables, strict=True)):
        values = [table.rows.get(row, absent).ours for row in rows]
        middles = np.arange(len(rows)) + (i + 0.5) * bar
        axes.barh(middles, values, bar, label=_unmarked(head(report)))
    axes.set_yticks(np.arange(len(rows)) + BARS_OF_A_ROW / 2, rows)
    axes.invert_yaxis()
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, dpi=120)
    return file.getvalue()


def _unmarked(text: str) -> str:
    """A label that matplotlib shows as it is.

    It reads `$` as mathematics, and leaves labels that start with `_` out of the legend.
    """
    return readable(text, 100).replace("$", r"\$").lstrip("_")
