"""The loss of a dense detector: which anchor answers for which box, focal loss, L1 of the boxes.

Row for row this is torchvision's RetinaNet loss of one image, but no shape depends on a value and
nothing asks the device for one: what torchvision selects is masked here.

A anchors, N boxes of a row (padding included), K classes. Boxes are left, top, right, bottom in
pixels of the canvas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FOREGROUND_IOU = 0.5  # from here on an anchor answers for the box
BACKGROUND_IOU = 0.4  # below, it answers for none; between the two it is not trained
ALPHA = 0.25  # focal loss (Lin et al., 2017, section 3.2): weight of the matched class
GAMMA = 2  # and its focusing power; the derivative below is that of 2


class Matches(NamedTuple):
    """What every anchor of every row should say."""

    box: Tensor
    """int64 (rows, A): the place among the row's boxes; of a foreground anchor alone it counts."""
    foreground: Tensor
    """bool (rows, A): it answers for `box`."""
    between: Tensor
    """bool (rows, A): neither foreground nor background; its classes are not trained."""

    def n_foreground(self) -> Tensor:  # int64 (rows,), at least 1
        """The foreground anchors, by which torchvision divides a row's losses."""
        return self.foreground.sum(1).clamp(min=1)

    def classes(
        self,
        targets: Tensor,  # (rows, N, 5): class, box
    ) -> Tensor:  # int64 (rows, A); -1 for anchors that are not foreground
        found = targets[:, :, 0].long().gather(1, self.box)
        return torch.where(self.foreground, found, -1)


@torch.no_grad()
def match(
    anchors: Tensor,  # (A, 4)
    targets: Tensor,  # (rows, N, 5): class, box; class -1 is padding
) -> Matches:
    """Torchvision's `Matcher(0.5, 0.4, allow_low_quality_matches=True)` for each row."""
    # Row after row, so that only one IoU matrix lies in memory: 80 MB for 100 boxes at 800 x 1344.
    sides = anchors.T.contiguous().to(targets.dtype)
    rows = [_match_row(sides, row) for row in targets]
    box, foreground, between = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return Matches(box, foreground, between)


def _match_row(
    anchors: Tensor,  # (4, A): left, top, right, bottom
    targets: Tensor,  # (N, 5)
) -> Matches:  # without the dimension of rows
    is_box = targets[:, :1] >= 0
    iou = intersection_over_union(targets[:, 1:], anchors)
    # Below any box's: padding wins nothing, and it has no best anchor.
    iou = torch.where(is_box, iou, -1)
    best, box = iou.max(dim=0)  # of equal ones the first, as in torchvision
    # Every box has its best anchors, all of them where several are equal, however low their IoU.
    # They answer for the box that is theirs by `box`, which may be another one.
    is_best = (iou == iou.amax(dim=1, keepdim=True)) & is_box
    foreground = (best >= FOREGROUND_IOU) | is_best.any(dim=0)
    between = (best >= BACKGROUND_IOU) & ~foreground
    return Matches(box, foreground, between)


def intersection_over_union(
    boxes: Tensor,  # (N, 4)
    anchors: Tensor,  # (4, A)
) -> Tensor:  # (N, A)
    """Torchvision's `box_iou` to the bit, a coordinate at a time.

    Its pairs of coordinates take twice the time and twice the memory.
    """
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # (N, 1) each
    left_a, top_a, right_a, bottom_a = anchors  # (A,) each
    width = (torch.minimum(right, right_a) - torch.maximum(left, left_a)).clamp(min=0)
    height = (torch.minimum(bottom, bottom_a) - torch.maximum(top, top_a)).clamp(min=0)
    both = width * height
    areas = (right - left) * (bottom - top) + (right_a - left_a) * (bottom_a - top_a)
    return both / (areas - both)


# ---------------------------------------------------------------------- classes


def class_losses(
    logits: Tensor,  # (rows, A, K)
    targets: Tensor,  # (rows, N, 5)
    matches: Matches,
) -> Tensor:  # (rows,)
    """Focal loss of all anchors but those between, per foreground anchor."""
    sums = _FocalSums.apply(logits, matches.classes(targets), ~matches.between)
    return sums / matches.n_foreground()


class _FocalSums(torch.autograd.Function):
    """Sums of the focal loss over anchors and classes, row after row.

    Autograd would keep eight tensors as large as the logits (at 800 x 1344, of COCO: 64 MB per
    row). Here nothing is kept but the logits. Twin: torchvision's `sigmoid_focal_loss`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # (rows, A, K)
        classes: Tensor,  # int64 (rows, A); -1: none
        counted: Tensor,  # bool (rows, A)
    ) -> Tensor:  # (rows,)
        ctx.save_for_backward(logits, classes, counted)
        sums = []
        for row, row_classes, row_counted in zip(logits, classes, counted, strict=True):
            losses = _over_classes(_focal_loss, row, row_classes, sign=1)
            sums.append(torch.where(row_counted, losses.sum(1), 0).sum())
        return torch.stack(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, classes, counted = ctx.saved_tensors
        result = torch.empty_like(logits)
        for i, row in enumerate(logits):
            slopes = _over_classes(_focal_slope, row, classes[i], sign=-1)
            factors = torch.where(counted[i], gradient[i], 0)
            torch.mul(slopes, factors[:, None], out=result[i])
        return result, None, None


def _over_classes(
    of: Callable[[Tensor], Tensor],  # the logit of a wrong answer
    logits: Tensor,  # (A, K)
    classes: Tensor,  # int64 (A,); -1: none
    sign: int,  # 1 for losses; -1 for slopes, as the wrong logit of a matched class is -logit
) -> Tensor:  # (A, K)
    """`of` every anchor and class, weighted: as if none were matched, then those that are."""
    found = of(logits).mul_(1 - ALPHA)
    place = classes.clamp(min=0)[:, None]
    matched = of(-logits.gather(1, place)) * (sign * ALPHA)
    matched = torch.where(classes[:, None] >= 0, matched, found.gather(1, place))
    return found.scatter_(1, place, matched)


def _focal_loss(wrong: Tensor) -> Tensor:
    """-q^2 log(1 - q), where q = sigmoid(wrong)."""
    return torch.sigmoid(wrong).pow(GAMMA).mul_(F.logsigmoid(-wrong)).neg_()


def _focal_slope(wrong: Tensor) -> Tensor:
    """The derivative of `_focal_loss`, with dq = q (1 - q)."""
    q = torch.sigmoid(wrong)
    right = -wrong
    slope = torch.sigmoid(right).mul_(F.logsigmoid(right)).mul_(-2)  # 1 - q without its rounding
    return slope.add_(q).mul_(q.pow(GAMMA))


# ---------------------------------------------------------------------- boxes


def box_losses(
    regressions: Tensor,  # (rows, A, 4)
    anchors: Tensor,  # (A, 4)
    targets: Tensor,  # (rows, N, 5)
    matches: Matches,
) -> Tensor:  # (rows,)
    """L1 distance of the foreground anchors to their encoded boxes, per foreground anchor."""
    places = matches.box[:, :, None].expand(-1, -1, 4)
    boxes = targets[:, :, 1:].gather(1, places)
    foreground = matches.foreground[:, :, None]
    # Any other anchor is its own box, so that no logarithm of a padding box becomes NaN.
    boxes = torch.where(foreground, boxes, anchors.to(boxes.dtype)).to(regressions.dtype)
    distances = (regressions - encoded(boxes, anchors)).abs()
    return torch.where(foreground, distances, 0).sum((1, 2)) / matches.n_foreground()


def encoded(
    boxes: Tensor,  # (..., 4)
    anchors: Tensor,  # (A, 4) or as the boxes
) -> Tensor:  # (..., 4)
    """Boxes as regressions say them: shift of the centre in anchors, logarithm of the scale.

    Torchvision's `BoxCoder` with weights 1, whose own encoder copies them from the host.
    """
    anchors = anchors.to(boxes.dtype)
    size = boxes[..., 2:] - boxes[..., :2]
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = boxes[..., :2] + 0.5 * size
    anchor_centre = anchors[..., :2] + 0.5 * anchor_size
    shift = (centre - anchor_centre) / anchor_size
    return torch.cat([shift, torch.log(size / anchor_size)], dim=-1)


# ---------------------------------------------------------------------- the leak monitor


@torch.no_grad()
def understood(
    logits: Tensor,  # (rows, A, K)
    targets: Tensor,  # (rows, N, 5)
    matches: Matches,
) -> Tensor:  # float32 (rows,), from 0 to 1
    """The share of a row's foreground anchors whose highest logit is the class of their box.

    A row without boxes counts 1 where no class of any anchor reaches probability 0.5, else 0.
    """
    highest, said = logits.max(2)
    right = said == matches.classes(targets)  # -1 is no class
    share = right.sum(1) / matches.n_foreground()
    is_quiet = (highest < 0).all(1).float()
    has_boxes = matches.foreground.any(1)
    return torch.where(has_boxes, share, is_quiet)
