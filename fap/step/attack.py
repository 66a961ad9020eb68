"""The attack in grey levels of 0..255: random start, sign step, projection.

Working in grey levels gives eps its unit whatever the normalisation; the sign of a gradient does
not change under a positive scale per channel. The random numbers come from counters, not from a
generator: the same bits on a CPU, a GPU, in a captured graph, after a resume and on any number of
ranks.
"""

import torch
from torch import Tensor


def _mix(x: Tensor) -> Tensor:
    """A bijection of int32 with full avalanche (the finaliser of MurmurHash3; overflow wraps)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * -2048144789
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)


def random_bits(
    keys: Tensor,
    count: int,  # int32 (G,)
) -> Tensor:  # int32 (G, count), every value equally likely
    """`count` random integers per key: a function of (key, position) alone."""
    counter = torch.arange(count, dtype=torch.int32, device=keys.device)
    return _mix(_mix(counter * -1640531527)[None] ^ _mix(keys)[:, None])


def uniform(
    keys: Tensor,  # int32 (G,)
    shape: torch.Size | tuple[int, ...],  # (G * a, C, H, W)
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """U(-1, 1) of the given shape, laid out channels_last; rows [g a, (g + 1) a) depend on keys[g]
    only.
    """
    rows, channels, height, width = shape
    bits = random_bits(keys, rows // len(keys) * channels * height * width)
    values = bits.to(torch.float32).mul_(2.0**-31).clamp_(max=1 - 2**-24).to(dtype)
    return values.view(rows, height, width, channels).permute(0, 3, 1, 2)


def other_label(
    keys: Tensor,
    labels: Tensor,
    num_classes: int,  # int32 (G,)  # int64 (G * a,)
) -> Tensor:
    """A uniformly random wrong label for every row: the target of a targeted attack. Raises
    ValueError if there is none.
    """
    if num_classes < 2:
        raise ValueError(
            f"num_classes = {num_classes}: a targeted attack needs a wrong label to aim at, so at"
            " least 2 classes"
        )
    bits = random_bits(keys ^ 0x3C6EF372, len(labels) // len(keys)).flatten().long() & 0x7FFFFFFF
    return (labels + 1 + bits % (num_classes - 1)) % num_classes


def sign(gradient: Tensor) -> Tensor:
    """where(isfinite(g), sign(g), 0): a non-finite gradient has no direction."""
    return torch.where(gradient.isfinite(), gradient.sign(), 0)


def ascend(
    current: Tensor,  # (B, 3, H, W) grey levels, where the gradient was taken
    clean: Tensor,  # (B, 3, H, W) grey levels, centre of the ball
    direction: Tensor,  # (B, 3, H, W) in {-1, 0, 1}
    step_255: float,
    eps_255: float,
) -> Tensor:
    """One projected step: into the ball of radius eps around the clean image and into the valid
    pixel range.
    """
    return (
        torch.add(current, direction, alpha=step_255)
        .clamp_(clean - eps_255, clean + eps_255)
        .clamp_(0, 255)
    )
