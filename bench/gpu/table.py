"""The suite's last table: each target and its figure, throughput beside MLPerf's, and all else that
was measured.

python -m bench.gpu.table bench/results/gpu/suite.json
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MLPERF_IMAGES_PER_S = {"H200": 7950, "H100": 7160}
"""ResNet-50 training per GPU: MLPerf Training v4.0, closed division, 8 GPUs (MXNet, fused
convolution + batch norm + ReLU).
"""

Found = dict[str, dict[str, Any]]  # by cell
Interval = tuple[float, float, float]  # figure, low, high


@dataclass(frozen=True)
class Target:
    """What the project promises of a GPU, and which cells say whether it holds."""

    what: str
    bound: float
    at_least: bool
    cells: tuple[str, ...]
    """The figure is the worst of these."""
    figure: Callable[[dict[str, Any]], Interval]

    def verdict(self, figure: Interval) -> str:
        middle, low, high = figure
        if low < self.bound < high:
            return "open: the interval includes the target"
        return (
            "met" if (middle >= self.bound if self.at_least else middle <= self.bound) else "missed"
        )


def whole_run(found: dict[str, Any]) -> Interval:
    """Fast AdvProp's whole run over vanilla's."""
    return interval(parity(found)["whole_run"])


def against_peer(found: dict[str, Any]) -> Interval:
    """A peer's seconds per step over ours."""
    return interval(single(found, "step_")["other / ours"])


def norm_share(found: dict[str, Any]) -> Interval:
    """Bytes that our norm must move per second, over the bandwidth of a copy."""
    share = found["kernels"]["norm"]["share_of_copy"]
    return share, share, share


TARGETS = (
    Target(
        "`fused` / vanilla, whole run, 256 rows",
        1.02,
        False,
        ("parity/fp16/256/fused/groups",),
        whole_run,
    ),
    Target(
        "`fused` / vanilla, whole run, 64 rows",
        1.10,
        False,
        ("parity/fp16/64/fused/groups",),
        whole_run,
    ),
    Target(
        "`pipelined` / vanilla, whole run, 256 rows",
        1.00,
        False,
        ("parity/fp16/256/pipelined/groups",),
        whole_run,
    ),
    Target(
        "`pipelined` / vanilla, whole run, 64 rows",
        1.00,
        False,
        ("parity/fp16/64/pipelined/groups",),
        whole_run,
    ),
    Target(
        "vanilla against the best eager peer, 256 rows",
        1.2,
        True,
        ("step/256/timm-like: AMP", "step/256/torchvision reference"),
        against_peer,
    ),
    Target(
        "vanilla against the best compiled peer, 256 rows",
        1.0,
        True,
        ("step/256/timm-like, compiled",),
        against_peer,
    ),
    Target("norm kernel / bandwidth of a copy", 0.85, True, ("kernels",), norm_share),
)


def interval(value: dict[str, float]) -> Interval:
    """Of a `bench.common.ratio` or `spread`."""
    middle, low, high = list(value.values())[-3:]
    return middle, low, high


def single(found: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The one result of a cell that ran one of the benches."""
    (content,) = (part for name, part in found.items() if name.startswith(prefix))
    (result,) = content["results"]
    return dict(result)


def parity(found: dict[str, Any]) -> dict[str, Any]:
    return single(found, "cost_parity_")


def table(suite: dict[str, Any]) -> str:
    """Markdown of a whole suite.json; what is missing says why."""
    environment = suite["environment"]
    measured: Found = {
        c["cell"]: c["found"] for c in suite["cells"] if c["state"] == "measured" and "found" in c
    }
    why = {c["cell"]: c["why"] for c in suite["cells"] if c["state"] != "measured"}
    why |= dict.fromkeys(suite["not_reached"], "not reached")
    device = environment["device"]
    lines = [
        f"# {device}, torch {environment['torch']}, commit {environment['commit']}",
        "",
        *(["**A dry run at toy size on a CPU: it shows that every part runs. The figures mean nothing.**", ""]
          if suite["dry_run"] else []),
        "| target | bound | figure | verdict |",
        "|---|---|---|---|",
        *(_target_line(t, measured, why) for t in TARGETS),
        "",
        f"| what | images/s | share of MLPerf's {_anchor(device) or '(no anchor for this device)'} |",
        "|---|--:|--:|",
        *_throughput(measured, _anchor(device)),
        "",
        "| whole run against vanilla | Fast AdvProp / vanilla | ms per step | vanilla's ms |",
        "|---|---|---|---|",
        *_parities(measured),
        "",
        "| step against | theirs / ours | our rows/s |",
        "|---|---|--:|",
        *_steps(measured),
        "",
        *_kernels(measured),
        *_loaders(measured),
        "Not measured:",
        "",
        *([f"- {cell}: {reason}" for cell, reason in why.items()] or ["- nothing: all cells were"]),
    ]  # fmt: skip
    return "\n".join(lines)


def _anchor(device: str) -> int | None:
    return next((value for name, value in MLPERF_IMAGES_PER_S.items() if name in device), None)


def _target_line(target: Target, measured: Found, why: dict[str, str]) -> str:
    missing = [c for c in target.cells if c not in measured]
    bound = f"{'>=' if target.at_least else '<='} {target.bound:.2f}"
    if missing:
        return (
            f"| {target.what} | {bound} | not measured |"
            f" {why.get(missing[0], 'not among the chosen cells')} |"
        )
    figures = [target.figure(measured[c]) for c in target.cells]
    worst = min(figures) if target.at_least else max(figures)
    return f"| {target.what} | {bound} | {_shown(worst)} | {target.verdict(worst)} |"


def _shown(figure: Interval) -> str:
    middle, low, high = figure
    return f"{middle:.3f}" if low == high else f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def _throughput(measured: Found, anchor: int | None) -> Iterator[str]:
    """Images forward and backward per second, loading left out; of vanilla once per batch size."""
    seen = set()
    for cell, found in measured.items():
        if not cell.startswith("parity/"):
            continue
        result = parity(found)
        what = f"{result['model']}, {result['amp']}, {result['rows']} rows"
        norm = "groups" if result["bn"] == "groups" else "the whole batch"
        rates = {
            f"vanilla, {what}, norm over {norm}": result["vanilla"]["passes_per_s"],
            f"`{result['schedule']}`, {what} (image passes)": result["ours"]["passes_per_s"],
        }
        for name, rate in rates.items():
            if name not in seen:
                seen.add(name)
                yield f"| {name} | {rate:,.0f} | {f'{rate / anchor:.0%}' if anchor else '-'} |"


def _parities(measured: Found) -> Iterator[str]:
    for cell, found in measured.items():
        if cell.startswith(("parity/", "loader/")):
            result = parity(found)
            ours, vanilla = result["ours"], result["vanilla"]
            waiting = (
                f", waiting for data {ours['waiting_share']:.0%} / {vanilla['waiting_share']:.0%}"
            )
            yield (
                f"| {cell}{waiting if cell.startswith('loader/') else ''} |"
                f" {_shown(interval(result['whole_run']))} |"
                f" {1e3 * ours['s_per_step']['median']:.2f} |"
                f" {1e3 * vanilla['s_per_step']['median']:.2f} |"
            )


def _steps(measured: Found) -> Iterator[str]:
    for cell, found in measured.items():
        if cell.startswith("step/"):
            result = single(found, "step_")
            yield (
                f"| {cell} ({result['ours']}) | {_shown(against_peer(found))} |"
                f" {result['our rows/s']:,.0f} |"
            )


def _kernels(measured: Found) -> Iterator[str]:
    if "kernels" not in measured:
        return
    found = measured["kernels"]["kernels"]
    norm = found["norm"]
    yield (
        f"Copy on the device {found['bandwidth']['copy_gb_per_s']['median']:,.0f} GB/s; all batch"
        f" norms of a pass {norm['ours_ms']:.2f} ms, {norm['gb_per_s']:,.0f} GB/s; cuDNN's with"
        f" ReLU and add {norm['cudnn_ms']:.2f} ms ({norm['cudnn_over_ours']:.2f}x)."
    )
    yield ""


def _loaders(measured: Found) -> Iterator[str]:
    rows = []
    for cell, found in measured.items():
        if cell.startswith("loaders/"):
            rows += [r for part in found.values() for r in part["results"]]
    if rows:
        yield "| loader | images/s | CPU-ms per image |"
        yield "|---|--:|--:|"
        for r in rows:
            yield (
                f"| {r['loader']} | {r['images/s']['median']:,.0f} |"
                f" {r['CPU-ms per image']['median']:.2f} |"
            )
        yield ""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.gpu.table SUITE.json")
    with open(sys.argv[1]) as file:
        print(table(json.load(file)))


if __name__ == "__main__":
    main()
