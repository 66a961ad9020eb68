"""Operations on many images against torchvision's on one: every operation, every bin."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.transforms.v2 import functional

from pipelines.augment import pixels
from pipelines.augment.policies import GEOMETRIC, POLICIES, SIGNED, SPACES, Op, Policy, magnitudes
from tests.pipelines.augment.twin import BINS, SEED, TORCHVISION, magnitude_of, operate, pictures

# Blends are sums of two products, which torchvision rounds once more or once less: where the sum is
# a whole number, it may fall to the one below.
BLENDS = {Op.COLOR, Op.CONTRAST, Op.SHARPNESS}
POLICY_AND_OP = [(policy, op) for policy in POLICIES for op in SPACES[policy].ops[:]]


def assert_close(found: Tensor, wanted: Tensor, share: float, note: object = "") -> None:
    """Equal but for one grey level, on at most a share of the values."""
    difference = (found.int() - wanted.int()).abs()
    assert difference.max() <= 1, (note, SEED)
    assert (difference > 0).float().mean() <= share, (note, SEED)


def exactly_moved(
    images: Tensor,  # uint8 (n, 3, H, W)
    back: Tensor,  # (n, 6): `pixels.moved`
    mode: str,
    shift: tuple[float, float] = (0.0, 0.0),  # in pixels, of every position
) -> Tensor:
    """Float64, and not rounded."""
    height, width = images.shape[2:]
    ys, xs = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) - (height - 1) / 2,
        torch.arange(width, dtype=torch.float64) - (width - 1) / 2,
        indexing="ij",
    )
    places = torch.stack([xs, ys, torch.ones_like(xs)], 2)  # (H, W, 3)
    sources = torch.einsum("nrc,hwc->nhwr", back.double().view(-1, 2, 3), places)
    grid = (sources + torch.tensor(shift)) / torch.tensor([width / 2, height / 2])
    return grid_sample(images.double(), grid, mode=mode, align_corners=False)


def assert_moved(found: Tensor, images: Tensor, back: Tensor, mode: str, note: object) -> None:
    """The pixels of the exact positions, give or take a ten-thousandth of a pixel.

    Positions half way between two pixels are common: a shear of 0.2, a turn by 90 degrees. There
    rounding decides, and that of torchvision's product of matrices is another one on every kind of
    processor.
    """
    if mode == "bilinear":
        difference = (found - exactly_moved(images, back, mode)).abs()
        assert difference.max() <= 0.5 + 0.01, (note, SEED)
        return
    right = torch.zeros_like(found, dtype=torch.bool)
    for shift in itertools.product((-1e-4, 1e-4), repeat=2):
        right |= found == exactly_moved(images, back, mode, shift)
    assert right.all(), (note, SEED)


@pytest.mark.parametrize(("policy", "op"), POLICY_AND_OP)
def test_an_operation_is_torchvisions_at_every_bin(policy: Policy, op: Op) -> None:
    if op is Op.IDENTITY:
        return
    height, width = 37, 44
    images = pictures(5, height, width)
    mode = "bilinear" if policy == "augmix" else "nearest"
    table = magnitudes(policy, height, width)
    for bin_ in range(SPACES[policy].bins):
        for sign in (1, -1) if op in SIGNED else (1,):
            magnitude = table[op, bin_].repeat(len(images)) * sign
            parameters = pixels.parameters_of(op, magnitude, height, width)
            found = pixels.shown(op, images, parameters, mode)
            wanted = torch.stack([operate(policy, op, sign * bin_, image) for image in images])
            if op in GEOMETRIC:
                for result in (found, wanted):
                    assert_moved(result, images, parameters, mode, (bin_, sign))
            else:
                assert_close(found, wanted, 0.2 if op in BLENDS else 0.0, (bin_, sign))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_ranges_are_torchvisions(policy: Policy) -> None:
    space = SPACES[policy]
    assert space.bins == BINS[policy]
    theirs = TORCHVISION[policy]._AUGMENTATION_SPACE  # type: ignore[attr-defined]
    assert len(space.ops) == len(theirs)
    for height, width in ((32, 32), (224, 224), (331, 97)):
        table = magnitudes(policy, height, width)
        for op in space.ops:
            for bin_ in range(space.bins):
                wanted = magnitude_of(policy, op, bin_, height, width)
                if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
                    wanted = int(wanted)
                assert table[op, bin_].item() == wanted, (op, bin_, height)


@pytest.mark.parametrize(
    ("ours", "theirs", "amounts"),
    [
        (pixels.brightness, functional.adjust_brightness, (0.0, 0.6, 1.0, 1.4)),
        (pixels.contrast, functional.adjust_contrast, (0.0, 0.6, 1.0, 1.4)),
        (pixels.saturation, functional.adjust_saturation, (0.0, 0.6, 1.0, 1.4)),
        (pixels.hue, functional.adjust_hue, (-0.5, -0.21, -0.02, 0.13, 0.5)),
    ],
)
def test_colours_are_adjusted_as_by_torchvision(
    ours: Callable[[Tensor, Tensor], Tensor],
    theirs: Callable[[Tensor, float], Tensor],
    amounts: tuple[float, ...],
) -> None:
    images = pictures(6, 30, 41)
    for amount in amounts:
        wanted = torch.stack([theirs(image, amount) for image in images])
        found = ours(images, torch.full((6,), amount))
        assert_close(found, wanted, 0.2 if ours is pixels.saturation else 0.01, amount)


@pytest.mark.parametrize("op", list(Op)[1:])
def test_a_row_has_the_same_pixels_in_every_batch(op: Op) -> None:
    """Alone, among others, and in another layout; each image by its own magnitude."""
    images = pictures(9, 33, 45)
    rng = torch.Generator().manual_seed(SEED)
    magnitude = torch.randint(1, 5, (9,), generator=rng).double()
    if op not in GEOMETRIC and op is not Op.POSTERIZE:
        magnitude = torch.rand(9, generator=rng, dtype=torch.float64)
    parameters = pixels.parameters_of(op, magnitude, 33, 45)
    for mode in ("nearest", "bilinear"):
        together = pixels.shown(op, images, parameters, mode)
        assert together.dtype == torch.uint8
        rows = [pixels.shown(op, images[k : k + 1], parameters[k : k + 1], mode) for k in range(9)]
        assert torch.equal(torch.cat(rows), together), (mode, SEED)
        planes = images.contiguous()
        assert torch.equal(pixels.shown(op, planes, parameters, mode), together), (mode, SEED)


@pytest.mark.parametrize("divide", ["by ten thousand", "by its inverse"])
def test_grey_is_exact_however_a_device_divides(
    divide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every sum that three values can have, and that is near a whole number."""
    if divide == "by its inverse":  # as a GPU does it
        inverse = torch.tensor(1 / 10000)
        monkeypatch.setattr(Tensor, "div_", lambda total, _: total.mul_(inverse))
    values = torch.arange(256, dtype=torch.uint8)
    for red in (0, 1, 77, 128, 254, 255):
        images = torch.stack(torch.meshgrid(values[red : red + 1], values, values, indexing="ij"))
        whole = torch.tensor([2989, 5870, 1140])[:, None, None, None] * images.long()
        wanted = whole.sum(0) // 10000
        found = pixels.grey(images.permute(1, 0, 2, 3))
        assert torch.equal(found[:, 0].long(), wanted)


def test_contrast_of_a_letterbox_is_that_of_the_picture() -> None:
    """What is zero around it neither counts nor changes."""
    picture = pictures(3, 20, 30)
    canvas = torch.zeros(3, 3, 32, 40, dtype=torch.uint8)
    canvas[:, :, 4:24, 6:36] = picture
    inside = torch.zeros(3, 1, 32, 40)
    inside[:, :, 4:24, 6:36] = 1
    factor = torch.tensor([0.3, 0.8, 1.7])
    found = pixels.contrast(canvas, factor, inside)
    assert torch.equal(found[:, :, 4:24, 6:36], pixels.contrast(picture, factor))
    assert not (found * (1 - inside)).any()


def test_tiny_images_are_not_sharpened() -> None:
    """As by torchvision: a kernel of 3 x 3 has no inner pixel there."""
    images = pictures(3, 2, 2)
    assert torch.equal(pixels.sharpness(images, torch.full((3,), 1.9)), images)
