"""The operations on an image and the policies that choose among them, as in torchvision.

How far an operation goes is a bin of its range, which a policy divides evenly. Its magnitude is
what the bin stands for: a shift, an angle, a factor, a threshold. The ranges are those of
`torchvision.transforms`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args

import torch
from torch import Tensor

Policy = Literal["randaugment", "trivialaugment", "augmix", "autoaugment"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class Op(IntEnum):
    """An operation, by the number that a plan has for it. Never renumber."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTO_CONTRAST = 12
    EQUALIZE = 13
    INVERT = 14


GEOMETRIC = frozenset({Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE})
ENHANCING = frozenset({Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS})
SIGNED = GEOMETRIC | ENHANCING  # they go both ways, each as often


@dataclass(frozen=True)
class Space:
    """What a policy chooses from. Numbers are the largest magnitude, that of the last bin."""

    bins: int
    ops: tuple[Op, ...]  # each as likely
    translate: float  # share of the image's side, or pixels
    bits: tuple[int, int]  # that POSTERIZE leaves in the first bin and in the last
    translate_in: Literal["sides", "pixels"] = "sides"
    shear: float = 0.3
    rotate: float = 30.0  # degrees
    enhance: float = 0.9  # how far from 1 the factors of ENHANCING may be


_BUT_INVERT = tuple(op for op in Op if op is not Op.INVERT)
SPACES: dict[Policy, Space] = {
    "randaugment": Space(31, _BUT_INVERT, translate=150 / 331, bits=(8, 4)),
    "trivialaugment": Space(
        31,
        _BUT_INVERT,
        translate=32,
        translate_in="pixels",
        bits=(8, 2),
        shear=0.99,
        rotate=135.0,
        enhance=0.99,
    ),
    "augmix": Space(10, _BUT_INVERT[1:], translate=1 / 3, bits=(4, 0)),
    "autoaugment": Space(10, tuple(Op)[1:], translate=150 / 331, bits=(8, 4)),
}

# The mixture of AugMix (arXiv 1912.02781, section 3): chains, and the most operations of one.
CHAINS = 3
CHAIN_DEPTH = 3

# AutoAugment's policy for ImageNet (arXiv 1805.09501, table 9): pairs of an operation, its
# probability, and its bin.
_Step = tuple[Op, float, int]
AUTOAUGMENT: tuple[tuple[_Step, _Step], ...] = (
    ((Op.POSTERIZE, 0.4, 8), (Op.ROTATE, 0.6, 9)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTO_CONTRAST, 0.6, 0)),
    ((Op.EQUALIZE, 0.8, 0), (Op.EQUALIZE, 0.6, 0)),
    ((Op.POSTERIZE, 0.6, 7), (Op.POSTERIZE, 0.6, 6)),
    ((Op.EQUALIZE, 0.4, 0), (Op.SOLARIZE, 0.2, 4)),
    ((Op.EQUALIZE, 0.4, 0), (Op.ROTATE, 0.8, 8)),
    ((Op.SOLARIZE, 0.6, 3), (Op.EQUALIZE, 0.6, 0)),
    ((Op.POSTERIZE, 0.8, 5), (Op.EQUALIZE, 1.0, 0)),
    ((Op.ROTATE, 0.2, 3), (Op.SOLARIZE, 0.6, 8)),
    ((Op.EQUALIZE, 0.6, 0), (Op.POSTERIZE, 0.4, 6)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOR, 0.4, 0)),
    ((Op.ROTATE, 0.4, 9), (Op.EQUALIZE, 0.6, 0)),
    ((Op.EQUALIZE, 0.0, 0), (Op.EQUALIZE, 0.8, 0)),
    ((Op.INVERT, 0.6, 0), (Op.EQUALIZE, 1.0, 0)),
    ((Op.COLOR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOR, 1.0, 2)),
    ((Op.COLOR, 0.8, 8), (Op.SOLARIZE, 0.8, 7)),
    ((Op.SHARPNESS, 0.4, 7), (Op.INVERT, 0.6, 0)),
    ((Op.SHEAR_X, 0.6, 5), (Op.EQUALIZE, 1.0, 0)),
    ((Op.COLOR, 0.4, 0), (Op.EQUALIZE, 0.6, 0)),
    ((Op.EQUALIZE, 0.4, 0), (Op.SOLARIZE, 0.2, 4)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTO_CONTRAST, 0.6, 0)),
    ((Op.INVERT, 0.6, 0), (Op.EQUALIZE, 1.0, 0)),
    ((Op.COLOR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.EQUALIZE, 0.8, 0), (Op.EQUALIZE, 0.6, 0)),
)


@functools.cache
def magnitudes(policy: Policy, height: int, width: int) -> Tensor:
    """(operations, bins), float64: what a bin of an operation stands for on images of these sides.

    By torch's own float32 `linspace`, as in torchvision, since some of it is cut to whole numbers.
    """
    space = SPACES[policy]
    table = torch.zeros(len(Op), space.bins, dtype=torch.float64)
    down, across = height, width
    if space.translate_in == "pixels":
        down, across = 1, 1
    ends = {
        Op.SHEAR_X: (0.0, space.shear),
        Op.SHEAR_Y: (0.0, space.shear),
        Op.TRANSLATE_X: (0.0, space.translate * across),
        Op.TRANSLATE_Y: (0.0, space.translate * down),
        Op.ROTATE: (0.0, space.rotate),
        Op.SOLARIZE: (1.0, 0.0),
    }
    ends |= dict.fromkeys(ENHANCING, (0.0, space.enhance))
    for op, (first, last) in ends.items():
        table[op] = torch.linspace(first, last, space.bins)
    for op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
        table[op] = table[op].trunc()  # whole pixels
    most_bits, fewest_bits = space.bits
    per_bit = (space.bins - 1) / (most_bits - fewest_bits)
    table[Op.POSTERIZE] = (most_bits - torch.arange(space.bins) / per_bit).round()
    return table
