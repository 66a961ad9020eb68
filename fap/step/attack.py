"""The attack in grey levels of 0..255: the sign of a gradient, and a projected step.

Working in grey levels gives eps its unit whatever the normalisation; the sign of a gradient does
not change under a positive scale per channel.
"""

import torch
from torch import Tensor


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
