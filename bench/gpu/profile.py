"""Where the time of one step goes: its kernels by total time, from a trace of one replay.

python -m bench.gpu.profile --method fused --rows 256
"""

import math
from collections import Counter
from typing import Any

import torch

from bench.common import options, write_json
from bench.step import AMPS, GPU, Contestant, config_of

SHOWN = 25  # kernels in the table
SMALL_US = 4.0  # a kernel shorter than this is mostly its launch


def kernels_of(contestant: Contestant) -> tuple[Counter[str], Counter[str]]:
    """Microseconds and number of calls per kernel (on a CPU: per operator) of one step."""
    activity = torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as trace:
        contestant.train(contestant.sample)
        if GPU:
            torch.cuda.synchronize()
    total: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in trace.events():
        if GPU and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        total[event.name] += event.device_time if GPU else event.self_cpu_time_total
        count[event.name] += 1
    return total, count


def main(argv: Any = None) -> int:
    parser = options(
        __doc__,
        model="resnet50" if GPU else "cifar_resnet8",
        size=224 if GPU else 32,
        rows=256 if GPU else 64,
        steps=10,
    )
    parser.add_argument(
        "--method",
        choices=("vanilla", "fused", "pipelined", "sequential", "parallel"),
        default="fused",
    )
    parser.add_argument("--amp", choices=AMPS, default=AMPS[0])
    a = parser.parse_args(argv)
    method = {"name": "vanilla"} if a.method == "vanilla" else {"schedule": a.method}
    contestant = Contestant(config_of(a.model, a.rows, a.size, **method), a.amp)
    contestant.block(a.steps)  # the first ones are slower
    seconds = contestant.block(a.steps)[0]
    total, count = kernels_of(contestant)
    busy = sum(total.values())
    small = [name for name in total if total[name] / count[name] < SMALL_US]
    result = {
        "method": a.method,
        "rows": a.rows,
        "amp": a.amp,
        "how": contestant.how,
        "ms_per_step": 1e3 * seconds,
        "ms_in_kernels": busy / 1e3,
        "launches": sum(count.values()),
        "tflop_per_s": contestant.flops / seconds / 1e12,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if GPU else None,
        "small_kernels_ms": sum(total[name] for name in small) / 1e3,
        "small_kernels_launches": sum(count[name] for name in small),
        "kernels": [
            {
                "name": name[:200],
                "ms": us / 1e3,
                "share": us / busy if busy else math.nan,
                "calls": count[name],
            }
            for name, us in total.most_common()
        ],
    }
    lines = [
        (
            f"{a.method}, {a.rows} rows, AMP {a.amp}, {contestant.how}: {result['ms_per_step']:.2f}"
            f" ms per step, {result['ms_in_kernels']:.2f} ms in {result['launches']} kernels,"
            f" {result['tflop_per_s']:.0f} TFLOP/s"
        ),
        (
            f"kernels under {SMALL_US:.0f} us on average: {result['small_kernels_ms']:.2f} ms, "
            f"{result['small_kernels_launches']} launches"
        ),
    ]
    lines += [
        f"{k['ms']:9.3f} ms {k['share']:6.1%} {k['calls']:5d} x  {k['name'][:150]}"
        for k in result["kernels"][:SHOWN]
    ]
    write_json(a.out / "profile.json", {"results": [result]})
    (a.out / "profile.txt").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
