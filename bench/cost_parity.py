"""Does Fast AdvProp cost what vanilla training costs? Whole runs under one budget, compared in one process.

A whole run is seconds per step x steps under the budget (`fap.budget`) + an evaluation per epoch + start-up
(capture, compilation). Each schedule alternates with a vanilla step in short blocks, so that both meet the same
clock speed and the same neighbours; the ratio of medians has a bootstrap interval over the blocks.

    python -m bench.cost_parity                                      # synthetic; ResNet-50 on a GPU, CIFAR size without
    python -m bench.cost_parity --data train.beton --pipeline ffcv   # with the loader
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pipelines
from bench.common import environment, spread, write_json
from bench.step import GPU, Contestant, alternate, config_of, ratio
from fap.budget import budget
from fap.evaluate import evaluate
from fap.step import passes


# fmt: off
def evaluation(c: Contestant) -> float:
    """Seconds per image of the evaluation, loading left out; the best of three."""
    seconds, data = [], c.config.data
    for _ in range(3):
        began, batches = time.perf_counter(), [c.sample] * 3
        found = evaluate(c.model, batches, mean=data.mean, std=data.std, device=c.step.device, amp=c.step.amp)
        seconds.append((time.perf_counter() - began) / found.count)
    return min(seconds)


def compare(a: Any, store: pipelines.Store | None, model: str, rows: int, p_adv: str, amp: str, schedule: str, bn: str) -> Any:
    """One schedule against vanilla training with batch norm over groups of 64 (`groups`) or over the `whole` batch."""
    ours = config_of(a, model, rows, name="fast_advprop", p_adv=p_adv, schedule=schedule)
    blocks = passes(schedule, rows, ours.loader_adv_rows, ours.loader_adv_rows, ours.method.group)
    largest = max(sum(b.stop - b.start for b in p) for p in blocks)
    base_rows = max(64, round(largest / 64) * 64) if a.equal_rows else rows
    base = config_of(a, model, base_rows, name="vanilla", group=64 if bn == "groups" else base_rows)
    pair = [Contestant(c, amp, a, store) for c in (ours, base)]
    train, val = (len(store), a.val_images) if store else (1_281_167, 50_000) if a.size > 64 else (50_000, 10_000)
    budgets = [budget(c.config, train) for c in pair]
    evaluations = [evaluation(pair[1]) * val * b.epochs for b in budgets]
    times = alternate(pair, a.rounds, a.block)
    result: dict[str, Any] = {"ideal": budgets[0].image_passes / budgets[1].image_passes}
    for name, c, b, e, (seconds, waited) in zip(("ours", "vanilla"), pair, budgets, evaluations, times, strict=True):
        if c.loader is not None:
            c.loader.close()
        median = float(np.median(seconds))
        whole = median * b.steps + e + c.startup
        result[name] = {
            "rows": c.config.optim.clean_batch, "bn_group": c.config.method.group, "how": c.how, "steps": b.steps,
            "s_per_step": spread(seconds), "whole_run_s": whole, "evaluation_share": e / whole, "startup_s": c.startup,
            "waiting_share": float(np.median(waited / seconds)), "passes_per_s": b.image_passes_per_step / median,
            "tflop_per_s": c.flops / median / 1e12,
        }
    ours_s, base_s = (seconds * b.steps for seconds, b in zip(times[:, 0], budgets, strict=True))
    fixed = [e + c.startup for e, c in zip(evaluations, pair, strict=True)]
    return result | {"whole_run": ratio(ours_s, base_s, fixed), "steps_only": ratio(ours_s, base_s)}


HEAD = ("model", "clean rows", "p_adv", "AMP", "schedule", "vanilla rows / BN group", "ms per step (min-max)", "vanilla's",
        "whole run: ratio [95%]", "ideal", "image passes/s", "TFLOP/s", "waiting", "evaluation")


def row(r: dict[str, Any]) -> str:
    cells = [r[k] for k in ("model", "rows", "p_adv", "amp", "schedule")]
    if "error" in r:
        return "| " + " | ".join(map(str, [*cells, f"not measured: {r['error']}", *[""] * 8])) + " |"
    f, v, w = r["ours"], r["vanilla"], r["whole_run"]
    ms = ["{:.1f} ({:.1f}-{:.1f})".format(*(1e3 * x["s_per_step"][k] for k in ("median", "min", "max"))) for x in (f, v)]
    cells += [f"{v['rows']} / {v['bn_group']}", *ms, f"**{w['ratio']:.3f}** [{w['low']:.3f}, {w['high']:.3f}]",
              f"{r['ideal']:.3f}", f"{f['passes_per_s']:.0f}", f"{f['tflop_per_s']:.3g}", f"{f['waiting_share']:.1%}",
              f"{f['evaluation_share']:.1%}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    good = [r for r in results if "error" not in r]
    figure = Figure((9, 1.2 + 0.4 * len(good)), layout="constrained")
    axes = figure.add_subplot(xlabel="whole run, Fast AdvProp / vanilla (bar: 95% interval; tick: the formula's ideal)")
    for y, w in enumerate(r["whole_run"] for r in good):
        axes.plot([w["low"], w["ratio"], w["high"]], [y] * 3, "C0.-")
        axes.plot(good[y]["ideal"], y, "k|", ms=12)
    axes.axvline(1, color="grey", lw=0.8)
    axes.set_yticks(range(len(good)), [" ".join(str(v) for v in list(r.values())[:6]) for r in good])
    figure.savefig(path, dpi=120)


def arguments(argv: Sequence[str] | None) -> Any:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["resnet50" if GPU else "cifar_resnet8"])
    p.add_argument("--size", type=int, default=224 if GPU else 32, help="pixels; up to 64: CIFAR-10's counts")
    p.add_argument("--rows", nargs="+", type=int, default=[64, 256] if GPU else [256], help="clean rows per step")
    p.add_argument("--p-adv", nargs="+", default=["1/5"])
    p.add_argument("--schedules", nargs="+", default=["sequential", "fused", "pipelined"])
    p.add_argument("--amp", nargs="+", choices=["off", "fp16", "bf16"], default=["fp16" if GPU else "off"])
    p.add_argument("--vanilla-bn", nargs="+", choices=["groups", "whole"], default=["groups", "whole"][:2 - GPU])
    p.add_argument("--equal-rows", action=argparse.BooleanOptionalAction, default=not GPU,
                   help="vanilla steps as large as our largest pass, not as our clean rows")
    p.add_argument("--data", help=".beton file or image folder")
    p.add_argument("--synthetic", action="store_true", help="no loader (the default without --data)")
    p.add_argument("--pipeline", choices=["ffcv", "dali", "reference"], default="ffcv")
    p.add_argument("--val-images", type=int, default=50_000, help="with --data: images of one evaluation")
    p.add_argument("--graph", choices=["auto", "on", "off"], default="auto")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--rounds", type=int, default=12 if GPU else 20, help="blocks per contestant")
    p.add_argument("--block", type=int, help="steps per block; default 20 with --data, 5 on a GPU, 1 on a CPU")
    p.add_argument("--max-ratio", type=float, help="exit 1 if a whole-run ratio is above it or not measured")
    p.add_argument("--out", type=Path, default=Path("bench/results"))
    a = p.parse_args(argv)
    if a.data and a.synthetic:
        p.error("--data and --synthetic exclude each other")
    a.device, a.block = torch.device("cuda" if GPU else "cpu"), a.block or (20 if a.data else 5 if GPU else 1)
    return a


def main(argv: Sequence[str] | None = None) -> int:
    a = arguments(argv)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    store = pipelines.open_store(a.data) if a.data else None
    data = f"{a.pipeline}, {len(store)} images" if store else "synthetic"
    meta = {"data": data, "rounds": a.rounds, "block": a.block, "size": a.size, "equal_rows": a.equal_rows}
    meta |= {"torch_threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
    results: list[dict[str, Any]] = []
    path, head = a.out / f"cost_parity_{a.device.type}", "| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|\n"
    for cell in product(a.models, a.rows, a.p_adv, a.amp, a.schedules, a.vanilla_bn):
        r = dict(zip(("model", "rows", "p_adv", "amp", "schedule", "bn"), cell, strict=True))
        try:
            r |= compare(a, store, *cell)
        except torch.cuda.OutOfMemoryError:
            r["error"] = "out of GPU memory"
        gc.collect()
        torch.cuda.empty_cache()
        results.append(r)
        print(("" if len(results) > 1 else head) + row(r), flush=True)
        text = f"# Cost parity\n\n{meta}\n\n{environment()}\n\n{head}" + "\n".join(map(row, results)) + "\n"
        write_json(path.with_suffix(".json"), meta | {"results": results})  # after every cell: a time-out loses nothing
        path.with_suffix(".md").write_text(text)
    plot(results, path.with_suffix(".png"))
    missed = [r for r in results if a.max_ratio and not r.get("whole_run", {"ratio": np.inf})["ratio"] <= a.max_ratio]
    print(f"gate: {len(missed)} of {len(results)} above {a.max_ratio}" if a.max_ratio else "no gate (--max-ratio)")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
