"""What counts as a layout copy in a profile: made-up events, and a real profile of a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from tests.step.layout_copies import layout_copies

TO = "void cudnn::ops::nchwToNhwcKernel<__half, __half>(...)"
FRO = "void cudnn::ops::nhwcToNchwKernel<__half, __half>(...)"
MAIN = "sm90_xmma_fprop_implicit_gemm"

# Shapes of input and weight.
STEM = ([96, 3, 32, 32], [16, 3, 3, 3])
INNER = ([96, 16, 32, 32], [16, 16, 3, 3])
DEPTHWISE = ([96, 3, 32, 32], [3, 1, 3, 3])
TO_THREE = ([96, 16, 32, 32], [3, 16, 3, 3])


def operator(
    name: str, shapes: Sequence[list[int]] = (), parent: Any = None, kernels: Sequence[str] = ()
) -> SimpleNamespace:
    """An event of the CPU, with the kernels that it launched."""
    return SimpleNamespace(
        name=name,
        input_shapes=list(shapes),
        cpu_parent=parent,
        kernels=[SimpleNamespace(name=kernel) for kernel in kernels],
        device_type=DeviceType.CPU,
    )


def on_device(name: str) -> SimpleNamespace:
    """A kernel as an event of the GPU."""
    return SimpleNamespace(
        name=name, input_shapes=[], cpu_parent=None, kernels=[], device_type=DeviceType.CUDA
    )


@pytest.mark.parametrize("shapes", [STEM, INNER, DEPTHWISE, TO_THREE])
@pytest.mark.parametrize("forward", [True, False])
def test_only_the_stem_may_be_transposed(
    shapes: tuple[list[int], list[int]], forward: bool
) -> None:
    kernels = [TO, MAIN, FRO]
    if forward:
        outer = operator("aten::conv2d", [*shapes, [16]])
        inner = operator("aten::cudnn_convolution", [*shapes, [], []], outer, kernels)
    else:
        outer = operator("autograd::engine::evaluate_function: ConvolutionBackward0")
        out_channels = shapes[1][0]
        given = [[96, out_channels, 32, 32], *shapes, []]
        inner = operator("aten::convolution_backward", given, outer, kernels)
    found = layout_copies([outer, inner, *(on_device(kernel) for kernel in kernels)])
    if shapes == STEM:
        assert found == []
    else:
        by = f"launched by {inner.name} on {inner.input_shapes}"
        assert found == [f"{TO} {by}", f"{FRO} {by}"]


def test_what_the_stem_calls_may_transpose_and_nothing_else() -> None:
    stem = operator("aten::conv2d", STEM)
    inside = operator("aten::copy_", [[96, 3, 32, 32]], stem, [TO])
    beside = operator("aten::copy_", [[96, 3, 32, 32]], None, [TO])
    assert layout_copies([stem, inside, on_device(TO)]) == []
    (found,) = layout_copies([stem, inside, beside, on_device(TO), on_device(TO)])
    assert found == f"{TO} launched by aten::copy_ on [[96, 3, 32, 32]]"
    three_out = operator("aten::convolution_backward", [[96, 3, 32, 32], *TO_THREE], None, [TO])
    assert len(layout_copies([three_out])) == 1


def test_a_transposition_that_nobody_launched_is_an_offence() -> None:
    stem = operator("aten::cudnn_convolution", STEM, None, [TO])
    known = [stem, on_device(TO), on_device(MAIN)]
    by_nobody = "launched by no operator of the profile"
    assert layout_copies(known) == []
    assert layout_copies([*known, on_device(TO)]) == [f"{TO} {by_nobody}"]
    assert layout_copies([on_device(FRO)]) == [f"{FRO} {by_nobody}"]


def test_convolutions_are_recognised_in_a_real_profile() -> None:
    """Names, shapes and parents as this torch's profiler gives them; kernels are added by hand."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    stem = nn.Conv2d(3, 4, 3)
    inner = nn.Conv2d(4, 4, 3)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as trace:
        inner(stem(x)).sum().backward()
    launching = (
        "aten::mkldnn_convolution",
        "aten::_slow_conv2d_forward",
        "aten::convolution_backward",
    )
    events = [event for event in trace.events() if event.name in launching]
    for event in events:
        event.append_kernel(TO, 0, 1)
    assert len(events) == 4
    found = layout_copies(trace.events())
    assert len(found) == 2  # the inner convolution's, forward and backward
    assert all("[2, 4, 6, 6]" in line for line in found)
