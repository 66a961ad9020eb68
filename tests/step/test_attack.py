"""The attack's parts. Whole attacks are compared with the slow twin in test_step.py."""

import torch

from fap.step.attack import ascend, sign


def test_ascend_stays_in_the_ball_and_the_pixel_range() -> None:
    clean = torch.randint(0, 256, (8, 3, 5, 5)).float()
    current = clean + torch.rand_like(clean) * 8 - 4
    direction = torch.randint(0, 2, clean.shape).float() * 2 - 1  # no zeros, which move nothing
    moved = ascend(current, clean, direction, 1.0, 4.0)
    assert (moved - clean).abs().max() <= 4
    assert moved.min() >= 0
    assert moved.max() <= 255
    inside = ((current > 1) & (current < 254)) & ((current - clean).abs() < 3)
    assert torch.allclose((moved - current).abs()[inside], torch.ones(()))


def test_sign_of_what_is_not_finite_is_zero() -> None:
    g = torch.tensor([1.0, -2.0, 0.0, float("nan"), float("inf"), -float("inf")])
    assert sign(g).tolist() == [1, -1, 0, 0, 0, 0]
