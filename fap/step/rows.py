"""Where rows go: Mixup and CutMix, shuffling BN, and joining two kinds of rows group by group."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fap.distributed import Ranks
from fap.layout import image_order, memory_order


class Rows(NamedTuple):
    """Images with what they should come to."""

    images_255: Tensor  # (n, 3, H, W) grey levels, channels_last
    targets: Tensor  # (n, ...)


def mixup(
    images_255: Tensor,  # (n, 3, H, W)
    partner: Tensor,  # int64 (n,): row of the image that each is mixed with
    lam: Tensor,  # (): share of the row's own image
) -> Tensor:
    """arXiv 1710.09412."""
    return torch.lerp(images_255[partner], images_255, lam)


def cutmix(
    images_255: Tensor,  # (n, 3, H, W)
    partner: Tensor,  # int64 (n,)
    box: Tensor,  # int64 (4,): top, left, bottom, right in pixels; what is pasted
    pixels: Tensor,  # int64 (H,): 0, 1, ... H - 1; H = W
) -> Tensor:
    """arXiv 1905.04899."""
    top, left, bottom, right = box
    in_rows = (pixels >= top) & (pixels < bottom)
    in_columns = (pixels >= left) & (pixels < right)
    inside = in_rows[:, None] & in_columns
    return torch.where(inside, images_255[partner], images_255)


def shuffled(
    rows: Rows,  # of this rank
    order: Tensor,  # int64 (n,): new rows = rows[order], in the numbering of the scope
    scope: Literal["ranks", "groups", "off"],
    ranks: Ranks,
) -> Rows:
    """Shuffling BN (section 3.2.2): adversarial rows change places, to meet other statistics."""
    if scope == "off":
        return rows
    if scope == "ranks":
        rows = Rows(ranks.gather_rows(rows.images_255), ranks.gather_rows(rows.targets))
    return Rows(rows.images_255[order], rows.targets[order])


def join_by_group(first: Rows, second: Rows, n_groups: int) -> Rows:
    """Every group holds its rows of `first`, then as many of `second`."""
    return Rows(
        _join(first.images_255, second.images_255, n_groups),
        _join(first.targets, second.targets, n_groups),
    )


def _join(first: Tensor, second: Tensor, n_groups: int) -> Tensor:
    in_groups = [_by_group(first, n_groups), _by_group(second, n_groups)]
    return image_order(torch.cat(in_groups, 1).flatten(0, 1))


def split_by_group(joined: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """The inverse: the rows of the first kind, those of the second; of images or anything else."""
    first, second = _by_group(joined, n_groups).chunk(2, 1)
    return image_order(first.flatten(0, 1)), image_order(second.flatten(0, 1))


def _by_group(rows: Tensor, n_groups: int) -> Tensor:
    return memory_order(rows).unflatten(0, (n_groups, -1))
