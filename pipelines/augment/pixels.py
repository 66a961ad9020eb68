"""The operations on the pixels of many images at once, each image with a magnitude of its own.

What torchvision's functions do with one magnitude for all, and without the seconds that its import
takes. Where those sum in float32, in an order that depends on the number of images, these have
whole numbers: then a row has the same pixels in every batch, on every rank and device.

Images are uint8 (n, 3, H, W), of any layout in memory; magnitudes float32 (n,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from pipelines.augment.policies import GEOMETRIC, Op

WHITE = 255


def blend(
    images: Tensor,
    others: Tensor,  # float32, a shape that broadcasts
    share: Tensor,  # (n,): of the images; above 1 they move away from the others
) -> Tensor:
    """images x share + others x (1 - share), cut to 0..255, the fraction dropped."""
    share = share[:, None, None, None]
    mixed = images * share
    return mixed.add_(others * (1 - share)).clamp_(0, WHITE).to(torch.uint8)


def grey(images: Tensor) -> Tensor:  # float32 (n, 1, H, W), whole numbers
    """The brightness of every pixel, the fraction dropped: 0.2989 R + 0.587 G + 0.114 B."""
    red, green, blue = images.to(torch.float32).unbind(1)
    # In ten-thousandths, so that the sum is exact. So is what the fraction is dropped of, also on
    # a GPU, which multiplies by the inverse: as float32 that is a little above 1 / 10000.
    total = red * 2989 + green * 5870 + blue * 1140
    return total.div_(10000).floor_()[:, None]


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor[:, None, None, None]).clamp_(0, WHITE).to(torch.uint8)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    return blend(images, grey(images), factor)


def contrast(
    images: Tensor,
    factor: Tensor,
    inside: Tensor | None = None,  # float32 (n, 1, H, W), 1 where the picture is; None: everywhere
) -> Tensor:
    """Nearer to the mean brightness of the picture, or farther. What is zero around it stays so."""
    brightnesses = grey(images)
    total = brightnesses.to(torch.int32).sum((1, 2, 3), keepdim=True)
    if inside is None:
        return blend(images, total / brightnesses[0].numel(), factor)
    n_inside = inside.to(torch.int32).sum((1, 2, 3), keepdim=True)
    return blend(images, inside * (total / n_inside), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Nearer to the image smoothed by a kernel of 3 x 3, 5 in its centre, or farther."""
    if min(images.shape[2:]) <= 2:
        return images
    pixels = images.to(torch.float32)
    inner = pixels[..., 1:-1, 1:-1]
    across = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
    total = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :] + inner * 4
    # Never half way between two values: 13 is odd.
    smooth = total.div_(13).round_()
    inner += smooth.sub_(inner) * (1 - factor)[:, None, None, None]
    return pixels.clamp_(0, WHITE).to(torch.uint8)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """`turn`: share of the colour circle, from -0.5 to 0.5."""
    red, green, blue = images.to(torch.float32).div_(WHITE).unbind(1)
    most = red.maximum(green).maximum(blue)
    least = red.minimum(green).minimum(blue)
    spread = most - least
    # A grey pixel has no hue: with a divisor of 1 it stays what it is.
    flat = spread == 0
    to_red, to_green, to_blue = (
        (most - channel) / torch.where(flat, 1.0, spread) for channel in (red, green, blue)
    )
    angle = torch.where(most == green, 2 + to_red - to_blue, 4 + to_green - to_red)
    angle = torch.where(most == red, to_blue - to_green, angle)
    angle = (angle / 6 + turn[:, None, None]).remainder_(1) * 6

    # Along the circle every channel rises for a sixth, stays for two, falls, and stays low.
    channels = []
    for offset in (5, 3, 1):
        at = (angle + offset).remainder_(6)
        fall = torch.minimum(at, 4 - at).clamp_(0, 1)
        channels.append(most - spread * fall)
    shown = torch.stack(channels, 1)
    # As torchvision: every value has a 256th of the range.
    return shown.mul_(WHITE + 1 - 1e-3).clamp_(0, WHITE).to(torch.uint8)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep so many of the highest bits of every value."""
    lowest = torch.exp2(8 - bits)
    return images & (256 - lowest).to(torch.uint8)[:, None, None, None]


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is not below a share of 255."""
    return torch.where(images >= (threshold * WHITE)[:, None, None, None], WHITE - images, images)


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Every channel from 0 to 255; one that has a single value stays as it is."""
    planes = images.flatten(2)  # a copy, of which minima are found faster
    least = planes.amin(2)[:, :, None, None].to(torch.float32)
    most = planes.amax(2)[:, :, None, None].to(torch.float32)
    flat = most == least
    scale = torch.where(flat, 1.0, (most - least) * (1 / WHITE))
    least = torch.where(flat, 0.0, least)
    return (images - least).div_(scale).clamp_(0, WHITE).to(torch.uint8)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Every value as frequent as any other, by Pillow's rule; a channel of few values stays."""
    values = images.flatten(2).to(torch.int64)  # (n, 3, pixels)
    counts = values.new_zeros(*values.shape[:2], WHITE + 1, dtype=torch.int32)
    counts.scatter_add_(2, values, counts.new_ones(1).expand(values.shape))
    not_above = counts.cumsum(2)
    of_the_highest = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - of_the_highest) // WHITE
    below = not_above - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=WHITE)
    unchanged = torch.arange(WHITE + 1, device=images.device)
    table = torch.where(step == 0, unchanged, table).to(torch.uint8)
    return table.gather(2, values).view(images.shape)


def invert(images: Tensor, _: Tensor) -> Tensor:
    return WHITE - images


def moved(
    images: Tensor,
    back: Tensor,  # float32 (n, 6): rows of the matrix from a pixel to where it comes from
    mode: str,  # "nearest" or "bilinear"
) -> Tensor:
    """Positions count in pixels from the centre. Black where nothing comes from."""
    height, width = images.shape[2:]
    ys, xs = (
        torch.linspace((1 - side) / 2, (side - 1) / 2, side, device=images.device)
        for side in (height, width)
    )
    ys = ys[:, None]
    # One product at a time: those of a matrix are rounded otherwise for another number of images.
    sources = []
    for row, side in ((back[:, :3], width), (back[:, 3:], height)):
        # grid_sample has the image from -1 to 1.
        of_x, of_y, shift = (row / (side / 2))[:, :, None, None].unbind(1)
        sources.append(xs * of_x + ys * of_y + shift)
    grid = torch.stack(sources, 3)
    pixels = images.to(torch.float32)
    return grid_sample(pixels, grid, mode=mode, align_corners=False).round_().to(torch.uint8)


ON_PIXELS: dict[Op, Callable[[Tensor, Tensor], Tensor]] = {
    Op.BRIGHTNESS: brightness,
    Op.COLOR: saturation,
    Op.CONTRAST: contrast,
    Op.SHARPNESS: sharpness,
    Op.POSTERIZE: posterize,
    Op.SOLARIZE: solarize,
    Op.AUTO_CONTRAST: auto_contrast,
    Op.EQUALIZE: equalize,
    Op.INVERT: invert,
}


def shown(
    op: Op,
    images: Tensor,
    parameters: Tensor,  # float32 (n, 6): `parameters_of`
    mode: str,  # of geometric operations
) -> Tensor:
    """An operation on all images."""
    if op in GEOMETRIC:
        return moved(images, parameters, mode)
    return ON_PIXELS[op](images, parameters[:, 0])


def parameters_of(
    op: Op,
    magnitude: Tensor,  # float64 (n,)
    height: int,
    width: int,
) -> Tensor:
    """float32 (n, 6): what `shown` needs, a matrix, or a number and five zeros.

    Made on the CPU: cosines of a GPU are others.
    """
    one = torch.ones_like(magnitude)
    zero = torch.zeros_like(magnitude)
    match op:
        case Op.SHEAR_X:  # the top row stays
            rows = [one, magnitude, magnitude * height / 2, zero, one, zero]
        case Op.SHEAR_Y:  # the left column stays
            rows = [one, zero, zero, magnitude, one, magnitude * width / 2]
        case Op.TRANSLATE_X:
            rows = [one, zero, -magnitude, zero, one, zero]
        case Op.TRANSLATE_Y:
            rows = [one, zero, zero, zero, one, -magnitude]
        case Op.ROTATE:
            angle = magnitude.deg2rad()
            rows = [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero]
        case Op.BRIGHTNESS | Op.COLOR | Op.CONTRAST | Op.SHARPNESS:
            rows = [1 + magnitude, zero, zero, zero, zero, zero]
        case _:
            rows = [magnitude, zero, zero, zero, zero, zero]
    return torch.stack(rows, 1).to(torch.float32)
