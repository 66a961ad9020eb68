"""One half-precision copy of the weights per step, and gradients that are added as one.

Bit-equal to autocast's casts and to autograd's `.grad`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fap.nets.build import build
from fap.step.flat import Flat, GradientSum
from fap.step.half import Amp, HalfWeights, castable
from fap.step.step import Step
from tests.step.made_steps import IMAGENET, VARIANTS, feed, make


class SlowSum:
    """The twin of GradientSum: one addition per parameter, each gradient cast on its own."""

    def __init__(self, flat: Flat, total: Tensor) -> None:
        self.total = total
        self.views = list(flat.named(total).values())

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for view, gradient in zip(self.views, gradients, strict=True):
            if gradient is not None:
                view.add_(gradient.to(view.dtype))


def autocast_twin(step: Step) -> Step:
    """The same step with the weights cast by autocast, in every pass anew."""
    step.network.half = None
    streams: Any = step.streams
    streams.gradients = SlowSum(step.network.flat, streams.gradients.total)
    if streams.clean_gradients is not None:
        streams.clean_gradients = SlowSum(step.network.flat, streams.clean_gradients.total)
    return step


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_equals_the_autocast_twin_bit_for_bit(variant: str, amp: Amp, seed: int) -> None:
    fast = make(variant, amp=amp)
    slow = autocast_twin(make(variant, amp=amp))
    for k in range(3):
        for step in (fast, slow):
            feed(step, seed + k)
            step()
    expected = slow.state()
    for name, value in fast.state().items():
        assert torch.equal(value, expected[name]), name


# ---------------------------------------------------------------------- casts


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.n: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.look(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def look(self, name: str, args: tuple) -> None:
        self.n[name] += 1


class NoCasts(Calls):
    """Fails on copies of anything that has a shape of a weight."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def look(self, name: str, args: tuple) -> None:
        super().look(name, args)
        if name in ("_to_copy", "copy_") and isinstance(args[0], Tensor):
            shape = tuple(args[0].shape)
            assert shape not in self.shapes, f"{name} of a weight of shape {shape}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_weight_is_cast_in_a_pass_and_its_gradients_are_added_as_one(variant: str) -> None:
    step = make(variant, amp="bf16")
    weights = {tuple(p.shape) for p in castable(step.network.model) if p.dim() > 1}
    with NoCasts(weights) as calls:
        step()
    assert calls.n["_foreach_copy_"] == len(step.passes)  # the half-precision gradients
    assert calls.n["_foreach_add_"] == len(step.passes)  # those of the norms


def test_the_watch_sees_the_casts_of_the_twin() -> None:
    """The test above can fail: autocast casts every weight in every pass."""
    slow = autocast_twin(make("fused", amp="bf16"))
    fast = make("fused", amp="bf16")
    with Calls() as calls_of_twin:
        slow()
    with Calls() as calls:
        fast()
    n_weights = len(castable(fast.network.model))
    n_passes = len(fast.passes)
    n_more = calls_of_twin.n["_to_copy"] - calls.n["_to_copy"]
    assert n_more >= 2 * n_weights * n_passes  # there, and back for the gradient


# ---------------------------------------------------------------------- in the model


def test_the_model_has_its_own_weights_back_after_a_pass_that_fails() -> None:
    step = make("fused", amp="bf16")
    model: Any = step.network.model
    before = dict(model.named_parameters())

    def fail(x: Tensor) -> Tensor:
        assert model.fc.weight.dtype == torch.bfloat16
        raise RuntimeError("full")

    step.network.forward = fail
    with pytest.raises(RuntimeError, match="full"):
        step()
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_the_copy_follows_the_weights() -> None:
    step = make("vanilla", amp="bf16")
    assert step.network.half is not None
    step()
    former = step.network.half.values.clone()
    step()  # reads what the first step has trained
    assert not torch.equal(former, step.network.half.values)
    assert all(p.dtype == torch.float32 for p in step.network.model.parameters())


def test_half_weights_are_views_of_one_buffer() -> None:
    model: Any = build("cifar_resnet8", 10, size=8)
    cast = castable(model)
    flat = Flat(model, first=cast)
    half = HalfWeights(model, flat, cast, torch.float16)
    half.refresh()
    with half.in_model():
        weight = model.fc.weight
        assert weight.dtype == torch.float16
        assert weight.untyped_storage().data_ptr() == half.values.untyped_storage().data_ptr()
        assert model.bn1.weight.dtype == torch.float32
    assert torch.equal(weight, model.fc.weight.half())


# ---------------------------------------------------------------------- which parameters


class Mixed(nn.Module):
    """Parameters that autocast casts beside some that it must not.

    Only `conv`, `head` and their biases qualify.
    """

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.standardised = self.Standardised(4, 4, 1)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1, bias=False))
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.head = nn.Linear(4, 5)
        self.embedding = nn.Embedding(5, 4)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.embedding.weight


def test_only_weights_that_nothing_reads_in_full_precision_are_copied() -> None:
    model = Mixed()
    cast = castable(model)
    names = {name for name, parameter in model.named_parameters() if parameter in cast}
    assert names == {"conv.weight", "conv.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet8", "mobilenet_v2"])
def test_all_convolutions_and_linear_layers_of_usual_models_are_copied(name: str) -> None:
    model = build(name, 10, size=32)
    expected: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            expected |= {*module.parameters()}
    assert castable(model) == expected


@pytest.mark.parametrize(("data", "copied"), [({}, True), (IMAGENET, False)])
def test_a_stem_in_full_precision_is_left_out(data: dict[str, Any], copied: bool) -> None:
    """One grey level would not survive bfloat16 with ImageNet's mean and std: see test_amp.py."""
    step = make("fused", amp="bf16", data=data)
    weight = step.network.flat.parameters["conv1.weight"]
    assert weight.dtype == torch.float32
    leaves = dict(zip(step.network.flat.parameters, step.network.leaves, strict=True))
    assert (leaves["conv1.weight"].dtype == torch.bfloat16) is copied
    assert leaves["fc.weight"].dtype == torch.bfloat16


# ---------------------------------------------------------------------- the sum


def test_gradient_sum_equals_one_addition_per_parameter() -> None:
    """Random layouts, some gradients missing, both precisions mixed, over several passes."""
    model = build("cifar_resnet8", 10, size=8)
    front = castable(model)
    flat = Flat(model, first=front)
    fast = GradientSum(flat, flat.grad, torch.bfloat16)
    slow = SlowSum(flat, torch.zeros_like(flat.grad))
    for _ in range(4):
        gradients = [any_gradient(p, p in front) for p in flat.parameters.values()]
        fast.add(gradients)
        slow.add(gradients)
    assert torch.equal(fast.total, slow.total)
    assert fast.total.any()


def any_gradient(parameter: nn.Parameter, may_be_half: bool) -> Tensor | None:
    """Random values, layout and precision; None now and then."""
    gradient = torch.randn(parameter.shape)
    if may_be_half and random.random() < 0.8:
        gradient = gradient.to(torch.bfloat16)
    if gradient.dim() == 4 and random.random() < 0.5:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
    if gradient.dim() == 2 and random.random() < 0.5:
        gradient = gradient.t().contiguous().t()
    if random.random() < 0.2:
        return None
    return gradient


def test_values_between_the_parameters_stay_zero() -> None:
    step = make("fused", amp="fp16")
    step()
    flat = step.network.flat
    outside = torch.ones(len(flat.grad), dtype=torch.bool)
    for place in flat.slices.values():
        outside[place] = False
    assert outside.any()
    assert not flat.grad[outside].any()
