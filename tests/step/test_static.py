"""What capture needs, seen from a CPU: no host sync, no new buffers, no layout copies.

Also how many operators a step runs beside its network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fap.distributed import ONE_RANK
from fap.nets.dual import norms
from fap.step.half import Amp
from fap.step.passes import Pass
from fap.step.step import Step
from tests.step.made_steps import CLASSES, COPYING, IMAGENET, STEPS, feed, make

MIXED = {"mix": "either", "mix_per": "row", "mix_on": "both"}
every_step = pytest.mark.parametrize(("task", "variant"), STEPS)


# ---------------------------------------------------------------------- host syncs and buffers


class NoHostSync(TorchDispatchMode):
    """Fails on operators that hand a device value to Python.

    Also on those whose output has a shape that depends on values: they do the same inside.
    """

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "unique",
        "_unique2",
        "allclose",
    )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{func} would wait for the device"
        if name == "index":
            given = [index for index in args[1] if index is not None]
            assert all(index.dtype != torch.bool for index in given), "boolean indexing"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "bad", [lambda t: t.item(), lambda t: bool(t), lambda t: t[None][t[None] > 0]]
)
def test_the_watch_for_host_syncs_sees_them(bad: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError), NoHostSync():
        bad(torch.ones(()))


@pytest.mark.parametrize(
    ("task", "variant", "mix"),
    [
        *((*step, None) for step in STEPS),
        ("classification", "fused", {"mix": "mixup"}),
        ("classification", "pipelined", {"mix": "cutmix"}),
        ("classification", "pipelined", MIXED),
        ("classification", "decoupled", MIXED),
        ("classification", "advprop", MIXED),
    ],
)
def test_the_step_never_asks_the_device_for_a_value(
    task: str, variant: str, mix: dict[str, Any] | None
) -> None:
    step = make(variant, task=task, amp="bf16", data=mix)
    with NoHostSync():
        step()
    assert step.metrics.take(ONE_RANK)["steps"] == 1


def test_class_weights_are_looked_up_on_the_device() -> None:
    weights = [1.0 + label for label in range(CLASSES)]
    step = make("pipelined", amp="bf16", data=MIXED, optim={"class_weights": weights})
    with NoHostSync():
        step()
    assert step.metrics.take(ONE_RANK)["steps"] == 1


@pytest.mark.parametrize(
    ("variant", "aux"),
    [
        ("vanilla", "auto"),
        ("fused", "auto"),
        ("fused", "none"),
        ("pipelined", "auto"),
        ("decoupled", "auto"),
    ],
)
@pytest.mark.parametrize("model", ["timm/test_convnext", "timm/test_nfnet"])
def test_neither_does_that_of_a_model_with_other_norms_or_none(
    model: str, variant: str, aux: str
) -> None:
    step = make(variant, amp="bf16", model=model, size=32, method={"aux": aux})
    before = {name: tensor.data_ptr() for name, tensor in step.state().items()}
    with NoHostSync():
        step()
    assert step.metrics.take(ONE_RANK)["steps"] == 1
    assert {name: tensor.data_ptr() for name, tensor in step.state().items()} == before


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("model", ["cifar_resnet8", "timm/test_nfnet", "timm/test_efficientnet"])
def test_a_step_with_a_stem_of_another_kind_asks_for_no_value_either(model: str, amp: Amp) -> None:
    """The first one tied, then one that computes rows apart, then one that pads as TensorFlow."""
    step = make("fused", model=model, amp=amp, size=32, data=IMAGENET)
    assert step.network.stem is not None
    step.network.stem.direct = model != "cifar_resnet8"
    with NoHostSync():
        step()
    assert step.metrics.take(ONE_RANK)["steps"] == 1


@pytest.mark.parametrize("variant", ["sequential", "fused", "pipelined", "parallel"])
def test_a_tied_stem_gives_the_step_of_a_direct_one(variant: str) -> None:
    direct = make(variant)
    tied = make(variant)
    for step in (direct, tied):
        assert step.network.stem is not None
        assert step.network.stem.direct
    assert tied.network.stem is not None
    tied.network.stem.direct = False
    for seed in range(3):
        for step in (direct, tied):
            feed(step, seed)
            step()
    for name, value in tied.state().items():
        assert torch.equal(value, direct.state()[name]), name


@every_step
def test_every_tensor_of_the_state_and_input_stays_where_it_is(task: str, variant: str) -> None:
    step = make(variant, task=task)

    def pointers() -> dict[str, int]:
        tensors = step.state()
        for name, value in vars(step.inputs).items():
            if isinstance(value, Tensor):
                tensors[f"inputs.{name}"] = value
        for name, parameter in step.network.model.named_parameters():
            assert parameter.grad is not None
            tensors[f"grad.{name}"] = parameter.grad
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}

    before = pointers()
    for seed in range(3):
        feed(step, seed)
        step()
    assert pointers() == before


# ---------------------------------------------------------------------- layouts


def assert_channels_last(images: Tensor, where: str) -> None:
    assert images.is_contiguous(memory_format=torch.channels_last), (
        f"{where}: {tuple(images.shape)} strides {images.stride()}"
    )


class ConvolutionBackwards(TorchDispatchMode):
    """Checks what every convolution's backward gets and gives; says what it looked at.

    `rows_apart`: gradients of outputs may be slices of longer rows. A detector's levels are, as one
    tensor holds all of them; packing them is a copy, but no transposition.
    """

    def __init__(self, *, rows_apart: bool) -> None:
        super().__init__()
        self.rows_apart = rows_apart
        self.seen: list[str] = []

    def look(self, images: Tensor | None, where: str) -> None:
        # With one channel or one row of pixels both layouts are the same.
        if images is not None and images.shape[1] > 1 and images.shape[2] > 1:
            self.seen.append(where)
            assert_channels_last(images, where)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "convolution_backward":
            rows = slice(1) if self.rows_apart else slice(None)
            self.look(args[0][rows], "gradient of a convolution's output")
            self.look(args[1], "input of a convolution's backward")
            self.look(out[0], "gradient of a convolution's input")
        return out


@every_step
def test_every_convolution_sees_channels_last_forward_and_backward(task: str, variant: str) -> None:
    step = make(variant, task=task)
    watch = ConvolutionBackwards(rows_apart=task == "detection")
    all_norms = norms(step.network.model)

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        watch.look(args[0], f"input of {module}")
        watch.look(output, f"output of {module}")

    for module in step.network.model.modules():
        if isinstance(module, nn.Conv2d) or module in all_norms:
            module.register_forward_hook(look)
        if isinstance(module, nn.Conv2d):
            watch.look(module.weight, f"weight of {module}")

    with watch:
        step()
    assert len([where for where in watch.seen if where.startswith("gradient")]) >= 9
    for name, parameter in step.network.model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), name


@every_step
def test_rows_are_put_together_without_changing_their_layout(task: str, variant: str) -> None:
    """Five-dimensional `cat` and `flatten` of channels_last rows would transpose them.

    Every later kernel would pay for it.
    """
    mixes = task == "classification" and variant not in COPYING
    step = make(variant, task=task, data={"mix": "mixup"} if mixes else {})
    n_seen = 0
    normalise = step.network.normalise

    def watched(images_255: Tensor, out: Tensor) -> None:
        nonlocal n_seen
        n_seen += 1
        assert_channels_last(images_255, "images")
        normalise(images_255, out)

    step.network.normalise = watched  # type: ignore[method-assign]
    if step.attack is not None:
        advance = step.attack.advance

        def watched_advance(
            current: Tensor,
            clean: Tensor,
            gradient: Tensor | None,
            keys: Tensor,
            pictures: Tensor | None,
        ) -> Tensor:
            assert gradient is not None
            assert_channels_last(gradient, "gradient of the attack")
            return advance(current, clean, gradient, keys, pictures)

        step.attack.advance = watched_advance  # type: ignore[method-assign]
    for _ in range(2):  # `pipelined` joins a carry from the second step on
        step()
    assert n_seen


@pytest.mark.slow
@pytest.mark.parametrize("stem", [True, False])
@every_step
def test_a_step_can_be_watched_by_hooks_on_the_model_s_input(
    task: str, variant: str, stem: bool
) -> None:
    """FlopCounterMode's hooks refuse a leaf as input while torch.autograd.grad runs.

    It has counted every pass here.
    """
    from torch.utils.flop_counter import FlopCounterMode

    step = make(variant, task=task)
    if not stem:
        assert step.network.stem is not None
        step.network.stem = None
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() > 0


# ---------------------------------------------------------------------- how many operators


class Operators(TorchDispatchMode):
    """Counts operators that compute or copy, which on a GPU is at least a kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not is_view(func):
            self.n += 1
        return func(*args, **(kwargs or {}))


def is_view(func: Any) -> bool:
    """Does an operator return nothing but other names for what it is given?"""
    returns = func._schema.returns
    aliases = [found.alias_info for found in returns if found.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def n_operators(call: Callable[..., Any], *args: Any) -> int:
    with Operators() as operators:
        call(*args)
    return operators.n


def forward_and_backward(step: Step, one: Pass) -> None:
    """The part of a pass that no step can do without."""
    x = torch.zeros_like(step.pass_input[0])[:1].expand(one.n_rows, -1, -1, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    if one.crafting is None:
        loss = step.network(x, one.groups).sum()
        torch.autograd.grad(loss, step.network.leaves, allow_unused=True)
        return
    with step.network.probing(x, one.crafting.rows) as (x_in, probe):
        loss = step.network(x_in, one.groups).sum()
        torch.autograd.grad(loss, [*step.network.leaves, probe], allow_unused=True)


def n_beside_the_network(
    variant: str, model: str, amp: Amp, optim: dict[str, Any] | None = None
) -> int:
    """Operators of a step that are not its passes' forwards and backwards."""
    step = make(variant, amp=amp, model=model, optim=optim)
    n_whole = n_operators(step)
    n_network = sum(n_operators(forward_and_backward, step, one) for one in step.passes)
    return n_whole - n_network


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("variant", ["vanilla", "sequential", "fused", "pipelined", "parallel"])
def test_a_step_runs_no_operator_per_parameter(variant: str, amp: Amp) -> None:
    """Beside its network it runs as many for a deep one as for a shallow one.

    Gradients, casts, the optimiser and the statistics of a skipped step are of flat buffers.
    """
    shallow = n_beside_the_network(variant, "cifar_resnet8", amp)
    deep = n_beside_the_network(variant, "cifar_resnet20", amp)
    assert 0 < shallow == deep
