"""Where does the time of one step go? Its kernels by total time, from a trace of one replay.

    python -m bench.gpu.profile --method fused --rows 256

Writes OUT/profile.json, with every kernel, and OUT/profile.txt, with the longest ones.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from bench.common import options, write_json
from bench.contestants import AMPS, GPU, MODEL, SIZE, Contestant, config_of, method_of, sync

SHOWN = 25  # kernels in the table
SMALL_US = 4.0  # a kernel shorter than this is mostly its launch
LONGEST_NAME = 200  # characters; in the table fewer
SHOWN_NAME = 150


def kernels_of(contestant: Contestant) -> tuple[Counter[str], Counter[str]]:
    """Microseconds and number of calls per kernel (on a CPU: per operator) of one step."""
    activity = ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as trace:
        contestant.train(contestant.sample)
        sync()
    total_us: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in trace.events():
        if not GPU:
            microseconds = event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            microseconds = event.device_time
        else:
            continue  # the host's part of a launch
        total_us[event.name] += microseconds
        calls[event.name] += 1
    return total_us, calls


def profiled(contestant: Contestant, steps: int) -> dict[str, Any]:
    """Seconds of a step, and what its kernels add to that."""
    contestant.block(steps)  # the first ones are slower
    seconds, _ = contestant.block(steps)
    total_us, calls = kernels_of(contestant)
    busy_us = sum(total_us.values())
    kernels = []
    for name, microseconds in total_us.most_common():
        kernels.append(
            {
                "name": name[:LONGEST_NAME],
                "ms": microseconds / 1e3,
                "share": microseconds / busy_us if busy_us else math.nan,
                "calls": calls[name],
            }
        )
    small = [name for name in total_us if total_us[name] / calls[name] < SMALL_US]
    return {
        "how": contestant.how,
        "ms_per_step": 1e3 * seconds,
        "ms_in_kernels": busy_us / 1e3,
        "launches": sum(calls.values()),
        "tflop_per_s": contestant.flops / seconds / 1e12,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if GPU else None,
        "small_kernels_ms": sum(total_us[name] for name in small) / 1e3,
        "small_kernels_launches": sum(calls[name] for name in small),
        "kernels": kernels,
    }


def in_words(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['method']}, {found['rows']} rows, AMP {found['amp']}, {found['how']}: "
        f"{found['ms_per_step']:.2f} ms per step, {found['ms_in_kernels']:.2f} ms "
        f"in {found['launches']} kernels, {found['tflop_per_s']:.0f} TFLOP/s",
        f"kernels under {SMALL_US:.0f} us on average: {found['small_kernels_ms']:.2f} ms, "
        f"{found['small_kernels_launches']} launches",
    ]
    for kernel in found["kernels"][:SHOWN]:
        lines.append(
            f"{kernel['ms']:9.3f} ms {kernel['share']:6.1%} {kernel['calls']:5d} x  "
            f"{kernel['name'][:SHOWN_NAME]}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = options(__doc__, model=MODEL, size=SIZE, rows=256 if GPU else 64, steps=10)
    methods = ("vanilla", "fused", "pipelined", "sequential", "parallel")
    parser.add_argument("--method", choices=methods, default="fused")
    parser.add_argument("--amp", choices=AMPS, default=AMPS[0])
    a = parser.parse_args(argv)
    contestant = Contestant(config_of(a.model, a.rows, a.size, **method_of(a.method)), a.amp)
    result = {"method": a.method, "rows": a.rows, "amp": a.amp} | profiled(contestant, a.steps)
    lines = in_words(result)
    write_json(a.out / "profile.json", {"results": [result]})
    (a.out / "profile.txt").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
