"""Mixing, shuffling and joining rows against loops over single rows."""

import random

import pytest
import torch

from fap.distributed import ONE_RANK
from fap.step.rows import Rows, cutmix, join_by_group, mixup, shuffled, split_by_group


def images(n: int, size: int = 6) -> torch.Tensor:
    return (torch.rand(n, 3, size, size) * 255).to(memory_format=torch.channels_last)


def test_mixup_row_by_row() -> None:
    x = images(5)
    partner = torch.randperm(5)
    lam = torch.rand(())
    mixed = mixup(x, partner, lam)
    for row in range(5):
        wanted = lam * x[row] + (1 - lam) * x[partner[row]]
        torch.testing.assert_close(mixed[row], wanted)


def test_cutmix_pixel_by_pixel() -> None:
    x = images(3)
    partner = torch.randperm(3)
    top, left = random.randrange(4), random.randrange(4)
    bottom, right = random.randrange(top, 7), random.randrange(left, 7)
    mixed = cutmix(x, partner, torch.tensor([top, left, bottom, right]), torch.arange(6))
    for row in range(3):
        for y in range(6):
            for column in range(6):
                pasted = top <= y < bottom and left <= column < right
                source = partner[row] if pasted else row
                assert torch.equal(mixed[row, :, y, column], x[source, :, y, column])


@pytest.mark.parametrize("target_shape", [(), (4, 5)], ids=["labels", "boxes"])
@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_joining_row_by_row_and_back(n_groups: int, target_shape: tuple[int, ...]) -> None:
    rows = 3
    n = n_groups * rows
    first = Rows(images(n), torch.rand(n, *target_shape))
    second = Rows(images(n), torch.rand(n, *target_shape))
    joined = join_by_group(first, second, n_groups)
    for group in range(n_groups):
        for row in range(rows):
            own = group * rows + row
            place = 2 * group * rows + row
            assert torch.equal(joined.images_255[place], first.images_255[own])
            assert torch.equal(joined.images_255[place + rows], second.images_255[own])
            assert torch.equal(joined.targets[place], first.targets[own])
            assert torch.equal(joined.targets[place + rows], second.targets[own])
    assert joined.images_255.is_contiguous(memory_format=torch.channels_last)
    for tensor, originals in zip(joined, zip(first, second, strict=True), strict=True):
        back = split_by_group(tensor, n_groups)
        assert torch.equal(back[0], originals[0])
        assert torch.equal(back[1], originals[1])


def test_shuffling_takes_images_and_targets_along() -> None:
    rows = Rows(images(6), torch.arange(6))
    order = torch.randperm(6)
    moved = shuffled(rows, order, "groups", ONE_RANK)
    assert moved.targets.tolist() == order.tolist()
    assert torch.equal(moved.images_255, rows.images_255[order])
    assert shuffled(rows, order, "off", ONE_RANK) is rows
