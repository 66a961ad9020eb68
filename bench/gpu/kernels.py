"""How close do our kernels come to what the card can do?

    python -m bench.gpu.kernels

Memory bandwidth, our batch norm against cuDNN's, the stem's data gradient. Every call is captured
ten times in one CUDA graph and the replay is timed, so that launches from Python do not count.
Bandwidth counts the bytes that must move, reads and writes: what the kernel really moves may be
more. Small layers fit into the L2 cache and can exceed the memory's bandwidth, in the bench as in a
network. Writes OUT/kernels.json.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.common import options, spread, write_json
from bench.contestants import DEVICE, GPU, MODEL
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


# ------------------------------------------------------------------ time and bandwidth


def milliseconds(call: Callable[[], Any], rounds: int) -> list[float]:
    """Milliseconds of one call, `rounds` times."""
    call()
    if not GPU:
        return _by_the_clock(call, rounds)
    # A capture wants the call's allocations and plans made before, on another stream than the
    # default one.
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        call()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    times = []
    for _ in range(rounds):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / CALLS)
    return times


def _by_the_clock(call: Callable[[], Any], rounds: int) -> list[float]:
    """On a CPU, only to show that everything runs."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def median_ms(call: Callable[[], Any], rounds: int) -> float:
    return float(np.median(milliseconds(call, rounds)))


def bandwidth(megabytes: int, rounds: int) -> dict[str, Any]:
    """GB/s of a copy on the device (read + written), and of one from pinned host memory."""
    n_bytes = megabytes << 20
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    host = torch.zeros(n_bytes // 4, dtype=torch.uint8, pin_memory=GPU)

    def copy() -> None:
        target.copy_(source)

    def upload() -> None:
        target[: len(host)].copy_(host, non_blocking=True)

    copies_ms = np.array(milliseconds(copy, rounds))
    uploads_ms = np.array(milliseconds(upload, rounds))
    return {
        "copy_gb_per_s": spread(2 * len(source) / copies_ms / 1e6),
        "host_to_device_gb_per_s": spread(len(host) / uploads_ms / 1e6),
    }


# ------------------------------------------------------------------ batch norm


def layers_of(model: str, size: int) -> Counter[Layer]:
    """The batch norms that one image meets on its way through the model, and how often each."""
    network = build(model, 10, size=size)
    met: Counter[Layer] = Counter()

    def note(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, DualBatchNorm2d)
        _, channels, side, _ = args[0].shape
        residual = len(args) > 1
        met[Layer(channels, side, norm.relu, residual)] += 1

    for norm in norms(network):
        norm.register_forward_pre_hook(note)
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    return met


def bytes_moved(layer: Layer, elements: int) -> int:
    """Of a forward and a backward of `elements` activations in half precision."""
    forward = 3  # x is read twice, y written
    backward = 5  # gradient and x are read twice, the gradient of x is written
    if layer.residual:
        forward += 1  # read
        backward += 3  # y is read twice, the residual's gradient written
    return (forward + backward) * HALF_BYTES * elements


def random_images(layer: Layer, rows: int) -> Tensor:
    """Half precision (rows, channels, side, side), channels_last, a leaf that wants a gradient."""
    shape = (rows, layer.channels, layer.side, layer.side)
    x = torch.randn(shape, device=DEVICE, dtype=torch.half)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def our_norm(layer: Layer, groups: tuple[Group, ...]) -> DualBatchNorm2d:
    norm = DualBatchNorm2d(nn.BatchNorm2d(layer.channels), NormState(), True).to(DEVICE)
    norm.relu = layer.relu
    norm.shared.groups = groups
    # Without a GPU tests/nets/test_norm_kernel.py has Triton's interpreter run the kernel.
    norm.shared.kernel = "triton" if GPU else "framework"
    return norm


def norm_times(
    norm: Callable[..., Tensor],
    inputs: Sequence[Tensor],  # x, perhaps the residual
    parameters: Sequence[Tensor],
    gradient: Tensor,  # of the output
    rounds: int,
) -> dict[str, float]:
    """Milliseconds of forward, backward and both."""
    wanted = [*inputs, *parameters]

    def forward() -> None:
        norm(*inputs)

    def forward_and_backward() -> None:
        torch.autograd.grad(norm(*inputs), wanted, gradient)

    forward_ms = median_ms(forward, rounds)
    both_ms = median_ms(forward_and_backward, rounds)
    return {"forward_ms": forward_ms, "backward_ms": both_ms - forward_ms, "ms": both_ms}


def compare_norms(layer: Layer, groups: tuple[Group, ...], rounds: int) -> dict[str, Any]:
    """Our kernel over groups, and cuDNN's batch norm + add + ReLU over the whole batch."""
    n_rows = sum(group.rows for group in groups)
    ours = our_norm(layer, groups)
    plain = nn.BatchNorm2d(layer.channels).to(DEVICE)

    def theirs(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = plain(x)
        if residual is not None:
            y = y + residual
        if layer.relu:
            y = torch.relu_(y)
        return y

    inputs = [random_images(layer, n_rows)]
    if layer.residual:
        inputs.append(random_images(layer, n_rows))
    gradient = random_images(layer, n_rows).detach()
    our_times = norm_times(ours, inputs, list(ours.parameters()), gradient, rounds)
    their_times = norm_times(theirs, inputs, list(plain.parameters()), gradient, rounds)
    moved = bytes_moved(layer, inputs[0].numel())
    our_times["gb_per_s"] = moved / our_times["ms"] / 1e6
    sizes = layer._asdict() | {"rows": n_rows}
    return sizes | {"ours": our_times, "cudnn": their_times, "bytes": moved}


def summary_of_norms(found: list[dict[str, Any]], copy_gb_per_s: float) -> dict[str, Any]:
    """All batch norms of one pass together: each layer's time as often as the network has it."""
    ours_ms = sum(layer["count"] * layer["ours"]["ms"] for layer in found)
    cudnn_ms = sum(layer["count"] * layer["cudnn"]["ms"] for layer in found)
    moved = sum(layer["count"] * layer["bytes"] for layer in found)
    gb_per_s = moved / ours_ms / 1e6
    return {
        "ours_ms": ours_ms,
        "cudnn_ms": cudnn_ms,
        "cudnn_over_ours": cudnn_ms / ours_ms,
        "gb_per_s": gb_per_s,
        "share_of_copy": gb_per_s / copy_gb_per_s,
    }


def measured_norms(
    model: str, size: int, groups: tuple[Group, ...], rounds: int
) -> list[dict[str, Any]]:
    """Every norm of the model, said line by line."""
    found = []
    for layer, count in layers_of(model, size).items():
        one = compare_norms(layer, groups, rounds) | {"count": count}
        found.append(one)
        name = f"norm {layer.channels} x {layer.side}"
        if layer.residual:
            name += " + residual"
        print(
            f"{name}, {count} times: {one['ours']['ms']:.3f} ms, "
            f"{one['ours']['gb_per_s']:.0f} GB/s; cuDNN {one['cudnn']['ms']:.3f} ms",
            flush=True,
        )
    return found


# ------------------------------------------------------------------ the stem


class Stem(NamedTuple):
    """A form of ResNet-50's first convolution."""

    name: str
    channels: int
    nhwc: bool
    half: bool


STEMS = (
    Stem("3 channels, half, NHWC (ours)", 3, nhwc=True, half=True),
    Stem("3 channels, half, NCHW", 3, nhwc=False, half=True),
    Stem("padded to 4, half, NHWC", 4, nhwc=True, half=True),
    Stem("padded to 8, half, NHWC", 8, nhwc=True, half=True),
    Stem("3 channels, float32, NHWC", 3, nhwc=True, half=False),
)


def stem_times(stem: Stem, rows: int, size: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of the forward, of the data gradient and of the weight gradient."""
    layout = torch.channels_last if stem.nhwc else torch.contiguous_format
    dtype = torch.half if stem.half else torch.float

    def random(*shape: int) -> Tensor:
        x = torch.randn(shape, device=DEVICE, dtype=dtype)
        return x.contiguous(memory_format=layout)

    x = random(rows, stem.channels, size, size)
    weight = random(64, stem.channels, 7, 7)
    gradient = random(rows, 64, size // 2, size // 2)
    # stride, padding, dilation, transposed, output padding, groups
    geometry = ([2, 2], [3, 3], [1, 1], False, [0, 0], 1)

    def forward() -> None:
        torch.ops.aten.convolution(x, weight, None, *geometry)

    def backward(wanted: list[bool]) -> None:
        torch.ops.aten.convolution_backward(gradient, x, weight, None, *geometry, wanted)

    def data_gradient() -> None:
        backward([True, False, False])

    def weight_gradient() -> None:
        backward([False, True, False])

    return {
        "stem": stem.name,
        "rows": rows,
        "forward_ms": median_ms(forward, rounds),
        "data_gradient_ms": median_ms(data_gradient, rounds),
        "weight_gradient_ms": median_ms(weight_gradient, rounds),
    }


def measured_stems(rows: int, size: int, rounds: int) -> list[dict[str, Any]]:
    """Every form of the stem, said line by line."""
    found = []
    for stem in STEMS:
        try:
            one = stem_times(stem, rows, size, rounds)
        except RuntimeError as error:  # a layout that cuDNN does not have
            one = {"stem": stem.name, "error": str(error).splitlines()[0]}
        found.append(one)
        print(one, flush=True)
    return found


# ------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    defaults = {"size": 8, "main_rows": 4, "aux_rows": 2, "megabytes": 1, "rounds": 1}
    if GPU:
        defaults = {"size": 224, "main_rows": 64, "aux_rows": 16, "megabytes": 1024, "rounds": 7}
    a = options(__doc__, model=MODEL, **defaults).parse_args(argv)
    torch.backends.cudnn.benchmark = True
    found_bandwidth = bandwidth(a.megabytes, a.rounds)
    copy_gb_per_s = found_bandwidth["copy_gb_per_s"]["median"]
    print(f"copy on the device: {copy_gb_per_s:.0f} GB/s (read + written)", flush=True)

    # As in a pass of `fused` with 256 clean rows: two groups of clean rows, four of noise.
    groups = [Group("main", a.main_rows, call, 2) for call in range(2)]
    groups += [Group("aux", a.aux_rows, call, 4) for call in range(4)]
    found_norms = measured_norms(a.model, a.size, tuple(groups), a.rounds)
    summary = summary_of_norms(found_norms, copy_gb_per_s)
    said = ", ".join(f"{name} {value:.3g}" for name, value in summary.items())
    print(f"all norms of a pass: {said}", flush=True)

    result = {
        "bandwidth": found_bandwidth,
        "norms": found_norms,
        "norm": summary,
        "stems": measured_stems(a.main_rows, a.size, a.rounds),
    }
    write_json(a.out / "kernels.json", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
