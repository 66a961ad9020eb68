"""The slow twin: a plan's augmentation by torchvision, one image and one operation at a time."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from pipelines.augment.draws import AugmentDraws
from pipelines.augment.policies import CHAIN_DEPTH, CHAINS, Op, Policy
from pipelines.augment.spec import AugmentSpec
from tests.conftest import photo

SEED = random.SystemRandom().randrange(2**31)
TORCHVISION: dict[Policy, v2.Transform] = {
    "randaugment": v2.RandAugment(),
    "trivialaugment": v2.TrivialAugmentWide(),
    "augmix": v2.AugMix(),
    "autoaugment": v2.AutoAugment(),
}
BINS = {"randaugment": 31, "trivialaugment": 31, "augmix": 10, "autoaugment": 10}


def name_of(op: Op) -> str:
    """As torchvision has it: ShearX of SHEAR_X."""
    return "".join(part.capitalize() for part in op.name.split("_"))


def magnitude_of(policy: Policy, op: Op, level: int, height: int, width: int) -> float:
    """Torchvision's own, of a bin with a sign."""
    function, signed = TORCHVISION[policy]._AUGMENTATION_SPACE[name_of(op)]  # type: ignore[attr-defined]
    found = function(BINS[policy], height, width)
    if found is None:
        return 0.0
    assert signed or level >= 0
    return float(found[abs(level)]) * (-1 if level < 0 else 1)


def operate(
    policy: Policy,
    op: Op,
    level: int,
    image: Tensor,  # uint8 (3, H, W)
) -> Tensor:
    if op is Op.IDENTITY:
        return image
    transform = TORCHVISION[policy]
    return transform._apply_image_or_video_transform(  # type: ignore[attr-defined]
        image,
        name_of(op),
        magnitude_of(policy, op, level, *image.shape[1:]),
        interpolation=transform.interpolation,
        fill=transform._fill,
    )


def by_torchvision(
    image: Tensor,  # uint8 (3, H, W)
    spec: AugmentSpec,
    draws: AugmentDraws,
    step: int,
    row: int,
) -> Tensor:
    """What the plan makes of a row."""
    if spec.policy == "augmix":
        image = _mixed(image, draws, step, row)
    elif spec.policy is not None:
        for op, level in zip(draws.op[step, row], draws.level[step, row], strict=True):
            image = operate(spec.policy, Op(op), int(level), image)
    if spec.color_jitter is not None:
        adjustments = (
            functional.adjust_brightness,
            functional.adjust_contrast,
            functional.adjust_saturation,
            functional.adjust_hue,
        )
        for kind in draws.colour_order[step, row].tolist():
            image = adjustments[kind](image, float(draws.colour[step, row, kind]))
    if spec.erase:
        image = _erased(image, draws.erase_box[step, row], int(draws.erase_key[step, row, 0]))
    return image


def _mixed(image: Tensor, draws: AugmentDraws, step: int, row: int) -> Tensor:
    share = draws.share[step, row].tolist()
    mixed = share[0] * image
    for chain in range(CHAINS):
        changed = image
        for place in range(chain * CHAIN_DEPTH, (chain + 1) * CHAIN_DEPTH):
            op, level = draws.op[step, row, place], draws.level[step, row, place]
            changed = operate("augmix", Op(op), int(level), changed)
        mixed = mixed + share[1 + chain] * changed
    return mixed.to(torch.uint8)


def _erased(image: Tensor, box: np.ndarray, key: int) -> Tensor:
    """By bytes that are counted out one word after the other."""
    top, left, bottom, right = box.tolist()
    words = np.random.Philox(key=key)
    data = b""
    while len(data) < (bottom - top) * (right - left) * 3:
        data += int(words.random_raw()).to_bytes(8, "little")
    image = image.clone()
    values = iter(data)
    for y in range(top, bottom):
        for x in range(left, right):
            for channel in range(3):
                image[channel, y, x] = next(values)
    return image


def pictures(n: int, height: int, width: int) -> Tensor:
    """uint8 (n, 3, H, W), channels_last as a loader's: photographs, a flat one, a grey one."""
    rng = np.random.default_rng(SEED)
    made = np.stack([photo(rng, height, width) for _ in range(n)])
    made[0] = 77
    made[1] = made[1, :, :, :1]
    made[2, :, :, 1] = 200
    return torch.from_numpy(made).permute(0, 3, 1, 2)
