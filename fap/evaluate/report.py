"""What `fap-eval` tells: the plan before the work, then tables and a plot."""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib.figure  # a Figure of its own needs no display
import numpy as np

from fap.evaluate.mce import ALEXNET_ERRORS, EXTRA, lacking, summarise
from pipelines.files import shown, write_whole

if TYPE_CHECKING:
    from fap.evaluate.work import Work

TOP1 = {
    "clean": "top-1 accuracy",
    "imagenet_r": "ImageNet-R top-1",
    "stylized": "Stylized-ImageNet top-1",
}
KINDS = {
    "computed": "computed here, not the published files",
    "imagenet_c": "ImageNet-C",
    "cifar10_c": "CIFAR-10-C",
}
SUMMARY = {"raw_15": "15 corruptions", "raw_19": "19 corruptions", "mce": "mCE, AlexNet = 100"}
MOST_LISTED = 10
MOST_INCHES = 400  # of the plot's height: matplotlib draws at most 65,536 pixels


# ---------------------------------------------------------------------- before the work


def plan(work: Work) -> str:
    """What will be evaluated, for the user to see a mistake before it costs hours."""
    config = work.config
    classes = f"{config.model.num_classes} classes"
    if work.classes is None:
        classes += " without names"
    else:
        classes += f" ({_some(work.classes, 3)})"
    lines = [
        f"{work.path}: {config.name}, seed {config.seed}, step {work.step}: {config.model.name},"
        f" {classes}"
    ]
    for kind, group in groupby(work.items, key=lambda item: item.set.key.split("/")[0]):
        items = list(group)
        images = _range(item.count for item in items)
        source = _where(items[0].set.source, kind)
        known = sum(item.known is not None for item in items)
        done = f", {known} of them evaluated before" if known else ""
        hows = ", ".join(sorted({item.labels for item in items}))
        n_sets = f"{len(items)} set" + ("s" if len(items) > 1 else "")
        lines.append(f"  {kind}: {n_sets} of {images} images, {source}, labels {hows}{done}")
    lines += [f"  not used: {line}" for line in _capped(work.unused)]
    return "\n".join(lines)


def _where(source: Path, kind: str) -> str:
    """The folder of a whole benchmark rather than that of its first set."""
    match kind:
        case "imagenet_c":
            source = source.parent.parent
        case "cifar10_c":
            source = source.parent
    return shown(str(source), 300)[1:-1]


def _some(names: Sequence[str], most: int) -> str:
    """The first names and the last one."""
    if len(names) <= most + 1:
        return ", ".join(shown(name, 60)[1:-1] for name in names)
    first = ", ".join(shown(name, 60)[1:-1] for name in names[:most])
    return f"{first} ... {shown(names[-1], 60)[1:-1]}"


def _range(counts: Any) -> str:
    counts = sorted(set(counts))
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _capped(lines: Sequence[str]) -> list[str]:
    if len(lines) <= MOST_LISTED:
        return list(lines)
    return [*lines[:MOST_LISTED], f"and {len(lines) - MOST_LISTED} more"]


# ---------------------------------------------------------------------- after it


class Table(NamedTuple):
    """One checkpoint's column."""

    rows: dict[
        str, tuple[float, float | None]
    ]  # row: (ours, the paper's); percent but for the loss
    notes: list[str]  # what no number shows


def table_of(report: Mapping[str, Any]) -> Table:
    """The column and the notes of one report of `fap.evaluate.work.carry_out`."""
    results = report["results"]
    paper = {"clean": report["paper"].get("top1")} | report["paper"]
    rows: dict[str, tuple[float, float | None]] = {}
    for key, row in TOP1.items():
        if key in results:
            rows[row] = (100 * results[key]["top1"], paper.get(key))
    rows["top-5 accuracy"] = (100 * results["clean"]["top5"], None)
    rows["loss"] = (results["clean"]["loss"], None)

    notes = _label_notes(report["labels"])
    kinds: dict[
        str, dict[str, dict[int, dict[str, Any]]]
    ] = {}  # {kind: {corruption: {severity: result}}}
    for key, result in results.items():
        if "/" in key:
            kind, name, severity = key.split("/")
            kinds.setdefault(kind, {}).setdefault(name, {})[int(severity)] = result
    for kind, by_name in kinds.items():
        errors = {
            name: {s: 1 - result["top1"] for s, result in by.items()}
            for name, by in by_name.items()
        }
        of_alexnet = kind == "imagenet_c" or (kind == "computed" and not report["small"])
        refused = _why_no_means(by_name, of_alexnet)
        n_sets = sum(len(by) for by in errors.values())
        for key, value in summarise(errors).items():
            if key == "mean":
                rows[f"error, all {n_sets} sets ({KINDS[kind]})"] = (value, None)
            elif key not in refused:
                of_paper = (
                    paper.get("imagenet_c") if key == "raw_19" and kind != "cifar10_c" else None
                )
                rows[f"error, {SUMMARY[key]} ({KINDS[kind]})"] = (value, of_paper)
        for name, by in errors.items():
            rows[f"error, {name} ({KINDS[kind]}){_severities(by)}"] = (
                100 * fmean(by.values()),
                None,
            )
        notes += [
            f"{SUMMARY[key]} ({KINDS[kind]}): not computed: {why}" for key, why in refused.items()
        ]
    notes += [f"not used: {line}" for line in _capped(report["unused"])]
    return Table(rows, notes)


def _severities(by: Mapping[int, Any]) -> str:
    if len(by) == 5:
        return ""
    plural = "severity" if len(by) == 1 else "severities"
    return f", over {plural} {', '.join(map(str, sorted(by)))} only"


def _why_no_means(
    by_name: Mapping[str, Mapping[int, Mapping[str, Any]]], of_alexnet: bool
) -> dict[str, str]:
    """{mean that must not be computed: the reason}."""
    refused: dict[str, str] = {}
    counts = Counter(result["count"] for by in by_name.values() for result in by.values())
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        odd = [
            f"{name} at severity {severity} has {result['count']:,} images"
            for name, by in by_name.items()
            for severity, result in by.items()
            if result["count"] != usual
        ]
        why = f"{'; '.join(_capped(odd))}, but most sets have {usual:,}"
        refused = dict.fromkeys(SUMMARY, why)
    for key, names in (
        ("raw_15", [*ALEXNET_ERRORS]),
        ("raw_19", [*ALEXNET_ERRORS, *EXTRA]),
        ("mce", [*ALEXNET_ERRORS]),
    ):
        why = lacking(by_name, names)
        if why:
            refused[key] = why
    if not of_alexnet:
        refused["mce"] = "AlexNet's errors are those of ImageNet-C"
    return refused


def _label_notes(labels: Mapping[str, str]) -> list[str]:
    """One line for each way in which labels were matched."""
    ways: defaultdict[str, list[str]] = defaultdict(list)
    for key, how in labels.items():
        kind = key.split("/")[0]
        if kind not in ways[how]:
            ways[how].append(kind)
    if len(ways) == 1:
        return [f"labels of all sets: {how}" for how in ways]
    return [f"labels of {', '.join(kinds)}: {how}" for how, kinds in ways.items()]


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """The checkpoints side by side, then what no number shows."""
    tables = [table_of(report) for report in reports]
    settings = reports[0]["settings"]
    count = reports[0]["results"]["clean"]["count"]
    lines = [f"{count} images of {_plain(settings['data'])}, {settings['bn']} BN; percent.", ""]
    lines.append(f"| | {' | '.join(_plain(head(report)) for report in reports)} |")
    lines.append("|---" + "|--:" * len(reports) + "|")
    for row in _all_rows(tables):
        lines.append(f"| {row} | {' | '.join(_cell(table.rows.get(row)) for table in tables)} |")
    notes = dict.fromkeys(note for table in tables for note in table.notes)
    if notes:
        lines += ["", *(f"- {_plain(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def head(report: Mapping[str, Any]) -> str:
    """A checkpoint's name in tables and plot."""
    return f"{report['name']}, seed {report['seed']}, step {report['step']}"


def _all_rows(tables: Sequence[Table]) -> list[str]:
    return list(dict.fromkeys(row for table in tables for row in table.rows))


def _plain(text: str) -> str:
    """Text out of a file or a path, for a table's cell: one line, no column of its own."""
    return shown(text, 400)[1:-1].replace("|", "\\|")


def _cell(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return ""
    ours, paper = value
    return f"{ours:.2f}" if paper is None else f"{ours:.2f} (paper {paper:g})"


def write_report(reports: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write report.md, report.json and report.png, each completely or not at all. Raises OSError."""
    write_whole(out / "report.md", [markdown(reports).encode(errors="backslashreplace")])
    full = []
    for report in reports:
        table = table_of(report)
        summary = {row: ours for row, (ours, _) in table.rows.items()}
        full.append({**report, "summary": summary, "notes": table.notes})
    write_whole(out / "report.json", [json.dumps(full, indent=1).encode()])
    write_whole(out / "report.png", [_plot(reports)])


def _plot(reports: Sequence[Mapping[str, Any]]) -> bytes:
    tables = [table_of(report).rows for report in reports]
    rows = [row for row in dict.fromkeys(row for table in tables for row in table) if row != "loss"]
    height = min(MOST_INCHES, 1 + 0.2 * len(rows) * (1 + len(reports)))
    figure = matplotlib.figure.Figure(figsize=(10, height), layout="constrained")
    axes = figure.add_subplot(xlabel="percent")
    width = 0.8 / len(reports)
    for i, (report, table) in enumerate(zip(reports, tables, strict=True)):
        values = [table.get(row, (float("nan"), None))[0] for row in rows]
        axes.barh(
            np.arange(len(rows)) + (i + 0.5) * width, values, width, label=_unmarked(head(report))
        )
    axes.set_yticks(np.arange(len(rows)) + 0.4, rows)
    axes.invert_yaxis()
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, dpi=120)
    return file.getvalue()


def _unmarked(text: str) -> str:
    """matplotlib reads `$` as mathematics, and leaves labels that start with `_` out of the legend."""
    return shown(text, 100)[1:-1].replace("$", r"\$").lstrip("_")
