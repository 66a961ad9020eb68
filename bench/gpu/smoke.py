"""First contact: does a schedule's step capture, is its loss finite, and what does it cost?

    python -m bench.gpu.smoke --schedule fused

Small and quick: five blocks of a few steps. Exit status 1 where too many steps are skipped, a loss
is not finite, or a GPU runs the step without a CUDA graph or without the norm kernel. Writes
OUT/smoke.json: faults, seconds per step, start-up, loss, memory.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench.common import options, spread, write_json
from bench.contestants import (
    AMPS,
    DEVICE,
    GPU,
    MODEL,
    SIZE,
    Contestant,
    canvas,
    config_of,
    method_of,
)
from fap.distributed import ONE_RANK
from pipelines.sizes import Size

SCHEDULES = ("vanilla", "fused", "pipelined", "sequential", "parallel")
BLOCKS = 5
MOST_SKIPPED = 5  # the first steps in float16 may halve the loss scale


def look(schedule: str, model: str, size: Size, rows: int, amp: str, steps: int) -> dict[str, Any]:
    """Train a few blocks of steps on one batch of random images."""
    contestant = Contestant(config_of(model, rows, size, **method_of(schedule)), amp)
    seconds = [contestant.block(steps)[0] for _ in range(BLOCKS)]
    metrics = contestant.step.metrics.take(ONE_RANK)
    return {
        "schedule": schedule,
        "rows": rows,
        "amp": amp,
        "how": contestant.how,
        "s_per_step": spread(seconds),
        "startup_s": contestant.startup,
        "loss_clean": metrics["loss_clean"] / max(1, metrics["rows_clean"]),
        "steps": metrics["steps"],
        "skipped": metrics["skipped"],
        "loss_scale": contestant.step.update.scale.item(),
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if GPU else None,
    }


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong with a schedule's figures, in words."""
    wrong = []
    if not math.isfinite(found["loss_clean"]):
        wrong.append(f"the loss of the clean rows is {found['loss_clean']}")
    if found["skipped"] > MOST_SKIPPED:
        wrong.append(
            f"{found['skipped']:.0f} of {found['steps']:.0f} steps were not finite and were skipped"
        )
    if GPU and found["how"] != "CUDA graph":
        wrong.append(
            f"the step ran as '{found['how']}', not as one CUDA graph with the norm kernel"
        )
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__, model=MODEL, rows=64, steps=5)
    parser.add_argument(
        "--size", type=canvas, default=SIZE, metavar="N|HxW", help="default: %(default)s"
    )
    parser.add_argument("--schedule", choices=SCHEDULES, default="fused")
    parser.add_argument("--amp", choices=AMPS, default=AMPS[0])
    a = parser.parse_args(argv)
    found = look(a.schedule, a.model, a.size, a.rows, a.amp, a.steps)
    wrong = faults(found)
    write_json(a.out / "smoke.json", {"results": [found | {"faults": wrong}]})
    step_ms = 1e3 * found["s_per_step"]["median"]
    print(
        f"{a.schedule}, {a.rows} rows on {DEVICE}: {found['how']}, {step_ms:.2f} ms per step, "
        f"start-up {found['startup_s']:.1f} s, loss {found['loss_clean']:.3f}, "
        f"{found['skipped']:.0f} skipped, loss scale {found['loss_scale']:.0f}, "
        f"{found['memory_gb'] or 0:.1f} GB"
    )
    for sentence in wrong:
        print(f"WRONG: {sentence}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
