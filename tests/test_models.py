"""Models by name: conversion changes nothing in evaluation, export gives the plain model back, the stem's gradients."""

from __future__ import annotations

import copy
import os
import random

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from fap import models
from fap.models import CifarResNet, StemConv2d, build, load_plain, plain, stem_of
from fap.norm import Group, convert, evaluate_with, export, norms, set_groups


@pytest.fixture(autouse=True)
def seed() -> int:
    value = int(os.environ.get("SEED") or random.SystemRandom().randrange(2**31))
    print(f"SEED={value}")  # shown when the test fails
    torch.manual_seed(value)
    return value


def randomise_norms(model: nn.Module) -> None:
    """Affine parameters and running statistics as after some training, so that mixing them up shows."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for value, low, high in (
                (m.weight, 0.5, 1.5),
                (m.bias, -0.3, 0.3),
                (m.running_mean, -0.3, 0.3),
                (m.running_var, 0.7, 1.5),
            ):
                nn.init.uniform_(value, low, high)


def fresh(name: str) -> nn.Module:
    """The model as its own library makes it; names with a slash are timm's."""
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"), num_classes=10)
    return torchvision.models.get_model(name, num_classes=10)


SLOW = ("resnet50", "densenet121", "efficientnet_b0", "timm/resnet50d", "timm/efficientnet_b0")
NAMED = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in ("resnet18", "mobilenet_v3_large", "timm/regnety_002", *SLOW)
]


@pytest.mark.parametrize("name", NAMED)
def test_conversion_and_export(name: str) -> None:
    """Eval outputs are equal before and after `convert`; after training-like changes the export loads strictly."""
    before = fresh(name).eval()
    randomise_norms(before)
    model = convert(copy.deepcopy(before))
    bns = [m for m in before.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms(model)) == len(bns) > 0
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = before(x)
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)
        with evaluate_with(model, "aux"):  # a copy so far
            torch.testing.assert_close(model(x), want, rtol=0, atol=0)
        for norm in norms(model):
            assert norm.aux is not None
            randomise_norms(norm.aux)
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)
        with evaluate_with(model, "aux"):
            aux_out = model(x)
            assert (aux_out - want).abs().max() > 1e-3

    randomise_norms(model)
    other = fresh(name).eval()
    other.load_state_dict(export(model.state_dict(), steps=3), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
        # `load_plain` is the way back: both sides of every norm get the plain values.
        again = convert(fresh(name)).eval()
        load_plain(again, other.state_dict())
        torch.testing.assert_close(again(x), other(x), rtol=0, atol=0)
        with evaluate_with(again, "aux"):
            torch.testing.assert_close(again(x), other(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMED)
def test_training_forward_in_groups(name: str) -> None:
    """Every group's logits are those of the plain model on that group alone, in train mode (dropout off)."""
    before = fresh(name).double()
    for m in before.modules():
        if isinstance(m, nn.Dropout | nn.Dropout2d | torchvision.ops.StochasticDepth | timm.layers.DropPath):
            m.eval()
            m.train = lambda mode=True, m=m: m  # type: ignore[method-assign,misc]
    model = convert(copy.deepcopy(before)).double()
    model.load_state_dict({k: before.state_dict()[k.replace(".aux.", ".")] for k in model.state_dict()})
    x = torch.randn(10, 3, 64, 64).double()
    groups = [Group("main", 4, 0, 1), Group("aux", 3, 0, 2), Group("aux", 3, 1, 2)]
    with torch.no_grad():
        set_groups(model, groups)
        out = model(x)
        want = torch.cat([copy.deepcopy(before).train()(part) for part in x.split([4, 3, 3])])
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["resnet18", "timm/regnety_002", "cifar_resnet8", "cifar_resnet18"])
def test_build(name: str) -> None:
    model = build(name, 7, size=32)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert isinstance(stem_of(model), StemConv2d)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)
    # A reader of the checkpoint sees the plain names, whatever class the stem has.
    plain(name, 7).load_state_dict(export(model.state_dict()), strict=True)


def test_build_without_auxiliary_norms() -> None:
    model = build("cifar_resnet8", 7, aux=False, size=16)
    assert set(model.state_dict()) == set(CifarResNet(8, 7).state_dict())


def test_names_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="resnet51"):
        plain("resnet51", 10)
    with pytest.raises(ValueError, match="6n"):
        plain("cifar_resnet9", 10)


def test_timm_prefix_picks_timm() -> None:
    assert type(plain("resnet18", 3)).__module__.startswith("torchvision")
    assert type(plain("timm/resnet18", 3)).__module__.startswith("timm")


def test_an_image_size_that_the_model_refuses() -> None:
    with pytest.raises(ValueError, match=r"data.size = 8"):
        build("inception_v3", 10, size=8)


def test_plain_weights_that_do_not_fit() -> None:
    model = convert(CifarResNet(8, 10))
    state = CifarResNet(8, 10).state_dict()
    for broken, word in (
        ({k: v for k, v in state.items() if k != "fc.bias"}, 'Missing key.*"fc.bias"'),
        (state | {"head.weight": torch.zeros(1)}, 'Unexpected key.*"head.weight"'),
        (CifarResNet(8, 3).state_dict(), "size mismatch for fc.weight"),
    ):
        with pytest.raises(ValueError, match=f"model.init does not fit(.|\n)*{word}"):
            load_plain(model, broken)


CONVOLUTIONS: list[dict[str, object]] = [
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": 7, "stride": 2, "padding": 3, "bias": True},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": 2, "bias": True},
    {"kernel_size": 3, "groups": 3, "bias": False},
]


def stem_net(conv: nn.Conv2d) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU())


@pytest.mark.parametrize("kwargs", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("rows", [(0, 4), (3, 7), (5, 9), (0, 9)])
def test_stem_gradients_equal_autograd(kwargs: dict[str, object], rows: tuple[int, int]) -> None:
    """Output, weight and bias gradients over all rows, data gradient of the probed rows; twin: plain autograd."""
    first, stop = rows
    model = stem_net(nn.Conv2d(3, 6, **kwargs)).double()  # type: ignore[arg-type]
    twin = copy.deepcopy(model)[0]
    models._install_stem(model.float(), 12)
    model.double().to(memory_format=torch.channels_last)
    stem = stem_of(model)
    assert stem is not None
    stem.load_state_dict(twin.state_dict())
    x = torch.randn(9, 3, 12, 12).double()
    whole = x.clone().requires_grad_()
    want = twin(whole)
    gy = torch.randn_like(want)
    want.backward(gy)

    static = x.clone(memory_format=torch.channels_last)
    stem.probe, stem.first = static[first:stop].detach().requires_grad_(), first
    out = stem(static)
    out.backward(gy)
    stem.probe, probe = None, stem.probe
    assert probe.grad is not None
    assert whole.grad is not None
    assert probe.grad.shape == probe.shape
    for fast, slow in (
        (out.detach(), want.detach()),
        (probe.grad, whole.grad[first:stop]),
        *((a.grad, b.grad) for a, b in zip(stem.parameters(), twin.parameters(), strict=True)),
    ):
        torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-12)
    stem.zero_grad()
    stem(static).backward(gy)  # without a probe, and in evaluation, it is a plain convolution
    torch.testing.assert_close(stem.weight.grad, twin.weight.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("full_precision", [False, True])
def test_stem_under_autocast(dtype: torch.dtype, full_precision: bool) -> None:
    model = stem_net(nn.Conv2d(3, 6, 3, padding=1, bias=True))
    models._install_stem(model, 12)
    stem = stem_of(model)
    assert stem is not None
    stem.full_precision = full_precision
    x = torch.randn(4, 3, 12, 12)
    whole = x.clone().requires_grad_()
    want = nn.functional.conv2d(whole, stem.weight, stem.bias, padding=1)
    gy = torch.randn_like(want).to(dtype)
    gw, gx = torch.autograd.grad(want, (stem.weight, whole), gy.float())
    stem.probe, stem.first = x[1:3].detach().requires_grad_(), 1
    with torch.autocast("cpu", dtype):
        out = stem(x)
    assert out.dtype == dtype
    out.backward(gy)
    assert stem.probe.grad is not None
    assert stem.weight.grad is not None
    assert stem.probe.grad.dtype == stem.weight.grad.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    for fast, slow, factor in ((out, want, 4), (stem.probe.grad, gx[1:3], 4), (stem.weight.grad, gw, 4)):
        assert (fast.float() - slow).abs().max() <= factor * eps * slow.abs().max()
    if full_precision:  # only the result is rounded
        assert torch.equal(out, nn.functional.conv2d(x, stem.weight, stem.bias, padding=1).to(dtype))
        torch.testing.assert_close(stem.weight.grad, gw, rtol=1e-4, atol=1e-4)


class Twice(nn.Module):
    """Two modules read the image: a stem's gradient would be half of the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x) + self.b(x))


class Scaled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


class Residual(nn.Module):
    """The image also reaches the output past the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x


@pytest.mark.parametrize(
    "model",
    [
        Twice(),
        Scaled(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
        Residual(),
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
        stem_net(nn.Conv2d(3, 6, 3, padding="same")),
        stem_net(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")),
    ],
    ids=["two readers", "not first", "image bypasses it", "norm first", "string padding", "reflect padding"],
)
def test_no_stem_where_its_gradient_would_be_wrong(model: nn.Module) -> None:
    models._install_stem(model, 12)
    assert stem_of(model) is None
