"""What did the suite find? Each target and its figure, throughput beside MLPerf's, all the rest.

    python -m bench.gpu.table bench/results/gpu/suite.json

Prints Markdown; the suite itself writes it to table.md.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.common import interval

# ResNet-50 training per GPU: MLPerf Training v4.0, closed division, 8 GPUs (MXNet, fused
# convolution + batch norm + ReLU).
MLPERF_IMAGES_PER_S = {"H200": 7950, "H100": 7160}
# RetinaNet training per H100: MLPerf Training, about. Another backbone than ours, ResNeXt-50, and
# canvases of 800 x 800.
MLPERF_RETINANET_IMAGES_PER_S = 290

Found = dict[str, dict[str, Any]]  # by cell
Interval = tuple[float, float, float]  # figure, low, high


# ------------------------------------------------------------------ figures of a cell


def single(found: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The one result of a cell that ran one of the benches."""
    (content,) = [part for name, part in found.items() if name.startswith(prefix)]
    (result,) = content["results"]
    return dict(result)


def parity(found: dict[str, Any]) -> dict[str, Any]:
    return single(found, "cost_parity_")


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


# ------------------------------------------------------------------ targets


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
        if self.at_least and middle < self.bound:
            return "missed"
        if not self.at_least and middle > self.bound:
            return "missed"
        return "met"


def _cost_target(schedule: str, rows: int, bound: float) -> Target:
    return Target(
        what=f"`{schedule}` / vanilla, whole run, {rows} rows",
        bound=bound,
        at_least=False,
        cells=(f"parity/fp16/{rows}/{schedule}/groups",),
        figure=whole_run,
    )


def _detection_target(canvas: str) -> Target:
    return Target(
        what=f"`fused` / vanilla, whole run, RetinaNet at {canvas}, 16 rows",
        bound=1.05,
        at_least=False,
        cells=(f"detection/{canvas}",),
        figure=whole_run,
    )


TARGETS = (
    _cost_target("fused", 256, 1.02),
    _cost_target("fused", 64, 1.10),
    _cost_target("pipelined", 256, 1.00),
    _cost_target("pipelined", 64, 1.00),
    Target(
        what="vanilla against the best eager peer, 256 rows",
        bound=1.2,
        at_least=True,
        cells=("step/256/timm-like: AMP", "step/256/torchvision reference"),
        figure=against_peer,
    ),
    Target(
        what="vanilla against the best compiled peer, 256 rows",
        bound=1.0,
        at_least=True,
        cells=("step/256/timm-like, compiled",),
        figure=against_peer,
    ),
    Target(
        what="norm kernel / bandwidth of a copy",
        bound=0.85,
        at_least=True,
        cells=("kernels",),
        figure=norm_share,
    ),
    _detection_target("640"),
    _detection_target("800x1344"),
)


# ------------------------------------------------------------------ the tables


def table(suite: dict[str, Any]) -> str:
    """Markdown of a whole suite.json; what is missing says why."""
    environment = suite["environment"]
    measured: Found = {}
    why: dict[str, str] = {}  # by cell that was not measured
    for record in suite["cells"]:
        if record["state"] != "measured":
            why[record["cell"]] = record["why"]
        elif "found" in record:
            measured[record["cell"]] = record["found"]
    for cell in suite["not_reached"]:
        why[cell] = "not reached"

    device = environment["device"]
    anchor = _anchor(device)
    lines = [f"# {device}, torch {environment['torch']}, commit {environment['commit']}", ""]
    if suite["dry_run"]:
        lines += [
            "**A dry run at toy size on a CPU: it shows that every part runs. "
            "The figures mean nothing.**",
            "",
        ]
    lines += ["| target | bound | figure | verdict |", "|---|---|---|---|"]
    lines += [_target_line(target, measured, why) for target in TARGETS]
    lines += [
        "",
        f"| what | images/s | share of MLPerf's {anchor or '(no anchor for this device)'} |",
        "|---|--:|--:|",
        *_throughput(measured, anchor),
        "",
        *_detection(measured),
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
    ]
    lines += [f"- {cell}: {reason}" for cell, reason in why.items()]
    if not why:
        lines.append("- nothing: all cells were")
    return "\n".join(lines)


def _anchor(device: str) -> int | None:
    """MLPerf's images per second on such a GPU."""
    for name, images_per_s in MLPERF_IMAGES_PER_S.items():
        if name in device:
            return images_per_s
    return None


def _target_line(target: Target, measured: Found, why: dict[str, str]) -> str:
    sign = ">=" if target.at_least else "<="
    start = f"| {target.what} | {sign} {target.bound:.2f} |"
    figures = []
    for cell in target.cells:
        if cell not in measured:
            return f"{start} not measured | {why.get(cell, 'not among the chosen cells')} |"
        figures.append(target.figure(measured[cell]))
    worst = min(figures) if target.at_least else max(figures)
    return f"{start} {_shown(worst)} | {target.verdict(worst)} |"


def _shown(figure: Interval) -> str:
    middle, low, high = figure
    if low == high:
        return f"{middle:.3f}"
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


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
            if name in seen:
                continue
            seen.add(name)
            share = f"{rate / anchor:.0%}" if anchor else "-"
            yield f"| {name} | {rate:,.0f} | {share} |"


def _detection(measured: Found) -> Iterator[str]:
    """Images per second of a detector's vanilla training, loading left out."""
    cells = [cell for cell in measured if cell.startswith("detection/")]
    if not cells:
        return
    yield (
        f"| vanilla detection | images/s | share of MLPerf's {MLPERF_RETINANET_IMAGES_PER_S} per "
        "H100 (RetinaNet with ResNeXt-50, another backbone, at 800 x 800) |"
    )
    yield "|---|--:|--:|"
    for cell in cells:
        result = parity(measured[cell])
        rate = result["vanilla"]["passes_per_s"]
        what = f"{cell}: {result['model']}, {result['amp']}, {result['rows']} rows"
        yield f"| {what} | {rate:,.0f} | {rate / MLPERF_RETINANET_IMAGES_PER_S:.0%} |"
    yield ""


def _parities(measured: Found) -> Iterator[str]:
    for cell, found in measured.items():
        if not cell.startswith(("parity/", "loader/", "detection/")):
            continue
        result = parity(found)
        ours = result["ours"]
        vanilla = result["vanilla"]
        name = cell
        if cell.startswith("loader/"):
            name += f", waiting for data {ours['waiting_share']:.0%}"
            name += f" / {vanilla['waiting_share']:.0%}"
        our_ms = 1e3 * ours["s_per_step"]["median"]
        base_ms = 1e3 * vanilla["s_per_step"]["median"]
        figure = _shown(interval(result["whole_run"]))
        yield f"| {name} | {figure} | {our_ms:.2f} | {base_ms:.2f} |"


def _steps(measured: Found) -> Iterator[str]:
    for cell, found in measured.items():
        if cell.startswith("step/"):
            result = single(found, "step_")
            figure = _shown(against_peer(found))
            yield f"| {cell} ({result['ours']}) | {figure} | {result['our rows/s']:,.0f} |"


def _kernels(measured: Found) -> Iterator[str]:
    if "kernels" not in measured:
        return
    found = measured["kernels"]["kernels"]
    norm = found["norm"]
    copy = found["bandwidth"]["copy_gb_per_s"]["median"]
    yield (
        f"Copy on the device {copy:,.0f} GB/s; "
        f"all batch norms of a pass {norm['ours_ms']:.2f} ms, {norm['gb_per_s']:,.0f} GB/s; "
        f"cuDNN's with ReLU and add {norm['cudnn_ms']:.2f} ms ({norm['cudnn_over_ours']:.2f}x)."
    )
    yield ""


def _loaders(measured: Found) -> Iterator[str]:
    results = []
    for cell, found in measured.items():
        if cell.startswith("loaders/"):
            for part in found.values():
                results += part["results"]
    if not results:
        return
    yield "| loader | images/s | CPU-ms per image |"
    yield "|---|--:|--:|"
    for result in results:
        rate = result["images/s"]["median"]
        cpu_ms = result["CPU-ms per image"]["median"]
        yield f"| {result['loader']} | {rate:,.0f} | {cpu_ms:.2f} |"
    yield ""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.gpu.table SUITE.json")
    with open(sys.argv[1]) as file:
        print(table(json.load(file)))


if __name__ == "__main__":
    main()
