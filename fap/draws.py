"""Random numbers on the device, drawn from counters instead of a generator.

A number is a function of its key and its position alone: the same bits on a CPU, a GPU, in a
captured graph, after a resume and on any number of ranks.
"""

import numpy as np
import torch
from torch import Tensor

# The finaliser of MurmurHash3 (Appleby, public domain), and the golden ratio of Fibonacci hashing;
# as int32, whose overflow wraps.
MURMUR_1 = -2048144789  # 0x85EBCA6B
MURMUR_2 = -1028477387  # 0xC2B2AE35
GOLDEN_RATIO = -1640531527  # 0x9E3779B9
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


def avalanche(x: Tensor) -> Tensor:
    """A bijection of int32 in which every bit of `x` changes half of the result's bits."""
    # A shift of a negative int32 copies its sign; the masks make it shift in zeros.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * MURMUR_1
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * MURMUR_2
    return x ^ ((x >> 16) & 0xFFFF)


def random_bits(
    keys: Tensor,  # int32 (G,)
    count: int,
) -> Tensor:  # int32 (G, count), every value equally likely
    """`count` random integers per key."""
    counter = torch.arange(count, dtype=torch.int32, device=keys.device)
    return avalanche(avalanche(counter * GOLDEN_RATIO)[None] ^ avalanche(keys)[:, None])


def uniform(
    keys: Tensor,  # int32 (G,)
    shape: torch.Size | tuple[int, ...],  # (G * a, C, H, W)
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """U(-1, 1) of the given shape, laid out channels_last.

    Rows [g a, (g + 1) a) depend on keys[g] only.
    """
    rows, channels, height, width = shape
    rows_per_key = rows // len(keys)
    bits = random_bits(keys, rows_per_key * channels * height * width)
    values = bits.to(torch.float32).mul_(2.0**-31).clamp_(max=BELOW_ONE).to(dtype)
    return values.view(rows, height, width, channels).permute(0, 3, 1, 2)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """64 well spread bits for the generator behind a model's own random layers (dropout, stochastic
    depth).

    A function of its arguments alone, the same in every process, so that resuming repeats the step.
    The spawn key keeps it apart from the plan's streams, whose seeds have none.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(step, rank))
    return int(sequence.generate_state(1, np.uint64)[0])


def has_drawn(seed: int, device: torch.device) -> bool:
    """Has anything been drawn from torch's generators since torch.manual_seed(seed)?

    The replay of a CUDA graph counts as what it replays.
    """
    states = {torch.device("cpu"): torch.get_rng_state()}
    if device.type == "cuda":
        states[device] = torch.cuda.get_rng_state(device)
    return any(
        not torch.equal(state, torch.Generator(place).manual_seed(seed).get_state())
        for place, state in states.items()
    )
