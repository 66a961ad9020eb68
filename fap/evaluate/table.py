"""The numbers of a report: one column for each checkpoint, and notes on what no number shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from fap.evaluate.corrupted import benchmarks_of, capped
from fap.evaluate.numbers import Number, Unit
from fap.evaluate.titles import (
    CALIBRATION,
    CLEAN,
    FOLDER,
    METRICS,
    NOT_KNOWN,
    attacked,
    corrupted,
    title_of_attack,
    title_of_metric,
    title_of_single,
)
from fap.evaluate.work import Report
from fap.tasks.base import Result, Task

AUX_NOTE = (
    "aux BN: through the auxiliary norms, which trained on what was attacked; an exported "
    "model has the main ones, or with fap-export --bn aux these (docs/glossary.md)"
)


class Table(NamedTuple):
    """One checkpoint's column."""

    rows: dict[str, Number]
    notes: list[str]


def table_of(report: Report) -> Table:
    """The column and the notes of one checkpoint."""
    rows = _plain_rows(report) | _cost_rows(report)
    notes = _label_notes(report.labels)
    if report.settings["bn"] == "aux":
        notes.append(AUX_NOTE)
    notes += _attack_notes(report)
    for measured in benchmarks_of(report):
        rows |= measured.rows()
        notes += measured.notes()
    notes += [f"not used: {line}" for line in capped(report.unused)]
    return Table(rows, notes)


# ---------------------------------------------------------------------- single sets


def _plain_rows(report: Report) -> dict[str, Number]:
    """Clean images by every metric, and after the first of them the sets of one number."""
    task = report.task
    clean = report.results[CLEAN]
    primary = task.primary
    rows = {
        task.rows[primary]: Number(100 * clean[primary], report.paper.get(primary), headline=True)
    }
    for key, result in report.results.items():
        if key != CLEAN and corrupted(key) is None:
            rows |= _rows_of_single(key, result, report)
    for metric, title in task.rows.items():
        if metric != primary and metric in clean:  # AP of a size that no object has is not
            rows[title] = _metric(metric, clean[metric], task)
    for metric, value in _other_metrics(clean, task).items():
        rows[title_of_metric(metric)] = _metric(metric, value, task)
    return rows


def _rows_of_single(key: str, result: Result, report: Report) -> dict[str, Number]:
    """The primary metric of a set, and those that are not every set's."""
    task = report.task
    attack = attacked(key)
    rows = {}
    if task.primary in result:
        title = f"{title_of_single(key)} {task.percents[task.primary]}"
        if attack is not None:
            title = title_of_attack(attack)
        value = 100 * result[task.primary]
        rows[title] = Number(value, report.paper.get(key), headline=True)
    for metric, value in _other_metrics(result, task).items():
        if metric != CALIBRATION:  # of clean images and as a mean; report.csv has them all
            title = f"{title_of_single(key)}: {title_of_metric(metric)}"
            rows[title] = _metric(metric, value, task)
    return rows


def _other_metrics(result: Result, task: Task) -> dict[str, float]:
    """Those that the task has no row for."""
    return {name: v for name, v in result.items() if name != "count" and name not in task.rows}


def _metric(metric: str, value: float, task: Task) -> Number:
    if metric == CALIBRATION:
        return Number(100 * value, better="less", part="metric")
    if metric in METRICS:
        return Number(100 * value, better=None, part="metric")
    if metric in task.percents:
        return Number(100 * value, part="metric")
    return Number(value, unit="plain", better="less" if metric == "loss" else None, part="metric")


# ---------------------------------------------------------------------- cost


def _cost_rows(report: Report) -> dict[str, Number]:
    """What the training took, as far as it is known."""
    training = report.training
    if training is None:
        return {}
    found: dict[str, tuple[float | None, Unit]] = {
        "image passes": (training.image_passes, "count"),
        "optimiser steps": (training.steps, "count"),
        "epochs": (training.epochs, "count"),
        "seconds of the run, by its own clock": (training.seconds, "seconds"),
    }
    return {
        title: Number(value, unit=unit, better=None, part="cost")
        for title, (value, unit) in found.items()
        if value is not None
    }


# ---------------------------------------------------------------------- notes


def _label_notes(labels: Mapping[str, str]) -> list[str]:
    """One line for each way in which labels were matched."""
    ways: defaultdict[str, list[str]] = defaultdict(list)
    for key, how in labels.items():
        benchmark = key if key.startswith(f"{FOLDER}/") else key.split("/")[0]
        if benchmark not in ways[how]:
            ways[how].append(benchmark)
    if len(ways) == 1:
        return [f"labels of all sets: {how}" for how in ways]
    return [f"labels of {', '.join(benchmarks)}: {how}" for how, benchmarks in ways.items()]


def _attack_notes(report: Report) -> list[str]:
    """On how many images the attacks were made, and how, method by method."""
    found = {key: one for key in report.results if (one := attacked(key)) is not None}
    if not found:
        return []
    count = report.results[next(iter(found))]["count"]  # the images of all attacks are the same
    how = dict.fromkeys(
        f"{one.method}: {report.settings.get(key, NOT_KNOWN)}" for key, one in found.items()
    )
    return [
        f"attacks: on {count:,} of the clean images, through the norms of the column; L-infinity, "
        f"untargeted, eps in grey levels of 0..255 ({'; '.join(how)})"
    ]
