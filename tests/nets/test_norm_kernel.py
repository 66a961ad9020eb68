"""The Triton batch norm against its twin: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fap.config import make_config
from fap.nets.build import build
from fap.nets.norm import DualBatchNorm2d, Group, NormState, norm_state
from fap.step.step import Step
from tests.conftest import interpreter_mismatch, needs_the_norm_kernel

pytest.importorskip("triton")
from fap.nets import norm_kernel  # which needs triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


pytestmark = pytest.mark.usefixtures("seed")


def pair(
    channels: int, aux: bool = True, relu: bool = False
) -> tuple[DualBatchNorm2d, DualBatchNorm2d]:
    """The same random norm twice: with the kernel, and the twin in float64."""
    needs_the_norm_kernel()
    norm = DualBatchNorm2d(nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3), NormState(), aux)
    norm.relu = relu
    for name, value in norm.state_dict().items():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5 if "var" in name or "weight" in name else -1, 2)
    twin = DualBatchNorm2d(
        nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3), NormState(), aux
    ).double()
    twin.load_state_dict({k: v.double() for k, v in norm.state_dict().items()})
    twin.relu, twin.shared.kernel, norm.shared.kernel = relu, "framework", "triton"
    return norm.to(DEVICE), twin.to(DEVICE)


def images(
    rows: int, channels: int, height: int, width: int, dtype: torch.dtype, mean: float = 0.0
) -> Tensor:
    x = torch.randn(rows, channels, height, width, device=DEVICE) * 3 + mean
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def compare(
    norm: DualBatchNorm2d,
    twin: DualBatchNorm2d,
    x: Tensor,
    residual: Tensor | None,
    tolerance: float,
) -> None:
    """Output, gradients and running statistics of one forward and backward, relative to the largest
    value.
    """
    inputs = [
        [t.clone().requires_grad_(), t.double().requires_grad_()]
        for t in (x, residual)
        if t is not None
    ]
    got, want = (m(*args) for m, args in zip((norm, twin), zip(*inputs, strict=True), strict=True))
    assert got.dtype == x.dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    # No gradient where the ReLU's verdict hangs on rounding.
    gradient = (
        torch.where(want.abs() > 20 * tolerance, torch.randn_like(got).double(), 0)
        if norm.relu
        else torch.randn_like(want)
    )
    gradient = gradient.to(x.dtype)
    got.backward(gradient)
    want.backward(gradient.double())
    pairs = [("output", got, want)] + [
        (f"input {i}", a.grad, b.grad) for i, (a, b) in enumerate(inputs)
    ]
    parameters = zip(norm.named_parameters(), twin.parameters(), strict=True)
    pairs += [(name, a.grad, b.grad) for (name, a), b in parameters]
    pairs += [
        (name, a, b) for (name, a), b in zip(norm.named_buffers(), twin.buffers(), strict=True)
    ]
    for name, a, b in pairs:
        assert (a is None) == (b is None), name
        if a is not None:
            bound = tolerance * (1 + b.abs().max().item())
            assert (a.double() - b).abs().max().item() <= bound, (
                name,
                (a.double() - b).abs().max().item(),
                bound,
            )


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(1, 6), max_size=3), st.lists(st.integers(1, 6), max_size=3), st.sampled_from([1, 3, 16, 70, 130]),
    st.tuples(st.integers(2, 9), st.integers(1, 9)), st.sampled_from(["plain", "relu", "residual"]), st.integers(0, 2**31),
)  # fmt: skip
def test_kernel_equals_twin(
    main: list[int], aux: list[int], channels: int, sides: tuple[int, int], how: str, s: int
) -> None:
    torch.manual_seed(s)
    norm, twin = pair(channels, relu=how != "plain")
    rows = main + aux or [2]
    groups = [Group("main", n, i, len(main)) for i, n in enumerate(main)]
    groups += [Group("aux", n, i, len(rows) - len(main)) for i, n in enumerate(rows[len(main) :])]
    norm.shared.groups = twin.shared.groups = tuple(groups)
    x = images(sum(rows), channels, *sides, torch.float32, mean=20)
    residual = images(sum(rows), channels, *sides, torch.float32) if how == "residual" else None
    compare(norm, twin, x, residual, 2e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("how", ["plain", "relu", "residual"])
def test_half_precision_keeps_float32_statistics(
    dtype: torch.dtype, tolerance: float, how: str
) -> None:
    norm, twin = pair(32, relu=how != "plain")
    norm.shared.groups = twin.shared.groups = (
        Group("main", 8, 0, 1),
        Group("aux", 4, 0, 2),
        Group("aux", 4, 1, 2),
    )
    x, residual = images(16, 32, 7, 5, dtype, mean=4), images(16, 32, 7, 5, dtype)
    compare(norm, twin, x, residual if how == "residual" else None, tolerance)


def test_many_parts_and_no_auxiliary_norms() -> None:
    """More pixels than one program holds, so that partial sums are put together."""
    norm, twin = pair(16, aux=False, relu=True)
    norm.shared.groups = twin.shared.groups = (Group("main", 3, 0, 2), Group("main", 2, 1, 2))
    compare(norm, twin, images(5, 16, 40, 37, torch.float32, mean=-7), None, 2e-4)


def test_more_parts_than_one_load_takes() -> None:
    """A GPU has up to 528 parts a group, and 128 are read at a time; other tests here have 4."""
    groups, parts, channels = 3, 300, 19
    sums = torch.randn(groups, parts, 2, channels, device=DEVICE)
    stats = torch.rand(5, groups, channels, device=DEVICE)
    shares = torch.empty(2, groups, channels, device=DEVICE)
    norm_kernel._group_gradients[2, groups](sums, stats, shares, channels, parts, BLOCK_C=16)
    total, moment = sums.double().sum(1).unbind(1)
    want = torch.stack([moment * stats[norm_kernel.INVSTD.value], total])
    torch.testing.assert_close(shares.double(), want, rtol=1e-4, atol=1e-4)


def random_groups(bn: Literal["main", "aux"], moves: Sequence[bool]) -> list[Group]:
    """Groups of 1-4 rows; those that do not move the running statistics lie among those that do."""
    groups = []
    for i, moving in enumerate(moves):
        call, calls = (sum(moves[:i]), sum(moves)) if moving else (0, 0)
        groups.append(Group(bn, random.randint(1, 4), call, calls))
    return groups


@pytest.mark.parametrize("how", ["plain", "residual"])
@pytest.mark.parametrize(
    ("n_main", "n_aux"),
    [(1, 7), (7, 1), (4, 3), (0, 6), (5, 0), pytest.param(2, 19, marks=pytest.mark.slow)],
)
def test_many_uneven_groups_equal_the_twin(n_main: int, n_aux: int, how: str) -> None:
    """Also more groups of one side than one load takes (16); a third have momentum 0."""
    norm, twin = pair(70, relu=how != "plain")
    moves = [random.random() < 2 / 3 for _ in range(n_main + n_aux)]
    groups = random_groups("main", moves[:n_main]) + random_groups("aux", moves[n_main:])
    norm.shared.groups = twin.shared.groups = tuple(groups)
    shape = sum(g.rows for g in groups), 70, 3, 2
    x, residual = images(*shape, torch.float32, mean=5), images(*shape, torch.float32)
    compare(norm, twin, x, residual if how == "residual" else None, 2e-4)


def test_a_nan_of_a_group_without_momentum_does_not_get_into_the_statistics() -> None:
    norm, twin = pair(8)
    groups = random_groups("main", [True, False, True])
    groups += random_groups("aux", [False, True, True, False])
    norm.shared.groups = twin.shared.groups = tuple(groups)
    x = images(sum(g.rows for g in groups), 8, 3, 3, torch.float32)
    for part, group in zip(x.split([g.rows for g in groups]), groups, strict=True):
        if not group.calls:
            part[0, 3] = float("nan")
    before = {k: v.clone() for k, v in norm.named_buffers()}
    norm(x)
    twin(x.double())
    for (name, got), want in zip(norm.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)
        assert not got.is_floating_point() or not torch.equal(got, before[name])


def bits(norm: nn.BatchNorm2d) -> list[Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return [norm.running_mean.view(torch.int32).clone(), norm.running_var.view(torch.int32).clone()]


@pytest.mark.parametrize("called", ["main", "aux"])
@pytest.mark.parametrize("calls", [0, 3])
def test_statistics_at_rest_are_not_written(called: Literal["main", "aux"], calls: int) -> None:
    """Bit for bit: adding 0 would turn -0.0 into 0.0. With `calls` 0 no group moves any."""
    norm, _ = pair(8)
    for value in norm.buffers():
        if value.is_floating_point():
            value[:2] = torch.tensor([-0.0, float("nan")])
    main, aux = norm.branch("main"), norm.branch("aux")
    before = {"main": bits(main), "aux": bits(aux)}
    norm.shared.groups = tuple(Group(called, 2, i if calls else 0, calls) for i in range(3))
    x = images(6, 8, 3, 3, torch.float32)
    if not calls:
        x[0] = float("nan")
    norm(x).sum().backward()
    for side, name in ((main, "main"), (aux, "aux")):
        same = [torch.equal(a, b) for a, b in zip(bits(side), before[name], strict=True)]
        assert same == [name != called or calls == 0] * 2, name
        assert (side.weight.grad is None) == (side.bias.grad is None) == (name != called), name


def test_equal_calls_give_equal_bits() -> None:
    norm, _ = pair(70, relu=True)
    groups = (*random_groups("main", [True] * 3), *random_groups("aux", [True, False] * 2))
    norm.shared.groups = groups
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    shape = sum(g.rows for g in groups), 70, 5, 3
    x, residual, gy = (images(*shape, torch.float32) for _ in range(3))
    results = []
    for _ in range(2):
        norm.load_state_dict(state)
        norm.zero_grad()
        inputs = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y = norm(*inputs)
        y.backward(gy)
        values = [y.detach(), *(t.grad for t in (*inputs, *norm.parameters())), *norm.buffers()]
        results.append([v.clone() for v in values])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("n_groups", [1, 6])
def test_three_launches_each_way(n_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    kind = type(norm_kernel._normalise)
    launch = kind.__getitem__

    def counted(self: Any, grid: tuple[int, ...]) -> Any:
        launched.append(self.__name__)
        return launch(self, grid)

    monkeypatch.setattr(kind, "__getitem__", counted, raising=False)
    norm, _ = pair(3)
    norm.shared.groups = tuple(random_groups("aux", [True] * n_groups))
    x = images(sum(g.rows for g in norm.shared.groups), 3, 3, 3, torch.float32).requires_grad_()
    y = norm(x)
    assert launched == ["_forward_sums", "_statistics", "_normalise"]
    y.sum().backward()
    assert launched[3:] == ["_backward_sums", "_group_gradients", "_gradient"]


def test_a_nan_stays_in_its_group() -> None:
    norm, _ = pair(8, relu=True)
    norm.shared.groups = (Group("main", 4, 0, 1), Group("aux", 4, 0, 1))
    x = images(8, 8, 3, 3, torch.float32)
    x[5, 2, 1, 1] = float("nan")
    y = norm(x)
    assert y[:4].isfinite().all()
    assert y[4:, 2].isnan().all()
    assert y[4:, 3:].isfinite().all()
    assert norm.running_mean is not None
    assert norm.running_mean.isfinite().all()


def states_after_one_step(schedule: str) -> list[dict[str, Tensor]]:
    """The state after one step on random data: with the twin's norm and with the kernel's.

    The method is the noise control, whose adversarial rows do not hang on the sign of tiny
    gradients.
    """
    config = make_config({
        "model": {"name": "cifar_resnet8", "num_classes": 10}, "optim": {"clean_batch": 16},
        "method": {"name": "noise", "schedule": schedule, "group_rows": 8, "p_adv": "1/3"},
        "data": {"size": 8, "resize": 8, "crop": "pad"},
    })  # fmt: skip
    images, labels = (
        torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8),
        torch.randint(0, 10, (24,)),
    )
    init = build("cifar_resnet8", 10, size=8).state_dict()
    states = []
    for kernel in ("framework", "triton"):
        model = build("cifar_resnet8", 10, size=8)
        model.load_state_dict(init)
        norm_state(model).kernel = kernel  # type: ignore[assignment]
        step = Step(model.to(DEVICE), config)
        step.feed(images, labels, 0.1)
        step()
        states.append(
            {k: v.clone() for k, v in step.state().items() if not k.startswith("metrics")}
        )
    return states


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sequential", "fused", "pipelined", "parallel"])
def test_a_whole_step_with_the_kernel_equals_one_without(schedule: str) -> None:
    """All tensors by rounding (1e-5 at most in 160 draws), unless it changes a ReLU's verdict.

    That happens in one draw of fifty and moves a bias's gradient by up to 4%, so such a draw is
    followed by another one; the running statistics, which no verdict moves, are right in every
    draw.
    """
    needs_the_norm_kernel()
    for _ in range(5):
        split, triton = states_after_one_step(schedule)
        errors = {
            name: (
                (
                    (triton[name].double() - value.double()).norm()
                    / max(1e-3, value.double().norm())
                ).item()
            )
            for name, value in split.items()
        }
        assert max(error for name, error in errors.items() if "running" in name) < 1e-4, errors
        if max(errors.values()) < 1e-4:
            return
    raise AssertionError(errors)


def test_what_the_interpreter_cannot_do_is_told_apart() -> None:
    """The line of Triton 3.6 and that of 3.8; numpy < 2.4 only warned."""
    old = 'scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data))'
    new = 'scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))'
    assert interpreter_mismatch(new, "3.8.0", "2.5.2") == ""
    assert interpreter_mismatch(old, "3.6.0", "2.3.5") == ""
    for numpy in ("2.4.0", "2.4.6", "2.5.2", "3.0.0"):
        reason = interpreter_mismatch(old, "3.6.0", numpy)
        assert "Triton 3.6.0" in reason
        assert f"numpy {numpy} refuses" in reason


COMPILE = """
import fap.nets.norm_kernel as kernels, pathlib, subprocess, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
constants = {"RESIDUAL": True, "RELU": True, "BLOCK_P": 64, "BLOCK_C": 64}
numbers = dict.fromkeys(("pixels", "channels", "main_groups", "parts"), "i32")
numbers |= {"eps": "fp32", "starts": "*i32"}
ptxas = pathlib.Path(triton.__file__).with_name("backends") / "nvidia/bin/ptxas"
images = dict.fromkeys(("x", "y", "gy", "gx", "residual", "gresidual"), "*fp16")
for name in ("forward_sums", "statistics", "normalise",
             "backward_sums", "group_gradients", "gradient"):
    kernel = getattr(kernels, f"_{name}")
    types = {a: "constexpr" if a in constants else (numbers | images).get(a, "*fp32") for a in kernel.arg_names}
    aligned = [i for i, (a, t) in enumerate(types.items()) if t[0] == "*" or a == "channels"]
    source = ASTSource(kernel, types, {k: v for k, v in constants.items() if k in types},
                       {(i,): [["tt.divisibility", 16]] for i in aligned})
    for capability in (80, 90):
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        gpu = f"sm_{capability}{'a' * (capability == 90)}"
        told = subprocess.run([ptxas, "-v", "--gpu-name", gpu, "-o", "/dev/null", "-"], input=code, text=True,
                              stderr=subprocess.PIPE, check=True).stderr
        print(name, gpu, "ld.global.v4" in code.replace(".L1::evict_last", ""), " 0 bytes spill stores" in told)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here() -> None:
    """For the A100's and the H100's instruction set, with 16-byte loads of images and nothing
    spilled to local memory.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 12
    for name, gpu, vectors, unspilled in lines:
        assert unspilled == "True", (name, gpu)
        if name not in ("statistics", "group_gradients"):  # a few numbers per channel
            assert vectors == "True", (name, gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["plain", "relu", "residual"])
@pytest.mark.parametrize(("channels", "side"), [(64, 112), (256, 56), (2048, 7)])
def test_kernel_equals_twin_at_the_shapes_of_resnet50(channels: int, side: int, how: str) -> None:
    if DEVICE.type != "cuda":
        pytest.skip("needs an NVIDIA GPU")
    norm, twin = pair(channels, relu=how != "plain")
    groups = [Group("main", 64, 0, 1)] + [Group("aux", 16, i, 2) for i in range(2)]
    norm.shared.groups = twin.shared.groups = tuple(groups)
    x, residual = (images(96, channels, side, side, torch.float16, mean=1) for _ in range(2))
    compare(norm, twin, x, residual if how == "residual" else None, 4e-3)
