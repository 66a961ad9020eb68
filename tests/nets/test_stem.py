"""The stem's gradients against autograd, and where there is no stem."""

from __future__ import annotations

import copy
import random

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, SpaceToDepth
from torch import Tensor, nn

from fap.nets.stem import Stem, StemConv2d, StemLayer, install_stem, stem_of
from fap.nets.strided import mend_strided

SIZE = 12
BATCH = 9
ROWS = [(0, 4), (3, 7), (5, 9), (0, 9)]
"""First and last + 1 of those whose gradient is asked for."""


class Twice(nn.Module):
    """Two layers read the image, as in RepVGG's first block."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 1, stride=2)
        self.b = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Scaled(nn.Sequential):
    """The convolution reads twice the image: its data gradient is half of the image's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


class Residual(nn.Module):
    """The image also reaches the output past the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), x.sin()], 1)


class TwoScales(nn.Module):
    """One patch embedding for the image, one for a smaller image: CrossViT's."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 6, 3, stride=3)
        self.coarse = nn.Conv2d(3, 6, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        side = 2 * x.shape[2] // 3
        small = nn.functional.interpolate(x, size=(side, side), mode="bicubic")
        return self.fine(x) + self.coarse(small)


class Pyramid(nn.Module):
    """One convolution reads the image and its half."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        half = self.conv(nn.functional.avg_pool2d(x, 2))
        return nn.functional.avg_pool2d(self.conv(x), 2) + half


class Patches(nn.Module):
    """Patches as rows of a matrix, then a linear layer: NaFlexViT's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, 6)

    def forward(self, x: Tensor) -> Tensor:
        rows, _, height, width = x.shape
        x = x.view(rows, 3, height // 4, 4, width // 4, 4).permute(0, 2, 4, 3, 5, 1)
        y = self.linear(x.flatten(1, 2).flatten(2))
        return y.transpose(1, 2).unflatten(2, (height // 4, width // 4))


PLAIN = {
    "3x3": nn.Conv2d(3, 6, 3, padding=1, bias=False),
    "7x7": nn.Conv2d(3, 6, 7, stride=2, padding=3),
    "uneven": nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=2),
    "depthwise": nn.Conv2d(3, 6, 3, groups=3, bias=False),
}
CONVOLUTIONS = PLAIN | {
    "patches": nn.Conv2d(3, 6, 4, stride=4),
    "valid": nn.Conv2d(3, 6, 3, padding="valid", stride=2),
    "same": nn.Conv2d(3, 6, 3, padding="same"),
    "same, even": nn.Conv2d(3, 6, (4, 3), padding="same", dilation=(1, 2)),
    "TensorFlow's same": Conv2dSame(3, 6, 3, stride=2, bias=False),
    "TensorFlow's same, uneven": Conv2dSame(3, 6, (5, 2), stride=(3, 2), dilation=(1, 2)),
    "1x1 with a stride": nn.Conv2d(3, 6, 1, stride=2),
    "1x1 with uneven strides": nn.Conv2d(3, 6, 1, stride=(1, 5), padding="valid"),
}
LAYERS = {
    "reflect": nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
    "standardised": ScaledStdConv2d(3, 6, 3, stride=2),
    "standardised, same": ScaledStdConv2dSame(3, 6, 3, stride=2),
}
DIRECT = CONVOLUTIONS | LAYERS | {"two readers": Twice()}
TIED = {
    "scaled": Scaled(nn.Conv2d(3, 6, 3)),
    "bypassed": Residual(),
    "padded": nn.Sequential(nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(3, 6, 4, stride=3)),
    "space to depth": nn.Sequential(SpaceToDepth(4), nn.Conv2d(48, 6, 3, padding=1)),
    "norm without parameters": nn.Sequential(nn.InstanceNorm2d(3), nn.Conv2d(3, 6, 3)),
    "two scales": TwoScales(),
    "pyramid": Pyramid(),
    "linear": Patches(),
    "standardised": Scaled(ScaledStdConv2d(3, 6, 3)),
}
STEMS = DIRECT | {f"tied: {name}": first for name, first in TIED.items()}


def with_tail(first: nn.Module) -> nn.Module:
    """More of a network, whose batch norm mixes the rows."""
    return nn.Sequential(copy.deepcopy(first), nn.BatchNorm2d(6), nn.ReLU())


def installed(model: nn.Module, size: int = SIZE) -> Stem:
    install_stem(model, size)
    mend_strided(model)
    model.to(memory_format=torch.channels_last)
    stem = stem_of(model)
    assert stem is not None
    return stem


def fresh_images(size: int) -> Tensor:
    x = torch.randn(BATCH, 3, size, size, dtype=torch.float64)
    return x.to(memory_format=torch.channels_last)


def assert_gradients_equal_autograd(
    model: nn.Module, twin: nn.Module, stem: Stem, size: int, rows: slice
) -> None:
    """Outputs, all parameters' gradients, the probed rows' gradient; and without a probe."""
    x = fresh_images(size)
    whole = x.clone().requires_grad_()
    dropout = random.randrange(2**31)
    torch.manual_seed(dropout)
    want = twin(whole)
    gy = torch.randn_like(want)
    parameters = [*twin.parameters()]
    *gradients, gx = torch.autograd.grad(want, [*parameters, whole], gy, allow_unused=True)
    expected = [want.detach(), *(g for g in gradients if g is not None)]

    def differentiate(given: Tensor, *leaf: Tensor) -> list[Tensor]:
        torch.manual_seed(dropout)
        out = model(given)
        leaves = [*model.parameters(), *leaf]
        found = torch.autograd.grad(out, leaves, gy, allow_unused=True)
        return [out.detach(), *(g for g in found if g is not None)]

    with stem.probing(x, rows) as (x_in, probe):
        *found, g_probe = differentiate(x_in, probe)
    assert g_probe.shape == probe.shape == x[rows].shape
    close = {"rtol": 1e-10, "atol": 1e-11}
    for fast, slow in zip([*found, g_probe], [*expected, gx[rows]], strict=True):
        torch.testing.assert_close(fast, slow, **close)
    for fast, slow in zip(differentiate(x), expected, strict=True):  # a plain model
        torch.testing.assert_close(fast, slow, **close)
    # Of an attack that differentiates nothing but images.
    leaf = x.clone().requires_grad_()
    torch.manual_seed(dropout)
    torch.testing.assert_close(torch.autograd.grad(model(leaf), leaf, gy)[0], gx, **close)
    twin.load_state_dict(model.state_dict())  # as many forwards for the running statistics
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), twin.eval()(x), **close)


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [SIZE, 16])
def test_stem_gradients_equal_autograd(name: str, rows: tuple[int, int], size: int) -> None:
    model = with_tail(STEMS[name])
    twin = copy.deepcopy(model).double()
    stem = installed(model, size)
    assert stem.direct is (name in DIRECT)
    kinds = {type(module) for module in model.modules() if isinstance(module, StemConv2d)}
    assert bool(kinds) is (
        name not in LAYERS and name not in ("tied: linear", "tied: standardised")
    )
    model.double()
    assert_gradients_equal_autograd(model, twin, stem, size, slice(*rows))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_no_gradient_of_other_rows_is_computed(name: str, rows: tuple[int, int]) -> None:
    """Every data gradient that a convolution computes is of as many rows as are probed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    computed: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "convolution_backward" and out[0] is not None:
                computed.append(len(out[0]))
            return out

    model = with_tail(CONVOLUTIONS[name])
    stem = installed(model)
    with Watch(), stem.probing(torch.randn(BATCH, 3, SIZE, SIZE), slice(*rows)) as (x, probe):
        gradient = torch.autograd.grad(model(x).sum(), [*model.parameters(), probe])[-1]
    assert computed == [rows[1] - rows[0]]
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", TIED)
def test_a_tied_stem_gives_gradients_that_are_channels_last(name: str) -> None:
    model = with_tail(TIED[name])
    stem = installed(model)
    x = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    with stem.probing(x, slice(2, 5)) as (x_in, probe):
        (gradient,) = torch.autograd.grad(model(x_in).sum(), probe)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("full_precision", [False, True])
@pytest.mark.parametrize("name", [*DIRECT, "tied: padded", "tied: linear"])
def test_stem_under_autocast(name: str, dtype: torch.dtype, full_precision: bool) -> None:
    first = copy.deepcopy(STEMS[name])
    twin = copy.deepcopy(first)
    model = nn.Sequential(first)
    stem = installed(model)
    stem.full_precision = full_precision
    x = torch.randn(4, 3, SIZE, SIZE)
    whole = x.clone().requires_grad_()
    want = twin(whole)
    gy = torch.randn_like(want).to(dtype)
    *gw, gx = torch.autograd.grad(want, [*twin.parameters(), whole], gy.float())
    with stem.probing(x, slice(1, 3)) as (x_in, probe), torch.autocast("cpu", dtype):
        out = model(x_in)
        assert out.dtype == dtype
    *found, g_probe = torch.autograd.grad(out, [*model.parameters(), probe], gy)
    bound = 4 * torch.finfo(dtype).eps
    for fast, slow in zip([out, g_probe, *found], [want, gx[1:3], *gw], strict=True):
        assert (fast.float() - slow).abs().max() <= bound * slow.abs().max()
    assert all(g.dtype == torch.float32 for g in (g_probe, *found))
    if full_precision and not isinstance(first, Twice):  # only the result is rounded
        exact = copy.deepcopy(twin).to(memory_format=torch.channels_last)
        assert (out.float() - exact(x)).abs().max() <= torch.finfo(dtype).eps * want.abs().max()
        for fast, slow in zip(found, gw, strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


class ScaledByParameter(nn.Module):
    """Left out rows would be missing in the gradient of `scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x * self.scale)


class Centred(nn.Module):
    """Every row of what is read depends on all rows of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x - x.mean(0))


class Folded(nn.Module):
    """What is read has other rows than the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.flatten(0, 1)[:, None])
        return y.view(len(x), 6, *y.shape[2:])


class Again(nn.Module):
    """The same convolution reads the image and then its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.conv(x))
        return torch.cat([y, y], 1)


NO_STEM = {
    "parameter first": ScaledByParameter(),
    "rows mixed": Centred(),
    "other rows": Folded(),
    "reads twice": Again(),
    "norm first": nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 1)),
    "norm without parameters first": nn.Sequential(
        nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 6, 1)
    ),
    "no layer": nn.Sequential(nn.Flatten(), nn.LayerNorm(3 * SIZE * SIZE)),
}


@pytest.mark.parametrize("model", NO_STEM.values(), ids=NO_STEM)
def test_no_stem_where_its_gradient_would_be_wrong(model: nn.Module) -> None:
    before = [type(module) for module in model.modules()]
    install_stem(model, SIZE)
    assert stem_of(model) is None
    assert [type(module) for module in model.modules()] == before


def test_a_stem_is_copied_with_its_model() -> None:
    model = with_tail(LAYERS["standardised"])
    stem = installed(model)
    twin = copy.deepcopy(model)
    assert stem_of(twin) is not stem
    x = torch.randn(4, 3, SIZE, SIZE)
    with stem.probing(x, slice(1, 2)) as (x_in, probe):
        torch.autograd.grad(twin(x_in).sum(), [*twin.parameters()])  # knows nothing of the probe
        assert torch.autograd.grad(model(x_in).sum(), probe)[0].shape == (1, 3, SIZE, SIZE)


def test_a_model_without_a_probe_is_the_plain_one_after_an_error() -> None:
    model = with_tail(TIED["padded"])
    stem = installed(model)
    x = torch.randn(4, 3, SIZE, SIZE)
    with pytest.raises(RuntimeError, match="full"), stem.probing(x, slice(1, 2)):
        raise RuntimeError("full")
    assert not hasattr(stem.rows, "start")
    assert len(torch.autograd.grad(model(x).sum(), [*model.parameters()])) == 4


FAMILIES = {
    "tf_efficientnet_b0": (StemConv2d, True, 1),
    "vit_tiny_patch16_224": (StemConv2d, True, 1),
    "repvgg_a0": (StemConv2d, True, 2),
    "davit_tiny": (StemConv2d, False, 1),
    "nf_regnet_b0": (StemLayer, True, 1),
    "tresnet_m": (StemConv2d, False, 1),
}
"""Names of timm: kind of the layers that read the image, whether they read the very image, how
many they are."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_stems_of_known_families(name: str) -> None:
    """Float64, small images; dropout and the like draw equal numbers."""
    kind, direct, n = FAMILIES[name]
    size = 64
    options = {"img_size": size} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=5, **options)
    twin = copy.deepcopy(model).double()
    stem = installed(model, size)
    assert stem.direct is direct
    assert sum(isinstance(module, kind) for module in model.modules()) == n
    model.double()
    assert_gradients_equal_autograd(model, twin, stem, size, slice(4, 7))
