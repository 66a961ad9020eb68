"""Where rows go: Mixup and CutMix, shuffling BN, and joining two kinds of rows group by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fap.distributed import Ranks
from fap.layout import image_order, memory_order


class Aim(NamedTuple):
    """What rows should come to. Every tensor has rows first."""

    targets: Tensor  # (n, ...)
    partners: Tensor | None = None
    """As `targets`: of the images that are mixed in. None: the rows are not mixed."""
    lam: Tensor | None = None
    """float32 (n,): share of each row's own image. None: as `partners`."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Aim:
        """The same done to every tensor."""
        if self.partners is None or self.lam is None:
            return Aim(change(self.targets))
        return Aim(change(self.targets), change(self.partners), change(self.lam))

    def each_with(self, other: Aim, join: Callable[[Tensor, Tensor], Tensor]) -> Aim:
        """Every tensor joined with that of other rows, which are mixed if these are."""
        targets = join(self.targets, other.targets)
        if self.partners is None or self.lam is None:
            return Aim(targets)
        assert other.partners is not None and other.lam is not None
        return Aim(targets, join(self.partners, other.partners), join(self.lam, other.lam))

    def retargeted(self, change: Callable[[Tensor], Tensor]) -> Aim:
        """Other targets made of these, and in the same way of those of what is mixed in."""
        if self.partners is None:
            return Aim(change(self.targets))
        return Aim(change(self.targets), change(self.partners), self.lam)

    def mixed(
        self,
        losses: Tensor,  # (n,): by `targets`
        losses_by: Callable[[Tensor], Tensor],  # targets (n, ...) -> (n,)
    ) -> Tensor:  # (n,)
        """lam l(own) + (1 - lam) l(partner's) of mixed rows; of others `losses` themselves."""
        if self.partners is None or self.lam is None:
            return losses
        lam = self.lam.to(losses.dtype)
        return lam * losses + (1 - lam) * losses_by(self.partners)


class Rows(NamedTuple):
    """Images with what they should come to."""

    images_255: Tensor  # (n, 3, H, W) grey levels, channels_last
    aim: Aim

    def each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The same done to every tensor."""
        return Rows(change(self.images_255), self.aim.each(change))

    def each_with(self, other: Rows, join: Callable[[Tensor, Tensor], Tensor]) -> Rows:
        """Every tensor joined with that of other rows."""
        images_255 = join(self.images_255, other.images_255)
        return Rows(images_255, self.aim.each_with(other.aim, join))

    def named(self) -> dict[str, Tensor]:
        """Every tensor, by its name in a step's state."""
        found = {"images_255": self.images_255, "targets": self.aim.targets}
        if self.aim.partners is not None and self.aim.lam is not None:
            found |= {"partners": self.aim.partners, "lam": self.aim.lam}
        return found


def mixup(
    images_255: Tensor,  # (n, 3, H, W)
    others_255: Tensor,  # (n, 3, H, W): what each is mixed with
    lam: Tensor,  # (), or (n,): share of the row's own image
) -> Tensor:
    """arXiv 1710.09412."""
    return torch.lerp(others_255, images_255, _per_row(lam))


def cutmix(
    images_255: Tensor,  # (n, 3, H, W)
    others_255: Tensor,  # (n, 3, H, W)
    box: Tensor,  # int64 (4,), or (n, 4): top, left, bottom, right in pixels; what is pasted
    pixels: Tensor,  # int64 (H,): 0, 1, ... H - 1; H = W
) -> Tensor:
    """arXiv 1905.04899."""
    return torch.where(_inside(box, pixels), others_255, images_255)


def mixup_or_cutmix(
    images_255: Tensor,  # (n, 3, H, W)
    others_255: Tensor,  # (n, 3, H, W)
    lam: Tensor,  # (), or (n,)
    box: Tensor,  # int64 (4,), or (n, 4): empty where it is Mixup
    pixels: Tensor,  # int64 (H,)
) -> Tensor:
    """Each pixel keeps a share of its own: under CutMix all or nothing, else lambda.

    A box of CutMix that came out empty has lambda 1, so it needs no mark.
    """
    inside = _inside(box, pixels)
    is_cutmix = (box[..., 0] < box[..., 2]) & (box[..., 1] < box[..., 3])  # (), or (n,)
    kept = torch.where(_per_row(is_cutmix), (~inside).to(lam.dtype), _per_row(lam))
    return torch.lerp(others_255, images_255, kept)


def _per_row(
    lam: Tensor,  # (), or (n,)
) -> Tensor:  # (1, 1, 1), or (n, 1, 1, 1)
    return lam[..., None, None, None]


def _inside(
    box: Tensor,  # int64 (4,), or (n, 4)
    pixels: Tensor,  # int64 (H,)
) -> Tensor:  # bool (1, H, W), or (n, 1, H, W)
    """Which pixels are pasted."""
    top, left, bottom, right = box.unsqueeze(-1).unbind(-2)  # (1,), or (n, 1), each
    in_rows = (pixels >= top) & (pixels < bottom)
    in_columns = (pixels >= left) & (pixels < right)
    return (in_rows[..., :, None] & in_columns[..., None, :]).unsqueeze(-3)


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
        rows = rows.each(ranks.gather_rows)
    return rows.each(lambda part: part[order])


def in_one(parts: Sequence[Tensor]) -> Tensor:
    """Images that were made in parts, together; one part is taken as it is."""
    if len(parts) == 1:
        return parts[0]
    joined = torch.cat(list(parts))
    return joined.contiguous(memory_format=torch.channels_last)


def join_by_group(first: Rows, second: Rows, n_groups: int) -> Rows:
    """Every group holds its rows of `first`, then as many of `second`."""
    return first.each_with(second, lambda one, other: _join(one, other, n_groups))


def _join(first: Tensor, second: Tensor, n_groups: int) -> Tensor:
    in_groups = [_by_group(first, n_groups), _by_group(second, n_groups)]
    return image_order(torch.cat(in_groups, 1).flatten(0, 1))


def split_by_group(joined: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """The inverse: the rows of the first kind, those of the second; of images or anything else."""
    first, second = _by_group(joined, n_groups).chunk(2, 1)
    return image_order(first.flatten(0, 1)), image_order(second.flatten(0, 1))


def split_aim_by_group(joined: Aim, n_groups: int) -> tuple[Aim, Aim]:
    """The same of what the rows should come to."""
    targets = split_by_group(joined.targets, n_groups)
    if joined.partners is None or joined.lam is None:
        return Aim(targets[0]), Aim(targets[1])
    partners = split_by_group(joined.partners, n_groups)
    lam = split_by_group(joined.lam, n_groups)
    return Aim(targets[0], partners[0], lam[0]), Aim(targets[1], partners[1], lam[1])


def _by_group(rows: Tensor, n_groups: int) -> Tensor:
    return memory_order(rows).unflatten(0, (n_groups, -1))
