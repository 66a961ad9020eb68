"""How fast is our step beside other people's, and what is each of its ingredients worth?

    python -m bench.step [--rows N] [--amp bf16] [--no-compile] [--only WORD ...]

Every contender alternates in short blocks with our own step on images of the same shape. The ratio
is its seconds per step over ours, with a 95% bootstrap interval: above 1 the other one is slower.
Without a GPU: CIFAR size, no CUDA graph, no AMP unless asked for. Writes
bench/results/step_{cpu,cuda}.json, .md and .png.
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.common import alternate, options, ratio, report, settings_of, spread
from bench.contestants import (
    AMPS,
    DEVICE,
    GPU,
    MODEL,
    SCHEDULES,
    SIZE,
    Contestant,
    config_of,
    method_of,
)
from bench.peers import Peer
from fap.config import Config

INGREDIENTS = ("channels_last", "stem function", "half-precision copy", "norm kernel", "graph")
ON_A_GPU_ONLY = ("norm kernel", "graph")  # the kernel also needs channels_last


@dataclass(frozen=True)
class Contender:
    """Somebody who alternates with our own step."""

    ours: Config  # of our step
    name: str
    make: Callable[[], Contestant | Peer]


def contenders(a: Any) -> list[Contender]:
    """All that this machine and these options allow.

    First the targets; then what compiles for a minute each. A time limit may cut off the rest.
    """
    vanilla = config_of(a.model, a.rows, a.size, name="vanilla")
    fused = config_of(a.model, a.rows, a.size, schedule="fused")

    def peer(name: str, ours: Config, amp: str, **how: Any) -> Contender:
        def make() -> Peer:
            return Peer(ours, amp, **how)

        return Contender(ours, name, make)

    def variant(
        name: str, ours: Config, *, other: Config | None = None, amp: str = a.amp, **how: Any
    ) -> Contender:
        """Ours in another form; `other` is its config where that differs."""

        def make() -> Contestant:
            return Contestant(other or ours, amp, **how)

        return Contender(ours, name, make)

    half = f"AMP {a.amp}, NHWC"
    backend = a.compile_backend
    found = [
        peer("torchvision reference: fp32, NCHW", vanilla, "off"),
        peer(f"timm-like: {half}", vanilla, a.amp, nhwc=True),
        peer("authors' three passes: fp32, NCHW", fused, "off"),
        peer(f"authors' three passes: {half}", fused, a.amp, nhwc=True),
        peer("timm-like, compiled", vanilla, a.amp, nhwc=True, compiled=backend),
        variant("ours, compiled", vanilla, compiled=backend),
        variant("vanilla without norm kernel", vanilla, without="norm kernel"),
    ]
    for schedule in SCHEDULES:
        other = config_of(a.model, a.rows, a.size, **method_of(schedule))
        found.append(variant(f"ours, {schedule}", fused, other=other))
    for ingredient in INGREDIENTS:
        found.append(variant(f"ours without {ingredient}", fused, without=ingredient))
    found.append(variant("ours without AMP", fused, amp="off"))
    found.append(variant("Fast AdvProp, compiled", fused, compiled=backend))

    missing: tuple[str, ...] = ()
    if not a.compile:
        missing += ("compiled",)
    if not GPU:
        missing += ON_A_GPU_ONLY
    if a.amp == "off":
        missing += ("without AMP", "half-precision copy")
    return [contender for contender in found if not contender.name.endswith(missing)]


def compare(contender: Contender, ours: Contestant, a: argparse.Namespace) -> dict[str, Any]:
    """Blocks of the contender and of our step in turns."""

    def seconds_per_step(contestant: Contestant | Peer) -> float:
        return contestant.block(a.block)[0]

    theirs, own = alternate(seconds_per_step, [contender.make(), ours], a.rounds)
    return {
        "how": ours.how,
        "our rows/s": contender.ours.optim.clean_batch / float(np.median(own)),
        "other's s": spread(theirs),
        "our s": spread(own),
        "other / ours": ratio(theirs, own),
    }


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = {"rows": 128, "rounds": 15, "block": 1}
    if GPU:
        defaults = {"rows": 64, "rounds": 10, "block": 5}
    parser = options(__doc__, model=MODEL, size=SIZE, **defaults, compile=GPU)
    parser.add_argument("--amp", choices=AMPS, default=AMPS[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="contenders whose names hold one of these",
    )
    parser.add_argument(
        "--compile-backend", default="inductor", help="of torch.compile; default: %(default)s"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    a = parsed(argv)
    results: list[dict[str, Any]] = []
    own: dict[str, Contestant] = {}  # our step by method: made once
    for contender in contenders(a):
        if not any(word in contender.name for word in a.only):
            continue
        method = contender.ours.method.name
        result: dict[str, Any] = {"ours": method, "other": contender.name}
        try:
            if method not in own:
                own[method] = Contestant(contender.ours, a.amp)
            result |= compare(contender, own[method], a)
        # Out of GPU memory, a failed capture, Triton's errors, which are no RuntimeError: it costs
        # this line.
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        gc.collect()
        torch.cuda.empty_cache()
        results.append(result)
        file = a.out / f"step_{DEVICE.type}"
        lines = report(file, settings_of(a), results, ["other / ours"])
        print(lines[-1], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
