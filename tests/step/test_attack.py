import pytest
import torch

from fap.step.step import attack


def keys(n: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (n,)).int()


def murmur_finaliser(x: int) -> int:
    """Slow twin of `attack._mix`, in Python's unbounded integers."""
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    x ^= x >> 16
    return x - (1 << 32) if x >> 31 else x


def test_random_bits_equal_the_twin() -> None:
    k = keys(3)
    for g, row in enumerate(attack.random_bits(k, 50).tolist()):
        for i, value in enumerate(row):
            assert value == murmur_finaliser(
                murmur_finaliser(i * 0x9E3779B9) ^ murmur_finaliser(int(k[g]))
            )


def test_uniform_is_uniform_independent_and_a_function_of_its_group() -> None:
    k = keys(4)
    u = attack.uniform(k, (64, 3, 16, 16))
    assert u.is_contiguous(memory_format=torch.channels_last)
    assert u.min() >= -1
    assert u.max() < 1
    counts = torch.histc(u, 16, -1, 1) / u.numel()
    assert (counts - 1 / 16).abs().max() < 5e-3
    flat = u.permute(0, 2, 3, 1).reshape(4, -1)
    correlation = torch.corrcoef(torch.cat([flat, flat.roll(1, 1)])) - torch.eye(8)
    assert correlation.abs().max() < 0.05
    assert torch.equal(attack.uniform(k[2:3], (16, 3, 16, 16)), u[32:48])  # whichever rank draws it


def test_ascend_stays_in_the_ball_and_the_pixel_range() -> None:
    clean = torch.randint(0, 256, (8, 3, 5, 5)).float()
    current = clean + torch.rand_like(clean) * 8 - 4
    moved = attack.ascend(current, clean, torch.randn_like(clean).sign(), 1.0, 4.0)
    assert (moved - clean).abs().max() <= 4
    assert moved.min() >= 0
    assert moved.max() <= 255
    inside = ((current > 1) & (current < 254)) & ((current - clean).abs() < 3)
    assert torch.allclose((moved - current).abs()[inside], torch.ones(()))


def test_sign_of_what_is_not_finite_is_zero() -> None:
    g = torch.tensor([1.0, -2.0, 0.0, float("nan"), float("inf"), -float("inf")])
    assert attack.sign(g).tolist() == [1, -1, 0, 0, 0, 0]


def test_targets_are_wrong_labels_evenly() -> None:
    labels = torch.randint(0, 10, (4 * 5000,))
    targets = attack.other_label(keys(4), labels, 10)
    assert (targets != labels).all()
    assert (
        torch.bincount((targets - labels) % 10, minlength=10)[1:]
        .float()
        .div(20000 / 9)
        .sub(1)
        .abs()
        .max()
        < 0.15
    )


@pytest.mark.parametrize("num_classes", [0, 1])
def test_a_target_needs_two_classes(num_classes: int) -> None:
    with pytest.raises(ValueError, match=f"num_classes = {num_classes}: .*at least 2"):
        attack.other_label(keys(2), torch.zeros(4, dtype=torch.int64), num_classes)
    assert attack.other_label(keys(2), torch.tensor([0, 1, 1, 0]), 2).tolist() == [1, 0, 0, 1]
