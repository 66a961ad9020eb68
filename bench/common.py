"""What every benchmark shares: options, turns, medians and ratios, the report, the environment.

A library: it measures nothing by itself. `report` writes FILE.json, FILE.md and FILE.png.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Row = Mapping[str, Any]  # of a table: its cells by column

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DRAWS = 4000  # of the bootstrap
INTERVAL_PERCENT = (2.5, 97.5)  # 95%


# ------------------------------------------------------------------ options


def options(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with `--out` and one option per default.

    A list takes several values, a bool has a `--no-` form.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    for name, default in defaults.items():
        how: dict[str, Any]
        match default:
            case bool():
                how = {"action": argparse.BooleanOptionalAction}
            case list():
                how = {"type": type(default[0]), "nargs": "+"}
            case _:
                how = {"type": type(default)}
        word = "--" + name.replace("_", "-")
        parser.add_argument(word, default=default, help="default: %(default)s", **how)
    return parser


def settings_of(a: argparse.Namespace, **facts: Any) -> dict[str, Any]:
    """The options of a bench as its report shows them, without paths; `facts` are set or added."""
    every = vars(a) | facts
    return {k: v for k, v in every.items() if v is not None and not isinstance(v, Path)}


# ------------------------------------------------------------------ measuring


def alternate(
    measure: Callable[[T], Any], contestants: Iterable[T], rounds: int, warm_up: int = 2
) -> np.ndarray:
    """(contestants, ..., rounds): what `measure` gives of each, in turns.

    Turns, because then all meet the same clock speed and the same neighbours. The first `warm_up`
    rounds are thrown away.
    """
    contestants = list(contestants)
    found = []
    for _ in range(warm_up + rounds):
        found.append([measure(contestant) for contestant in contestants])
    return np.moveaxis(np.array(found[warm_up:]), 0, -1)


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """n, median, smallest and largest of repeated measurements."""
    return {
        "n": len(values),
        "median": float(np.median(values)),
        "min": float(np.min(values)),
        "max": float(np.max(values)),
    }


def ratio(
    top: np.ndarray,  # (rounds,)
    bottom: np.ndarray,  # (rounds,), of the same rounds
    fixed: Sequence[float] = (0, 0),  # added to the one and to the other
) -> dict[str, float]:
    """(median(top) + fixed) / (median(bottom) + fixed), with its 95% bootstrap interval.

    A draw takes both from the same rounds, so what disturbs both in one round cancels.
    """
    n_rounds = len(top)
    as_measured = np.arange(n_rounds)
    drawn = np.random.default_rng(0).integers(n_rounds, size=(DRAWS, n_rounds))
    rounds = np.vstack([as_measured, drawn])
    ratios = (np.median(top[rounds], 1) + fixed[0]) / (np.median(bottom[rounds], 1) + fixed[1])
    low, high = np.percentile(ratios[1:], INTERVAL_PERCENT)
    return {"ratio": float(ratios[0]), "low": float(low), "high": float(high)}


def interval(value: Mapping[str, float]) -> tuple[float, float, float]:
    """Middle, low and high of what `spread` or `ratio` gives."""
    middle, low, high = list(value.values())[-3:]
    return middle, low, high


# ------------------------------------------------------------------ the report


def cell(value: Any) -> str:
    """A table's cell: a spread or a ratio with its limits, or anything else."""
    if isinstance(value, dict):
        middle, low, high = interval(value)
        return f"{middle:.4g} [{low:.4g}, {high:.4g}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def report(
    file: Path,  # without its suffix
    settings: Mapping[str, Any],
    results: list[Any],
    bars: Sequence[str],
    row: Callable[..., Row] = dict,
) -> list[str]:
    """Write `file`.json, .md and .png; returns the table's lines.

    `row` makes of a result the cells of its line, by column. A result with an `error` shows its
    plain values instead. `bars` are the columns to plot, spreads or ratios; without them there is
    no .png.
    """
    write_json(file.with_suffix(".json"), {"settings": settings, "results": results})
    rows: list[Row] = []
    good: list[Row] = []
    for result in results:
        if "error" in result:
            rows.append(result)
            continue
        shown = row(result)
        rows.append(shown)
        good.append(shown)
    lines = _table(rows, good)
    notes = [str(settings), "", str(environment()), ""]
    file.with_suffix(".md").write_text("\n".join([*lines, "", *notes]))
    if bars:
        _plot(good, bars, file.with_suffix(".png"))
    return lines


def _table(rows: Sequence[Row], good: Sequence[Row]) -> list[str]:
    """Markdown. The columns are those of the measured (`good`) rows."""
    head = list(good[0]) if good else []
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = []
        for column, value in row.items():
            cells.append(f"not measured: {value}" if column == "error" else cell(value))
        lines.append(_line(cells))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plot(rows: Sequence[Row], bars: Sequence[str], file: Path) -> None:
    """One panel per column of `bars`, one bar per row, with its interval."""
    from matplotlib.figure import Figure  # not at the top: the loaders' start-up is measured

    labels = []
    for row in rows:
        labels.append(" ".join(str(v) for v in row.values() if isinstance(v, str | int)))
    figure = Figure((12, 1.5 + 0.35 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(bars), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, bars, strict=True):
        intervals = np.reshape([interval(row[column]) for row in rows], (-1, 3))
        middle, low, high = intervals.T
        axes.barh(range(len(rows)), middle, xerr=[middle - low, high - middle], tick_label=labels)
        axes.set_xlabel(column)
    panels[-1].invert_yaxis()  # shared: the first row is on top in all
    figure.savefig(file, dpi=120)


def environment() -> dict[str, Any]:
    """Cores this process may use, memory in GB, load, versions, device, processor and commit."""
    import torch

    from fap.versions import versions
    from pipelines.machine import usable_cores

    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": usable_cores(),
        "memory_gb": round(memory_bytes / 1e9, 1),
        "load_average": os.getloadavg()[0],
        "torch_threads": torch.get_num_threads(),
        **versions(),
    }


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write `{"environment": ..., **results}`; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n")
