"""Does Fast AdvProp cost what vanilla training costs? Whole runs under one budget, compared in one
process.

A whole run is seconds per step x steps under the budget (`fap.budget`) + an evaluation per epoch +
start-up (capture, compilation). Each schedule alternates with a vanilla step in short blocks, so
that both meet the same clock speed and the same neighbours; the ratio of medians has a bootstrap
interval over the blocks.

    python -m bench.cost_parity                                      # synthetic; ResNet-50 on a GPU, CIFAR size without
    python -m bench.cost_parity --data train.beton --pipeline ffcv   # with the loader
"""

import gc
import timeit
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pipelines
from bench.common import alternate, options, ratio, report, spread
from bench.step import AMPS, DEVICE, GPU, SCHEDULES, Contestant, config_of
from fap.budget import budget
from fap.evaluate.exact import evaluate
from fap.step.step import passes


def evaluation(c: Contestant) -> float:
    """Seconds per image of the evaluation, loading left out; the best of three."""
    data, batches = c.config.data, [c.sample] * 3
    run = partial(
        evaluate, c.model, batches, mean=data.mean, std=data.std, device=DEVICE, amp=c.step.amp
    )
    return min(timeit.repeat(run, number=1, repeat=3)) / (3 * len(c.sample.images))


def compare(
    a: Any, store: Any, amp: Any, model: str, rows: int, p_adv: str, schedule: str, bn: str
) -> dict[str, Any]:
    """One schedule against vanilla training with batch norm over groups of 64 (`groups`) or over
    the `whole` batch.
    """
    ours = config_of(model, rows, a.size, p_adv=p_adv, schedule=schedule)
    blocks = passes(
        schedule, rows, ours.loader_adv_rows, ours.loader_adv_rows, ours.method.group_rows
    )
    largest = max(sum(b.stop - b.start for b in p) for p in blocks)
    base_rows = max(64, round(largest / 64) * 64) if a.equal_rows else rows
    base = config_of(
        model, base_rows, a.size, name="vanilla", group_rows=64 if bn == "groups" else base_rows
    )
    pair = [Contestant(c, amp, store, a.pipeline) for c in (ours, base)]
    train, val = (
        (len(store), a.val_images)
        if store
        else (1_281_167, 50_000)
        if a.size > 64
        else (50_000, 10_000)
    )
    budgets = [budget(c.config, train) for c in pair]
    per_image = evaluation(pair[1])
    times = alternate([partial(c.block, a.block) for c in pair], a.rounds)
    result: dict[str, Any] = {"ideal": budgets[0].image_passes / budgets[1].image_passes}
    fixed, training = [], []
    for name, c, b, (seconds, waited) in zip(
        ("ours", "vanilla"), pair, budgets, times, strict=True
    ):
        if c.loader is not None:
            c.loader.close()
        median, evaluations = float(np.median(seconds)), per_image * val * b.epochs
        training.append(seconds * b.steps)
        fixed.append(evaluations + c.startup)
        whole = median * b.steps + fixed[-1]
        result[name] = {
            "rows": c.config.optim.clean_batch, "bn_group": c.config.method.group_rows, "how": c.how, "steps": b.steps,
            "s_per_step": spread(seconds), "whole_run_s": whole, "evaluation_share": evaluations / whole,
            "startup_s": c.startup, "waiting_share": float(np.median(waited / seconds)),
            "passes_per_s": b.image_passes_per_step / median, "tflop_per_s": c.flops / median / 1e12,
        }  # fmt: skip
    return result | {"whole_run": ratio(*training, fixed), "steps_only": ratio(*training)}


def row(r: dict[str, Any]) -> dict[str, Any]:
    """The cells of a result's line in the table."""
    ours, vanilla = r["ours"], r["vanilla"]
    return {k: r[k] for k in ("model", "rows", "p_adv", "amp", "schedule")} | {
        "vanilla rows / BN group": f"{vanilla['rows']} / {vanilla['bn_group']}", "s per step": ours["s_per_step"],
        "vanilla's": vanilla["s_per_step"], "whole run / vanilla's": r["whole_run"], "ideal": r["ideal"],
        "image passes/s": ours["passes_per_s"], "TFLOP/s": ours["tflop_per_s"], "waiting": ours["waiting_share"],
        "evaluation": ours["evaluation_share"],
    }  # fmt: skip


def main(argv: Any = None) -> int:
    p = options(
        __doc__, models=["resnet50" if GPU else "cifar_resnet8"], size=224 if GPU else 32, rows=[64, 256] if GPU else [256],
        p_adv=["1/5"], schedules=["fused", *SCHEDULES], equal_rows=not GPU, val_images=50_000,
        rounds=12 if GPU else 20,
    )  # fmt: skip
    p.add_argument("--amp", nargs="+", choices=AMPS, default=[AMPS[0]])
    p.add_argument(
        "--vanilla-bn",
        nargs="+",
        choices=["groups", "whole"],
        default=["groups", "whole"][: 2 - GPU],
    )
    source = p.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, help=".beton file or image folder")
    source.add_argument(
        "--synthetic", action="store_true", help="no loader (the default without --data)"
    )
    p.add_argument("--pipeline", choices=["ffcv", "dali", "reference"], default="ffcv")
    p.add_argument(
        "--block", type=int, help="steps per block; default 20 with --data, 5 on a GPU, 1 on a CPU"
    )
    p.add_argument(
        "--max-ratio", type=float, help="exit 1 if a whole-run ratio is above it or not measured"
    )
    a = p.parse_args(argv)
    a.block = a.block or (20 if a.data else 5 if GPU else 1)
    store = pipelines.open_store(a.data) if a.data else None
    a.train_images = len(store) if store else "synthetic"
    results: list[dict[str, Any]] = []
    for cell in product(a.amp, a.models, a.rows, a.p_adv, a.schedules, a.vanilla_bn):
        r = dict(zip(("amp", "model", "rows", "p_adv", "schedule", "bn"), cell, strict=True))
        try:
            r |= compare(a, store, *cell)
        except (
            Exception
        ) as e:  # out of GPU memory, a failed capture, Triton's errors, which are no RuntimeError
            r["error"] = f"{type(e).__name__}: {e}".splitlines()[0]
        gc.collect()
        torch.cuda.empty_cache()
        results.append(r)
        # after every cell: a time-out loses nothing
        lines = report(f"cost_parity_{DEVICE.type}", a, results, ["whole run / vanilla's"], row)
        print(*(lines if len(results) == 1 else lines[-1:]), sep="\n", flush=True)
    missed = [
        r
        for r in results
        if a.max_ratio and not r.get("whole_run", {"ratio": np.inf})["ratio"] <= a.max_ratio
    ]
    print(
        f"gate: {len(missed)} of {len(results)} above {a.max_ratio}"
        if a.max_ratio
        else "no gate (--max-ratio)"
    )
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
