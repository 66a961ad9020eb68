"""Kernels beside what the card can do: memory bandwidth, our batch norm against cuDNN's, the stem's
data gradient.

    python -m bench.gpu.kernels

Every call is captured ten times in one CUDA graph and the replay is timed, so that launches from
Python do not count. Bandwidth counts the bytes that must move, reads and writes: what the kernel
really moves may be more. Small layers fit into the L2 cache and can exceed the memory's bandwidth,
in the bench as in a network.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.common import options, spread, write_json
from bench.step import DEVICE, GPU
from fap.nets.build import build
from fap.nets.dual import norms
from fap.nets.norm import DualBatchNorm2d, Group, NormState

CALLS = 10  # of a kernel in one captured graph
HALF_BYTES = 2


class Layer(NamedTuple):
    """A batch norm of the network as the step calls it."""

    channels: int
    side: int
    relu: bool
    residual: bool


def milliseconds(call: Callable[[], Any], rounds: int) -> list[float]:
    """Milliseconds of one call, `rounds` times."""
    call()
    if not GPU:  # only to show that everything runs
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        return [1e3 * s for s in seconds]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / CALLS)
    return times


def bandwidth(megabytes: int, rounds: int) -> dict[str, Any]:
    """GB/s of a copy on the device (read + written), and of one from pinned host memory."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    host = torch.zeros(megabytes << 18, dtype=torch.uint8, pin_memory=GPU)
    copies = np.array(milliseconds(lambda: target.copy_(source), rounds))
    uploads = np.array(
        milliseconds(lambda: target[: len(host)].copy_(host, non_blocking=True), rounds)
    )
    return {
        "copy_gb_per_s": spread(2 * len(source) / copies / 1e6),
        "host_to_device_gb_per_s": spread(len(host) / uploads / 1e6),
    }


# ------------------------------------------------------------------ batch norm


def layers_of(model: str, size: int) -> Counter[Layer]:
    """The batch norms that one image meets on its way through the model, and how often each."""
    network = build(model, 10, size=size)
    met: Counter[Layer] = Counter()

    def note(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, DualBatchNorm2d)
        met[Layer(args[0].shape[1], args[0].shape[2], norm.relu, len(args) > 1)] += 1

    for norm in norms(network):
        norm.register_forward_pre_hook(note)
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    return met


def bytes_moved(layer: Layer, elements: int) -> tuple[int, int]:
    """Forward: x twice, y, the residual. Backward: gradient and x twice (with a residual y too),
    the gradients written.
    """
    if layer.residual:
        return 4 * HALF_BYTES * elements, 8 * HALF_BYTES * elements
    return 3 * HALF_BYTES * elements, 5 * HALF_BYTES * elements


def compare_norms(layer: Layer, rows: tuple[Group, ...], rounds: int) -> dict[str, Any]:
    """Milliseconds of our kernel and of cuDNN's batch norm + add + ReLU over the whole batch,
    forward and backward.
    """
    n_rows = sum(group.rows for group in rows)
    ours = DualBatchNorm2d(nn.BatchNorm2d(layer.channels), NormState(), True).to(DEVICE)
    ours.relu = layer.relu
    ours.shared.groups = rows
    ours.shared.kernel = (
        "triton" if GPU else "framework"
    )  # tests/test_norm_kernel.py has Triton's interpreter run the kernel
    plain = nn.BatchNorm2d(layer.channels).to(DEVICE)

    def images() -> Tensor:
        x = torch.randn(
            n_rows, layer.channels, layer.side, layer.side, device=DEVICE, dtype=torch.half
        )
        return x.contiguous(memory_format=torch.channels_last).requires_grad_()

    x = images()
    residual = images() if layer.residual else None
    gradient = images().detach()
    inputs = [x] if residual is None else [x, residual]

    def theirs(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = plain(x)
        if residual is not None:
            y = y + residual
        return torch.relu_(y) if layer.relu else y

    result: dict[str, Any] = layer._asdict() | {"rows": n_rows}
    forward_bytes, backward_bytes = bytes_moved(layer, x.numel())
    for name, norm, parameters in (
        ("ours", ours, ours.parameters()),
        ("cudnn", theirs, plain.parameters()),
    ):
        wanted = [*inputs, *parameters]
        forward = np.median(milliseconds(lambda norm=norm: norm(*inputs), rounds))
        both = np.median(
            milliseconds(
                lambda norm=norm, wanted=wanted: torch.autograd.grad(
                    norm(*inputs), wanted, gradient
                ),
                rounds,
            )
        )
        result[name] = {
            "forward_ms": float(forward),
            "backward_ms": float(both - forward),
            "ms": float(both),
        }
    result["bytes"] = forward_bytes + backward_bytes
    result["ours"]["gb_per_s"] = result["bytes"] / result["ours"]["ms"] / 1e6
    return result


def summary_of_norms(found: list[dict[str, Any]], copy_gb_per_s: float) -> dict[str, Any]:
    """All batch norms of one pass together: each layer's time as often as the network has it."""
    ours = sum(f["count"] * f["ours"]["ms"] for f in found)
    theirs = sum(f["count"] * f["cudnn"]["ms"] for f in found)
    moved = sum(f["count"] * f["bytes"] for f in found)
    gb_per_s = moved / ours / 1e6
    return {
        "ours_ms": ours,
        "cudnn_ms": theirs,
        "cudnn_over_ours": theirs / ours,
        "gb_per_s": gb_per_s,
        "share_of_copy": gb_per_s / copy_gb_per_s,
    }


# ------------------------------------------------------------------ the stem

STEMS = (  # name, input channels, channels_last, half precision
    ("3 channels, half, NHWC (ours)", 3, True, True),
    ("3 channels, half, NCHW", 3, False, True),
    ("padded to 4, half, NHWC", 4, True, True),
    ("padded to 8, half, NHWC", 8, True, True),
    ("3 channels, float32, NHWC", 3, True, False),
)


def stem(
    name: str, channels: int, nhwc: bool, half: bool, rows: int, size: int, rounds: int
) -> dict[str, Any]:
    """ResNet-50's first convolution: forward, data gradient, weight gradient in ms."""
    layout = torch.channels_last if nhwc else torch.contiguous_format
    kind: dict[str, Any] = {"device": DEVICE, "dtype": torch.half if half else torch.float}
    x = torch.randn(rows, channels, size, size, **kind).contiguous(memory_format=layout)
    weight = torch.randn(64, channels, 7, 7, **kind).contiguous(memory_format=layout)
    gradient = torch.randn(rows, 64, size // 2, size // 2, **kind).contiguous(memory_format=layout)
    geometry = ([2, 2], [3, 3], [1, 1], False, [0, 0], 1)
    backward = torch.ops.aten.convolution_backward

    def median(call: Callable[[], Any]) -> float:
        return float(np.median(milliseconds(call, rounds)))

    return {
        "stem": name,
        "rows": rows,
        "forward_ms": median(lambda: torch.ops.aten.convolution(x, weight, None, *geometry)),
        "data_gradient_ms": median(
            lambda: backward(gradient, x, weight, None, *geometry, [True, False, False])
        ),
        "weight_gradient_ms": median(
            lambda: backward(gradient, x, weight, None, *geometry, [False, True, False])
        ),
    }


def main(argv: Any = None) -> int:
    parser = options(
        __doc__,
        model="resnet50" if GPU else "cifar_resnet8",
        size=224 if GPU else 8,
        main_rows=64 if GPU else 4,
        aux_rows=16 if GPU else 2,
        megabytes=1024 if GPU else 1,
        rounds=7 if GPU else 1,
    )
    a = parser.parse_args(argv)
    torch.backends.cudnn.benchmark = True
    result: dict[str, Any] = {"bandwidth": bandwidth(a.megabytes, a.rounds)}
    copy = result["bandwidth"]["copy_gb_per_s"]["median"]
    print(f"copy on the device: {copy:.0f} GB/s (read + written)", flush=True)

    # As in a pass of `fused` with 256 clean rows: two groups of clean rows, four of noise.
    groups = [Group("main", a.main_rows, call, 2) for call in range(2)]
    groups += [Group("aux", a.aux_rows, call, 4) for call in range(4)]
    found = []
    for layer, count in layers_of(a.model, a.size).items():
        found.append(compare_norms(layer, tuple(groups), a.rounds) | {"count": count})
        one = found[-1]
        print(
            f"norm {layer.channels} x {layer.side}{' + residual' if layer.residual else ''},"
            f" {count} times: {one['ours']['ms']:.3f} ms, {one['ours']['gb_per_s']:.0f} GB/s; cuDNN"
            f" {one['cudnn']['ms']:.3f} ms",
            flush=True,
        )
    result["norms"] = found
    result["norm"] = summary_of_norms(found, copy)
    print(
        "all norms of a pass: " + ", ".join(f"{k} {v:.3g}" for k, v in result["norm"].items()),
        flush=True,
    )

    result["stems"] = []
    for arguments in STEMS:
        try:
            result["stems"].append(stem(*arguments, rows=a.main_rows, size=a.size, rounds=a.rounds))
        except RuntimeError as error:  # a layout that cuDNN does not have
            result["stems"].append({"stem": arguments[0], "error": str(error).splitlines()[0]})
        print(result["stems"][-1], flush=True)
    write_json(a.out / "kernels.json", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
