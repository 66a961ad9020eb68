"""What every benchmark shares: options, turns, medians and ratios, the report, the environment
record.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def options(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with `--out` and one option per default: a list takes several values, a bool has a
    `--no-` form.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    for name, default in defaults.items():
        several = (
            {"type": type(default[0]), "nargs": "+"}
            if isinstance(default, list)
            else {"type": type(default)}
        )
        kind: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else several
        )
        parser.add_argument(
            "--" + name.replace("_", "-"), default=default, help="default: %(default)s", **kind
        )
    return parser


def alternate(calls: Sequence[Callable[[], Any]], rounds: int, warm_up: int = 2) -> np.ndarray:
    """(calls, ..., rounds): what the calls give, in turns; the first `warm_up` rounds are thrown
    away.
    """
    return np.moveaxis(
        np.array([[call() for call in calls] for _ in range(warm_up + rounds)])[warm_up:], 0, -1
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """n, median, smallest and largest of repeated measurements."""
    return {
        "n": len(values),
        "median": float(np.median(values)),
        "min": float(np.min(values)),
        "max": float(np.max(values)),
    }


def ratio(top: np.ndarray, bottom: np.ndarray, fixed: Sequence[float] = (0, 0)) -> dict[str, float]:
    """(median(top) + fixed) / (median(bottom) + fixed) with its 95% bootstrap interval over the
    rounds.
    """
    # The first row takes every round once, the others are drawn.
    rounds = np.vstack(
        [np.arange(len(top)), np.random.default_rng(0).integers(len(top), size=(4000, len(top)))]
    )
    ratios = (np.median(top[rounds], 1) + fixed[0]) / (np.median(bottom[rounds], 1) + fixed[1])
    low, high = np.percentile(ratios[1:], (2.5, 97.5))
    return {"ratio": float(ratios[0]), "low": float(low), "high": float(high)}


def cell(value: Any) -> str:
    """A table's cell: a spread or a ratio with its limits, or anything else."""
    if isinstance(value, dict):
        return "{:.4g} [{:.4g}, {:.4g}]".format(*list(value.values())[-3:])
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(
    name: str, a: Any, results: list[Any], bars: Sequence[str], row: Callable[..., Any] = dict
) -> list[str]:
    """Write NAME.json, .md and .png to `a.out` and return the table's lines.

    `row` makes of a result the cells of its line, by column; a result with an `error` shows its
    plain values instead. `bars` are the columns to plot, spreads or ratios.
    """
    from matplotlib.figure import Figure  # not at the top: the loaders' start-up is measured

    settings = {k: v for k, v in vars(a).items() if v is not None and not isinstance(v, Path)}
    write_json(a.out / f"{name}.json", {"settings": settings, "results": results})
    shown = [r if "error" in r else row(r) for r in results]
    good = [r for r in shown if "error" not in r]
    head = list(good[0]) if good else []
    body = [
        [f"not measured: {v}" if k == "error" else cell(v) for k, v in r.items()] for r in shown
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
    (a.out / f"{name}.md").write_text(
        "\n".join([*lines, "", str(settings), "", str(environment()), ""])
    )
    labels = [" ".join(str(v) for v in r.values() if isinstance(v, str | int)) for r in good]
    figure = Figure((12, 1.5 + 0.35 * len(good)), layout="constrained")
    for axes, column in zip(
        figure.subplots(1, len(bars), sharey=True, squeeze=False)[0], bars, strict=True
    ):
        middle, low, high = np.reshape([list(r[column].values())[-3:] for r in good], (-1, 3)).T
        axes.barh(range(len(good)), middle, xerr=[middle - low, high - middle], tick_label=labels)
        axes.set_xlabel(column)
    axes.invert_yaxis()
    figure.savefig(a.out / f"{name}.png", dpi=120)
    return lines


def environment() -> dict[str, Any]:
    """Cores this process may use, memory in GB, load, versions, device, processor and commit."""
    import torch

    from fap.versions import versions
    from pipelines.machine import usable_cores

    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    machine = {
        "cores": usable_cores(),
        "memory_gb": round(gigabytes, 1),
        "load_average": os.getloadavg()[0],
    }
    return machine | {"torch_threads": torch.get_num_threads(), **versions()}


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write `{"environment": ..., **results}`; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n")
