"""Does Fast AdvProp cost what vanilla training costs? Whole runs under one budget.

    python -m bench.cost_parity                                     # synthetic images
    python -m bench.cost_parity --data train.beton --pipeline ffcv  # with the loader
    python -m bench.cost_parity --models retinanet_tiny --size 128 --rows 32      # a detector

A whole run is seconds per step x steps under the budget (`fap.budget`) + an evaluation per epoch +
start-up (capture, compilation). Each schedule alternates with a vanilla step in short blocks in one
process, so that both meet the same clock speed and the same neighbours. The ratio of medians has a
bootstrap interval over the blocks. ResNet-50 on a GPU, CIFAR size without. Writes
bench/results/cost_parity_{cpu,cuda}.json, .md and .png; of detectors cost_parity_detection_*.

A detector's run is one over COCO, norm in groups of 8. Its evaluation is the forwards alone: COCO's
scoring runs on the CPU, takes both as long, and is left out.
"""

import argparse
import gc
import timeit
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import pipelines
from bench.common import alternate, options, ratio, report, settings_of, spread
from bench.contestants import (
    AMPS,
    DETECTOR_GROUP_ROWS,
    DEVICE,
    GPU,
    GROUP_ROWS,
    LARGEST_CIFAR_SIZE,
    MODEL,
    SCHEDULES,
    SIZE,
    Contestant,
    canvas,
    config_of,
    is_detector,
    largest_pass,
    sync,
)
from fap.budget import Budget, budget
from fap.config import Config
from fap.evaluate.exact import evaluate
from fap.tasks.base import Evaluator, Result
from pipelines.sizes import sides_of

# Images of the runs whose cost is computed without --data: to train on, to evaluate on.
IMAGENET_IMAGES = (1_281_167, 50_000)
CIFAR10_IMAGES = (50_000, 10_000)
COCO_IMAGES = (118_287, 5_000)
EVALUATION_BATCHES = 3
EVALUATION_REPEATS = 3


class Case(NamedTuple):
    """One schedule, and the vanilla training that it is compared with."""

    amp: str
    model: str
    rows: int  # clean ones
    p_adv: str
    schedule: str
    bn: str  # vanilla's batch norm: over `groups` of 64 (detectors: 8) or over the `whole` batch


def compare(case: Case, a: Any, store: pipelines.Store | None) -> dict[str, Any]:
    """Whole runs of one schedule and of vanilla training: seconds of the parts, and their ratio."""
    configs = configs_of(case, a)
    ours, vanilla = [Contestant(config, case.amp, store, a.pipeline) for config in configs]
    train_images, val_images = images_of(case.model, a, store)
    our_budget, base_budget = [budget(config, train_images) for config in configs]
    evaluation_s = evaluation(vanilla) * val_images  # the same network for both

    def block(contestant: Contestant) -> tuple[float, float]:
        return contestant.block(a.block)

    (our_seconds, our_waits), (base_seconds, base_waits) = alternate(
        block, [ours, vanilla], a.rounds
    )
    ours.close()
    vanilla.close()
    our_fixed = evaluation_s * our_budget.epochs + ours.startup
    base_fixed = evaluation_s * base_budget.epochs + vanilla.startup
    our_training = our_seconds * our_budget.steps
    base_training = base_seconds * base_budget.steps
    return {
        "ideal": our_budget.image_passes / base_budget.image_passes,
        "ours": whole_run(ours, our_budget, our_seconds, our_waits, evaluation_s),
        "vanilla": whole_run(vanilla, base_budget, base_seconds, base_waits, evaluation_s),
        "whole_run": ratio(our_training, base_training, (our_fixed, base_fixed)),
        "steps_only": ratio(our_training, base_training),
    }


def configs_of(case: Case, a: Any) -> tuple[Config, Config]:
    """Of Fast AdvProp and of the vanilla training beside it."""
    ours = config_of(case.model, case.rows, a.size, p_adv=case.p_adv, schedule=case.schedule)
    rows = case.rows
    group_rows = DETECTOR_GROUP_ROWS if is_detector(case.model) else GROUP_ROWS
    if a.equal_rows:
        # The nearest whole groups: a CPU's time per row grows with the pass.
        rows = max(group_rows, round(largest_pass(ours) / group_rows) * group_rows)
    if case.bn == "whole":
        group_rows = rows
    vanilla = config_of(case.model, rows, a.size, name="vanilla", group_rows=group_rows)
    return ours, vanilla


def images_of(model: str, a: Any, store: pipelines.Store | None) -> tuple[int, int]:
    """Training and validation images of the run whose cost is computed."""
    if store is not None:
        return len(store), a.val_images
    if is_detector(model):
        return COCO_IMAGES
    if max(sides_of(a.size)) > LARGEST_CIFAR_SIZE:
        return IMAGENET_IMAGES
    return CIFAR10_IMAGES


class Forwards:
    """An `Evaluator` of no metrics: only the forwards are waited for."""

    def update(self, outputs: torch.Tensor, references: torch.Tensor) -> None:
        """Nothing is gathered."""

    def result(self) -> Result:
        sync()
        return {}


def evaluation(contestant: Contestant) -> float:
    """Seconds per image of the evaluation, loading left out; the best of three.

    A detector's scoring on the CPU is left out too.
    """
    data = contestant.config.data
    step = contestant.step

    def evaluator() -> Evaluator:
        if is_detector(contestant.config.model.name):
            return Forwards()
        return step.task.evaluator(DEVICE)

    batches = [(contestant.sample.images, contestant.targets[0])] * EVALUATION_BATCHES

    def run() -> None:
        evaluate(
            contestant.model,
            batches,
            evaluator(),
            mean=data.mean,
            std=data.std,
            device=DEVICE,
            amp=step.network.amp,
        )

    seconds = min(timeit.repeat(run, number=1, repeat=EVALUATION_REPEATS))
    return seconds / sum(len(images) for images, _ in batches)


def whole_run(
    contestant: Contestant,
    planned: Budget,
    seconds: np.ndarray,  # (rounds,), per step
    waited: np.ndarray,  # (rounds,): those of them spent waiting for data
    evaluation_s: float,  # of one evaluation
) -> dict[str, Any]:
    """What a whole run takes, by parts."""
    per_step = float(np.median(seconds))
    evaluations_s = evaluation_s * planned.epochs
    whole_s = per_step * planned.steps + evaluations_s + contestant.startup
    return {
        "rows": contestant.config.optim.clean_batch,
        "bn_group": contestant.config.method.group_rows,
        "how": contestant.how,
        "steps": planned.steps,
        "s_per_step": spread(seconds),
        "whole_run_s": whole_s,
        "evaluation_share": evaluations_s / whole_s,
        "startup_s": contestant.startup,
        "waiting_share": float(np.median(waited / seconds)),
        "passes_per_s": planned.image_passes_per_step / per_step,
        "tflop_per_s": contestant.flops / per_step / 1e12,
    }


def row(result: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    ours = result["ours"]
    vanilla = result["vanilla"]
    case = {k: result[k] for k in ("model", "rows", "p_adv", "amp", "schedule")}
    return case | {
        "vanilla rows / BN group": f"{vanilla['rows']} / {vanilla['bn_group']}",
        "s per step": ours["s_per_step"],
        "vanilla's": vanilla["s_per_step"],
        "whole run / vanilla's": result["whole_run"],
        "ideal": result["ideal"],
        "image passes/s": ours["passes_per_s"],
        "TFLOP/s": ours["tflop_per_s"],
        "waiting": ours["waiting_share"],
        "evaluation": ours["evaluation_share"],
    }


# ------------------------------------------------------------------ the command


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    rows = [256]
    rounds = 20
    norms = ["groups", "whole"]
    if GPU:
        rows = [64, 256]
        rounds = 12
        norms = ["groups"]
    parser = options(
        __doc__,
        models=[MODEL],
        rows=rows,
        p_adv=["1/5"],
        schedules=["fused", *SCHEDULES],
        equal_rows=not GPU,
        val_images=50_000,
        rounds=rounds,
    )
    parser.add_argument(
        "--size", type=canvas, default=SIZE, metavar="N|HxW", help="default: %(default)s"
    )
    parser.add_argument("--amp", nargs="+", choices=AMPS, default=[AMPS[0]])
    parser.add_argument("--vanilla-bn", nargs="+", choices=["groups", "whole"], default=norms)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, help=".beton file or image folder")
    source.add_argument(
        "--synthetic", action="store_true", help="no loader (the default without --data)"
    )
    parser.add_argument("--pipeline", choices=tuple(pipelines.BACK_ENDS), default="ffcv")
    parser.add_argument(
        "--block", type=int, help="steps per block; default 20 with --data, 5 on a GPU, 1 on a CPU"
    )
    parser.add_argument(
        "--max-ratio", type=float, help="exit 1 if a whole-run ratio is above it or not measured"
    )
    a = parser.parse_args(argv)
    if len({is_detector(model) for model in a.models}) > 1:
        parser.error("--models: detectors and other models share no run; measure them apart")
    if not a.block:
        a.block = steps_per_block(with_loader=bool(a.data))
    return a


def steps_per_block(with_loader: bool) -> int:
    if with_loader:
        return 20
    return 5 if GPU else 1


def main(argv: Sequence[str] | None = None) -> int:
    a = parsed(argv)
    store = pipelines.open_store(a.data) if a.data else None
    kind = "detection_" if is_detector(a.models[0]) else ""
    file = a.out / f"cost_parity_{kind}{DEVICE.type}"
    settings = settings_of(a, train_images=len(store) if store else "synthetic")
    results: list[dict[str, Any]] = []
    for values in product(a.amp, a.models, a.rows, a.p_adv, a.schedules, a.vanilla_bn):
        case = Case(*values)
        result: dict[str, Any] = case._asdict()
        try:
            result |= compare(case, a, store)
        # Out of GPU memory, a failed capture, Triton's errors, which are no RuntimeError: it costs
        # this line.
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        gc.collect()
        torch.cuda.empty_cache()
        results.append(result)
        # Written after every case: a time-out loses nothing. Said: the head once, then one line.
        lines = report(file, settings, results, ["whole run / vanilla's"], row)
        if len(results) > 1:
            lines = lines[-1:]
        print(*lines, sep="\n", flush=True)
    return gate(results, a.max_ratio)


def gate(results: list[dict[str, Any]], max_ratio: float | None) -> int:
    """The exit status: 1 if a ratio is above `max_ratio`, or was not measured."""
    if not max_ratio:
        print("no gate (--max-ratio)")
        return 0
    missed = 0
    for result in results:
        if "whole_run" not in result or not result["whole_run"]["ratio"] <= max_ratio:
            missed += 1
    print(f"gate: {missed} of {len(results)} above {max_ratio}")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
