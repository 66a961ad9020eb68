"""The augmentation of a step, applied to its images where they are: on a CPU or a GPU.

Which rows get which operation is known from the plan, so nothing is asked of the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import pixels
from pipelines.augment.draws import AugmentDraws
from pipelines.augment.policies import CHAIN_DEPTH, CHAINS, Op, Policy, magnitudes
from pipelines.augment.spec import AugmentSpec

# AugMix of torchvision moves images with the bilinear filter, its other policies take the nearest.
BILINEAR: tuple[Policy, ...] = ("augmix",)
CONTRAST, HUE = 1, 3  # of the four adjustments of the colours
# At once on a CPU: what operations make on their way stays in the caches. A GPU takes all rows.
PIXELS_AT_A_TIME = 1 << 18
ADJUSTMENTS = (pixels.brightness, pixels.contrast, pixels.saturation, pixels.hue)


def augment(
    images: Tensor,  # uint8 (B, H, W, 3): changed in place
    spec: AugmentSpec,
    draws: AugmentDraws,
    step: int,
    place: np.ndarray | None = None,  # (B, 4): where on the canvas pictures are; None: everywhere
) -> None:
    """Operations, colours, erasing. Rows of which the plan says nothing stay as they are."""
    n_rows, height, width, _ = images.shape
    n_each = n_rows
    if images.device.type == "cpu":
        n_each = max(1, PIXELS_AT_A_TIME // (height * width))
    for first in range(0, n_rows, n_each):
        rows = slice(first, first + n_each)
        some = images[rows]
        op, level = draws.op[step, rows], draws.level[step, rows]
        if spec.policy == "augmix":
            _mix_chains(some, op, level, draws.share[step, rows])
        elif spec.policy is not None:
            for slot in range(op.shape[1]):
                _operate(some, spec.policy, op[:, slot], level[:, slot])
        if spec.color_jitter is not None:
            where = None if place is None else place[rows]
            _adjust_colours(some, draws.colour[step, rows], draws.colour_order[step, rows], where)
        if spec.erase:
            _erase(some, draws.erase_box[step, rows], draws.erase_key[step, rows, 0])


def _operate(
    images: Tensor,  # uint8 (n, H, W, 3): changed in place
    policy: Policy,
    ops: np.ndarray,  # (n,)
    levels: np.ndarray,  # (n,)
) -> None:
    """One operation on every image. Those with the same one go together."""
    order = np.argsort(ops, kind="stable")
    order = order[ops[order] != Op.IDENTITY]
    if not len(order):
        return
    found, starts = np.unique(ops[order], return_index=True)
    parts = [slice(*ends) for ends in zip(starts, [*starts[1:], len(order)], strict=True)]

    height, width = images.shape[1:3]
    table = magnitudes(policy, height, width)
    mode = "bilinear" if policy in BILINEAR else "nearest"
    sign = np.sign(levels[order])
    bins = np.abs(levels[order])
    magnitude = table[ops[order].astype(np.int64), bins.astype(np.int64)]
    magnitude = torch.where(torch.from_numpy(sign < 0), -magnitude, magnitude)
    made = [
        pixels.parameters_of(Op(op), magnitude[part], height, width)
        for op, part in zip(found.tolist(), parts, strict=True)
    ]
    rows = _on(images.device, torch.from_numpy(order))
    parameters = _on(images.device, torch.cat(made))
    for op, part in zip(found.tolist(), parts, strict=True):
        chosen = images.index_select(0, rows[part]).permute(0, 3, 1, 2)
        shown = pixels.shown(Op(op), chosen, parameters[part], mode)
        images.index_copy_(0, rows[part], shown.permute(0, 2, 3, 1))


def _mix_chains(
    images: Tensor,  # uint8 (n, H, W, 3): changed in place
    ops: np.ndarray,  # (n, CHAINS * CHAIN_DEPTH)
    levels: np.ndarray,  # the same
    shares: np.ndarray,  # float32 (n, 1 + CHAINS)
) -> None:
    """AugMix: a weighted mean of each image and what chains of operations make of it."""
    changed = np.flatnonzero(ops.any(1))
    if not len(changed):
        return
    op = ops[changed].reshape(-1, CHAINS, CHAIN_DEPTH)
    level = levels[changed].reshape(op.shape)
    rows = _on(images.device, torch.from_numpy(changed))
    share = _on(images.device, torch.from_numpy(shares[changed]))[:, :, None, None, None]
    chosen = images.index_select(0, rows)
    mixed = chosen * share[:, 0]
    for chain in range(CHAINS):
        of_chain = chosen.clone()
        for slot in range(CHAIN_DEPTH):
            _operate(of_chain, "augmix", op[:, chain, slot], level[:, chain, slot])
        mixed += of_chain * share[:, 1 + chain]
    images.index_copy_(0, rows, mixed.clamp_(0, pixels.WHITE).to(torch.uint8))


def _adjust_colours(
    images: Tensor,
    amounts: np.ndarray,  # float32 (B, 4)
    order: np.ndarray,  # (B, 4)
    place: np.ndarray | None,
) -> None:
    """Brightness, contrast, saturation and hue, in the order of each row."""
    inside = None
    if place is not None:
        inside = _inside(place, images)
    for turn in range(len(ADJUSTMENTS)):
        for kind, adjust in enumerate(ADJUSTMENTS):
            nothing = 0 if kind == HUE else 1
            chosen = np.flatnonzero((order[:, turn] == kind) & (amounts[:, kind] != nothing))
            if not len(chosen):
                continue
            rows = _on(images.device, torch.from_numpy(chosen))
            amount = _on(images.device, torch.from_numpy(amounts[chosen, kind]))
            before = images.index_select(0, rows).permute(0, 3, 1, 2)
            if kind == CONTRAST and inside is not None:
                after = pixels.contrast(before, amount, inside.index_select(0, rows))
            else:
                after = adjust(before, amount)
            images.index_copy_(0, rows, after.permute(0, 2, 3, 1))


def _inside(place: np.ndarray, images: Tensor) -> Tensor:
    """float32 (B, 1, H, W): 1 where on the canvas the picture is."""
    where = _on(images.device, torch.from_numpy(place.astype(np.int64)))
    top, left, height, width = where[:, :, None, None, None].unbind(1)
    ys = torch.arange(images.shape[1], device=images.device)[:, None]
    xs = torch.arange(images.shape[2], device=images.device)
    down = (ys >= top) & (ys < top + height)
    across = (xs >= left) & (xs < left + width)
    return (down & across).to(torch.float32)


def _erase(
    images: Tensor,
    boxes: np.ndarray,  # (B, 4)
    keys: np.ndarray,  # (B,)
) -> None:
    """Random values in the boxes (Zhong et al., arXiv 1708.04896, section 3.1)."""
    heights = (boxes[:, 2] - boxes[:, 0]).astype(np.int64)
    widths = (boxes[:, 3] - boxes[:, 1]).astype(np.int64)
    sizes = heights * widths * 3
    rows = np.flatnonzero(sizes)
    if not len(rows):
        return
    made = [_noise(int(keys[row]), int(sizes[row])) for row in rows]
    # All of a step in one copy, and then from the device to itself.
    noise = _on(images.device, torch.from_numpy(np.concatenate(made)))
    for row, part in zip(rows.tolist(), noise.split(sizes[rows].tolist()), strict=True):
        top, left, bottom, right = boxes[row].tolist()
        images[row, top:bottom, left:right] = part.view(bottom - top, right - left, 3)


def _noise(key: int, n: int) -> np.ndarray:
    """n random bytes, the same for a key everywhere."""
    words = np.random.Philox(key=key).random_raw(-(-n // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:n]


def _on(device: torch.device, values: Tensor) -> Tensor:
    """On the device. The host waits for nothing that is queued there."""
    if device.type != "cuda":
        return values
    return values.pin_memory().to(device, non_blocking=True)
