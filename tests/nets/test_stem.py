"""The stem's gradients against autograd, and where there is no stem."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fap.nets.stem import install_stem, stem_of

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
    """Output, weight and bias gradients over all rows, data gradient of the probed rows."""
    first, stop = rows
    model = stem_net(nn.Conv2d(3, 6, **kwargs)).double()  # type: ignore[arg-type]
    twin = copy.deepcopy(model)[0]
    install_stem(model.float(), 12)
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
    probe = static[first:stop].detach().requires_grad_()
    stem.probe = probe
    stem.first = first
    out = stem(static)
    out.backward(gy)
    assert probe.grad is not None
    assert whole.grad is not None
    assert probe.grad.shape == probe.shape
    for fast, slow in (
        (out.detach(), want.detach()),
        (probe.grad, whole.grad[first:stop]),
        *((a.grad, b.grad) for a, b in zip(stem.parameters(), twin.parameters(), strict=True)),
    ):
        torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-12)

    stem.probe = None  # then it is a plain convolution
    stem.zero_grad()
    stem(static).backward(gy)
    torch.testing.assert_close(stem.weight.grad, twin.weight.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("full_precision", [False, True])
def test_stem_under_autocast(dtype: torch.dtype, full_precision: bool) -> None:
    model = stem_net(nn.Conv2d(3, 6, 3, padding=1, bias=True))
    install_stem(model, 12)
    stem = stem_of(model)
    assert stem is not None
    stem.full_precision = full_precision
    x = torch.randn(4, 3, 12, 12)
    whole = x.clone().requires_grad_()
    want = nn.functional.conv2d(whole, stem.weight, stem.bias, padding=1)
    gy = torch.randn_like(want).to(dtype)
    gw, gx = torch.autograd.grad(want, (stem.weight, whole), gy.float())
    stem.probe = x[1:3].detach().requires_grad_()
    stem.first = 1
    with torch.autocast("cpu", dtype):
        out = stem(x)
    assert out.dtype == dtype
    out.backward(gy)
    assert stem.probe.grad is not None
    assert stem.weight.grad is not None
    assert stem.probe.grad.dtype == stem.weight.grad.dtype == torch.float32
    bound = 4 * torch.finfo(dtype).eps
    for fast, slow in ((out, want), (stem.probe.grad, gx[1:3]), (stem.weight.grad, gw)):
        assert (fast.float() - slow).abs().max() <= bound * slow.abs().max()
    if full_precision:  # only the result is rounded
        exact = nn.functional.conv2d(x, stem.weight, stem.bias, padding=1)
        assert torch.equal(out, exact.to(dtype))
        torch.testing.assert_close(stem.weight.grad, gw, rtol=1e-4, atol=1e-4)


class Twice(nn.Module):
    """Two modules read the image: a stem's gradient would be half of the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x) + self.b(x))


class Scaled(nn.Sequential):
    """The convolution reads twice the image: its data gradient is half of the image's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


class Residual(nn.Module):
    """The image also reaches the output past the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x


NO_STEM = {
    "two readers": Twice(),
    "not first": Scaled(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
    "image bypasses it": Residual(),
    "norm first": nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
    "string padding": stem_net(nn.Conv2d(3, 6, 3, padding="same")),
    "reflect padding": stem_net(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")),
}


@pytest.mark.parametrize("model", NO_STEM.values(), ids=NO_STEM)
def test_no_stem_where_its_gradient_would_be_wrong(model: nn.Module) -> None:
    install_stem(model, 12)
    assert stem_of(model) is None
