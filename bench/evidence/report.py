"""A study's results: what they show in words, tables, a figure.

A library of `bench.evidence`; `write` makes OUT.json, .md and .png.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.common import write_json
from bench.evidence.arms import ARMS, THROUGH_BOTH
from bench.evidence.cost import Costs
from bench.evidence.figure import figure
from bench.evidence.measure import Row
from bench.evidence.numbers import MEASURES, Rows
from bench.evidence.studies import Part, Regime, Study
from bench.evidence.words import words
from bench.tables import markdown, with_interval
from pipelines.corrupt import NAMES

SHOWN = ("clean", "main/corrupted", "main/pgd10/1", "main/ece")  # in the tables of means
COMPARED = ("clean", "main/corrupted", "main/lost", "main/pgd10/1", "main/ece")
OF_NORMS = (
    "clean",
    "corrupted",
    "pgd10/1",
    "pgd10/2",
    "pgd10/4",
    "autoattack/1",
    "autoattack/2",
    "autoattack/4",
    "ece",
)


def write(rows: Rows, study: Study, out: Path, costs: Costs) -> str:
    """OUT.json, .md and .png; returns the text."""
    text = "\n\n".join(_text(rows, study, costs))
    comparisons = {title: compared(rows, part) for title, part in study.parts.items()}
    found = {"study": study.tree(), "costs": costs, "rows": list(rows.rows)}
    found["comparisons"] = comparisons
    write_json(out.with_suffix(".json"), found)
    out.with_suffix(".md").write_text(text + "\n")
    drawn = figure(rows, study)
    if drawn is not None:
        drawn.savefig(out.with_suffix(".png"), dpi=120)
    return text


def _text(rows: Rows, study: Study, costs: Costs) -> Iterator[str]:
    yield "\n".join(f"- {line}" for line in words(rows, study, costs))
    for title, part in study.parts.items():
        if not any(_lines(rows, part)):
            continue
        yield f"## {title[0].upper()}{title[1:]}"
        yield part.question
        yield means_table(rows, part)
        yield differences_table(rows, part)
    if costs:
        yield "## Cost of a run"
        yield costs_table(costs)
    if study.headline is not None:
        yield "## The headline, tested"
        yield tests_table(rows, study.headline)
        yield "## Every corruption"
        yield corruptions_table(rows, study.headline)
    yield "## Through the auxiliary norms"
    yield norms_table(rows, study)


def compared(rows: Rows, part: Part) -> list[dict[str, Any]]:
    """Every comparison of a part, for the JSON."""
    found = []
    for regime in part.regimes:
        for arm in part.arms:
            for measure in MEASURES:
                difference = rows.difference(regime, arm, part.base, measure)
                if arm == part.base or difference is None:
                    continue
                where = {"regime": regime.name, "arm": arm, "base": part.base, "measure": measure}
                found.append(where | asdict(difference))
    return found


# ------------------------------------------------------------------ tables


def means_table(rows: Rows, part: Part) -> str:
    """A line per regime and arm: means over the seeds, in percent, and how long was trained.

    Without seconds: runs that had other neighbours, or machines, compare nothing (`costs_table`).
    """
    head = [
        "percent",
        "seeds",
        "training images right",
        *(MEASURES[measure].title for measure in SHOWN),
        "zero signs",
        "steps",
        "image passes",
    ]
    lines = []
    for regime, arm in _lines(rows, part):
        runs = rows.of(regime, arm)
        first = runs[0]
        line = [_title(part, regime, arm), str(len(runs)), _training(runs)]
        line += [_mean(rows.mean(regime, arm, measure)) for measure in SHOWN]
        line.append(f"{first['numbers']['zero_signs']:.2g}" if attacks(first) else "")
        line += [f"{first['steps']:,}", f"{first['image_passes']:,}"]
        lines.append(line)
    return markdown(head, lines)


def _training(runs: list[Row]) -> str:
    """Accuracies on the training rows of the last epoch, as training sees them: by kind."""
    names = [name for name in runs[0]["numbers"] if name.startswith("train/")]
    means = {name: fmean(run["numbers"][name] for run in runs) for name in names}
    return ", ".join(f"{mean:.0f} {name.removeprefix('train/')}" for name, mean in means.items())


def attacks(row: Row) -> bool:
    return "zero_signs" in row["numbers"]


def differences_table(rows: Rows, part: Part) -> str:
    """A line per regime and arm: differences to the part's base in points, with 95% intervals."""
    titles = [MEASURES[measure].title for measure in COMPARED]
    head = [f"minus {ARMS[part.base].title}, points", "seeds", *titles]
    lines = []
    for regime, arm in _lines(rows, part):
        found = [rows.difference(regime, arm, part.base, measure) for measure in COMPARED]
        seeds = [difference.n for difference in found if difference is not None]
        if arm == part.base or not seeds:
            continue
        cells = ["" if difference is None else with_interval(difference) for difference in found]
        lines.append([_title(part, regime, arm), str(max(seeds)), *cells])
    return markdown(head, lines)


def tests_table(rows: Rows, part: Part) -> str:
    """A line per measure and arm: both means, and the paired test."""
    base = ARMS[part.base].title
    head = ["", "measure", base, "arm", "difference", "effect size d_z", "p", "seeds"]
    lines = []
    (regime,) = part.regimes
    for arm in part.arms:
        for measure in MEASURES:
            difference = rows.difference(regime, arm, part.base, measure)
            if arm == part.base or difference is None:
                continue
            means = [f"{rows.mean(regime, one, measure):.2f}" for one in (part.base, arm)]
            test = [with_interval(difference, 2), _number(difference.effect), _number(difference.p)]
            lines.append(
                [ARMS[arm].title, MEASURES[measure].title, *means, *test, str(difference.n)]
            )
    return markdown(head, lines)


def corruptions_table(rows: Rows, part: Part) -> str:
    """A line per corruption: the base's mean over its severities, and the differences to it."""
    (regime,) = part.regimes
    others = [arm for arm in part.arms if arm != part.base and rows.of(regime, arm)]
    base = ARMS[part.base].title
    head = ["percent right under", base, *(f"{ARMS[arm].title} - {base}" for arm in others)]
    lines = []
    measured = rows.of(regime, part.base)[0]["numbers"]
    for name in NAMES:
        if f"main/{name}" not in measured:
            continue
        cells = [f"{rows.mean(regime, part.base, f'main/{name}'):.1f}"]
        for arm in others:
            difference = rows.difference(regime, arm, part.base, f"main/{name}")
            cells.append("" if difference is None else with_interval(difference))
        lines.append([name, *cells])
    return markdown(head, lines)


def norms_table(rows: Rows, study: Study) -> str:
    """What was measured through both sets of norms, all on the images that are corrupted.

    Lines per regime and arm: both sets less the part's base, and the auxiliary less the main one.
    """
    head = ["points", "seeds", *(MEASURES[f"main/{name}"].title for name in OF_NORMS)]
    lines = {}  # each once: parts share regimes and arms
    for part in study.parts.values():
        base = ARMS[part.base].title
        for regime, arm in _lines(rows, part):
            if arm not in THROUGH_BOTH:
                continue
            for title, norms, other in (
                (f"main norms - {base}", "main", part.base),
                (f"auxiliary norms - {base}", "aux", part.base),
                ("auxiliary - main norms", "aux", arm),
            ):
                found = [
                    rows.difference(regime, arm, other, f"{norms}/{name}", f"main/{name}")
                    for name in OF_NORMS
                ]
                seeds = [difference.n for difference in found if difference is not None]
                if seeds:
                    cells = ["" if one is None else with_interval(one) for one in found]
                    what = f"{regime.title}, {ARMS[arm].title}: {title}"
                    lines[what] = [str(max(seeds)), *cells]
    return markdown(head, [[what, *cells] for what, cells in lines.items()])


def costs_table(costs: Costs) -> str:
    """A line per arm: seconds of a run over vanilla's, steps of all arms in turns."""
    lines = [
        [ARMS[arm].title, f"{cost['ratio']:.2f} [{cost['low']:.2f}, {cost['high']:.2f}]"]
        for arm, cost in costs.items()
    ]
    return markdown(["seconds, times vanilla's", "ratio"], lines)


def _lines(rows: Rows, part: Part) -> Iterator[tuple[Regime, str]]:
    for regime in part.regimes:
        for arm in part.arms:
            if rows.of(regime, arm):
                yield regime, arm


def _title(part: Part, regime: Regime, arm: str) -> str:
    if len(part.regimes) == 1:
        return ARMS[arm].title
    return f"{regime.title}: {ARMS[arm].title}"


def _mean(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
