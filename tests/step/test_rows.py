"""Mixing, shuffling and joining rows against loops over single rows."""

import random

import pytest
import torch
from torch import Tensor

from fap.distributed import ONE_RANK
from fap.step.rows import (
    Aim,
    Rows,
    cutmix,
    join_by_group,
    mixup,
    mixup_or_cutmix,
    shuffled,
    split_aim_by_group,
    split_by_group,
)


def images(n: int, size: int = 6) -> torch.Tensor:
    return (torch.rand(n, 3, size, size) * 255).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(), (5,)], ids=["batch", "row"])
def test_mixup_row_by_row(shape: tuple[int, ...]) -> None:
    x = images(5)
    others = images(5)
    lam = torch.rand(shape)
    mixed = mixup(x, others, lam)
    for row, share in enumerate(lam.expand(5)):
        torch.testing.assert_close(mixed[row], share * x[row] + (1 - share) * others[row])


def box() -> list[int]:
    """Top, left, bottom, right in images of 6 pixels; may be empty."""
    top, left = random.randrange(4), random.randrange(4)
    return [top, left, random.randrange(top, 7), random.randrange(left, 7)]


def slow_cutmix(own: Tensor, other: Tensor, corners: list[int]) -> Tensor:
    """Of one row, pixel by pixel."""
    top, left, bottom, right = corners
    pasted = own.clone()
    for y in range(top, bottom):
        for column in range(left, right):
            pasted[:, y, column] = other[:, y, column]
    return pasted


@pytest.mark.parametrize("per_row", [False, True])
def test_cutmix_pixel_by_pixel(per_row: bool) -> None:
    x = images(3)
    others = images(3)
    boxes = [box() for _ in range(3)]
    if not per_row:
        boxes = boxes[:1] * 3
    given = torch.tensor(boxes if per_row else boxes[0])
    mixed = cutmix(x, others, given, torch.arange(6))
    for row, corners in enumerate(boxes):
        assert torch.equal(mixed[row], slow_cutmix(x[row], others[row], corners))


def test_either_is_cutmix_where_there_is_a_box_and_else_mixup() -> None:
    x = images(6)
    others = images(6)
    cuts = [[1, 2, 4, 3], [0, 0, 6, 6], [0, 3, 6, 6]]
    lam = torch.tensor([0.3, 0.0, 0.5, 0.3, 0.7, 1.0])
    boxes = torch.tensor([*cuts, *[[0, 0, 0, 0]] * 3])
    mixed = mixup_or_cutmix(x, others, lam, boxes, torch.arange(6))
    for row, corners in enumerate(cuts):
        assert torch.equal(mixed[row], slow_cutmix(x[row], others[row], corners))
    torch.testing.assert_close(mixed[3:], mixup(x[3:], others[3:], lam[3:]))
    for row in (0, 3):  # one draw for all rows
        of_all = mixup_or_cutmix(x, others, lam[row], boxes[row], torch.arange(6))
        torch.testing.assert_close(of_all[row], mixed[row])
    # A box of CutMix that came out empty: nothing is pasted, and lambda is 1.
    empty = mixup_or_cutmix(x, others, torch.ones(()), torch.tensor([2, 0, 2, 3]), torch.arange(6))
    assert torch.equal(empty, x)


@pytest.mark.parametrize("target_shape", [(), (4, 5)], ids=["labels", "boxes"])
@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_joining_row_by_row_and_back(n_groups: int, target_shape: tuple[int, ...]) -> None:
    rows = 3
    n = n_groups * rows
    first, second = (
        Rows(
            images(n),
            Aim(torch.rand(n, *target_shape), torch.rand(n, *target_shape), torch.rand(n)),
        )
        for _ in range(2)
    )
    joined = join_by_group(first, second, n_groups)
    for group in range(n_groups):
        for row in range(rows):
            own = group * rows + row
            place = 2 * group * rows + row
            for name, tensor in joined.named().items():
                assert torch.equal(tensor[place], first.named()[name][own])
                assert torch.equal(tensor[place + rows], second.named()[name][own])
    assert joined.images_255.is_contiguous(memory_format=torch.channels_last)
    for name, tensor in joined.named().items():
        back = split_by_group(tensor, n_groups)
        assert torch.equal(back[0], first.named()[name])
        assert torch.equal(back[1], second.named()[name])
    for aim, rows_of_kind in zip(
        split_aim_by_group(joined.aim, n_groups), (first, second), strict=True
    ):
        assert all(torch.equal(*pair) for pair in zip(aim, rows_of_kind.aim, strict=True))
    plain = split_aim_by_group(Aim(joined.aim.targets), n_groups)
    assert torch.equal(plain[0].targets, first.aim.targets)
    assert plain[0].partners is plain[0].lam is None


def test_shuffling_takes_images_and_targets_along() -> None:
    rows = Rows(images(6), Aim(torch.arange(6), torch.arange(10, 16), torch.rand(6)))
    order = torch.randperm(6)
    moved = shuffled(rows, order, "groups", ONE_RANK)
    assert moved.aim.targets.tolist() == order.tolist()
    for name, tensor in rows.named().items():
        assert torch.equal(moved.named()[name], tensor[order])
    assert shuffled(rows, order, "off", ONE_RANK) is rows
    unmixed = shuffled(Rows(rows.images_255, Aim(rows.aim.targets)), order, "ranks", ONE_RANK)
    assert unmixed.named().keys() == {"images_255", "targets"}


def test_mixed_rows_count_both_losses_and_aim_at_both_targets() -> None:
    aim = Aim(torch.tensor([0, 1, 2]), torch.tensor([2, 2, 0]), torch.tensor([1.0, 0.25, 0.5]))
    cost = torch.tensor([5.0, 7.0, 11.0])
    mixed = aim.mixed(cost[aim.targets], lambda targets: cost[targets])
    assert mixed.tolist() == [5.0, 0.25 * 7 + 0.75 * 11, 0.5 * 11 + 0.5 * 5]
    other = aim.retargeted(lambda targets: targets + 1)
    assert other.targets.tolist() == [1, 2, 3]
    assert other.partners is not None
    assert other.partners.tolist() == [3, 3, 1]
    assert other.lam is aim.lam
    alone = Aim(aim.targets)
    losses = cost[aim.targets]
    assert alone.mixed(losses, lambda targets: cost[targets]) is losses
    assert alone.retargeted(lambda targets: targets + 1).partners is None
