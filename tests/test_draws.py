"""Numbers from counters: equal to a slow twin, evenly spread, and a function of their key alone."""

import torch

from fap.draws import has_drawn, random_bits, uniform


def keys(n: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (n,)).int()


def murmur_finaliser(x: int) -> int:
    """Slow twin of `draws.avalanche`, in Python's unbounded integers."""
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    x ^= x >> 16
    if x >> 31:
        return x - (1 << 32)
    return x


def test_random_bits_equal_the_twin() -> None:
    k = keys(3)
    for g, row in enumerate(random_bits(k, 50).tolist()):
        of_key = murmur_finaliser(int(k[g]))
        for i, value in enumerate(row):
            assert value == murmur_finaliser(murmur_finaliser(i * 0x9E3779B9) ^ of_key)


def test_uniform_is_uniform_independent_and_a_function_of_its_group() -> None:
    k = keys(4)
    u = uniform(k, (256, 3, 16, 16))
    assert u.is_contiguous(memory_format=torch.channels_last)
    assert u.min() >= -1
    assert u.max() < 1
    counts = torch.histc(u, 16, -1, 1) / u.numel()
    assert (counts - 1 / 16).abs().max() < 5e-3  # 9 standard deviations
    flat = u.permute(0, 2, 3, 1).reshape(4, -1)
    correlation = torch.corrcoef(torch.cat([flat, flat.roll(1, 1)])) - torch.eye(8)
    assert correlation.abs().max() < 0.05  # 11 standard deviations
    assert torch.equal(uniform(k[2:3], (64, 3, 16, 16)), u[128:192])  # whichever rank draws it


def test_a_draw_from_torchs_generator_is_noticed() -> None:
    """Nothing else is: not what counters give, and not a generator of one's own."""
    cpu = torch.device("cpu")
    seed = 10045376428444654063  # as large as a step's
    some = keys(2)
    torch.manual_seed(seed)
    uniform(some, (4, 3, 2, 2))
    torch.rand(3, generator=torch.Generator().manual_seed(1))
    torch.nn.Dropout(0.0)(torch.ones(3))
    assert not has_drawn(seed, cpu)
    torch.nn.Dropout(0.5)(torch.ones(3))
    assert has_drawn(seed, cpu)
