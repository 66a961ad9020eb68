"""The attack in grey levels of 0..255: a random start, and projected steps along a sign.

Working in grey levels gives eps its unit whatever the normalisation; the sign of a gradient does
not change under a positive scale per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fap.draws import uniform
from fap.sections import MethodConfig
from fap.step.metrics import Metrics

DIRECTION = 0x5BD1E995  # sets random directions apart from random starts under the same keys


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
    moved = torch.add(current, direction, alpha=step_255)
    return moved.clamp_(clean - eps_255, clean + eps_255).clamp_(0, 255)


def picture_mask(
    places: Tensor,  # int64 (B, 4): top, left, height, width in pixels
    sides: tuple[int, int],  # height and width of the canvas
) -> Tensor:  # bool (B, 1, H, W)
    """Which pixels of each canvas belong to its picture; the others are padding."""
    top, left, height, width = places.unsqueeze(-1).unbind(1)  # (B, 1) each
    rows = torch.arange(sides[0], device=places.device)
    columns = torch.arange(sides[1], device=places.device)
    in_rows = (rows >= top) & (rows < top + height)  # (B, H)
    in_columns = (columns >= left) & (columns < left + width)  # (B, W)
    return (in_rows[:, :, None] & in_columns[:, None, :]).unsqueeze(1)


class Attack:
    """A method's attack on images that no other row of the step shares.

    `pictures` is the mask of what may be attacked, bool (B, 1, H, W); None: all of every image.
    """

    def __init__(self, method: MethodConfig, metrics: Metrics) -> None:
        assert method.eps_255 is not None and method.attack_steps is not None
        self.n_steps = method.attack_steps
        self.eps_255 = method.eps_255
        self.step_255 = method.step_size_255
        self.random_start = method.random_start
        self.random_direction = method.entry.direction == "random"
        self.targeted = method.targeted
        self.metrics = metrics

    def start(
        self,
        clean: Tensor,  # (B, 3, H, W) grey levels
        keys: Tensor,  # int32 (G,): of the groups
        pictures: Tensor | None = None,
    ) -> Tensor:
        """x + U(-eps, eps); not clipped to the pixel range (authors' code)."""
        if not self.random_start:
            return clean
        started = torch.add(clean, uniform(keys, clean.shape, clean.dtype), alpha=self.eps_255)
        return _only_in(pictures, started, clean)

    def advance(
        self,
        current: Tensor,  # (B, 3, H, W) grey levels
        clean: Tensor,  # (B, 3, H, W) grey levels
        gradient: Tensor | None,  # of the loss at `current`; a random direction needs none
        keys: Tensor,  # int32 (G,)
        pictures: Tensor | None = None,
    ) -> Tensor:
        """One step away from the target, or towards it if it is a wrong one."""
        if self.random_direction:
            direction = uniform(keys ^ DIRECTION, clean.shape, clean.dtype).sign()
        else:
            assert gradient is not None
            direction = sign(gradient)
        self.metrics.count_signs(direction)
        if self.targeted:
            direction = -direction
        moved = ascend(current, clean, direction, self.step_255, self.eps_255)
        return _only_in(pictures, moved, clean)


def _only_in(pictures: Tensor | None, attacked: Tensor, clean: Tensor) -> Tensor:
    if pictures is None:
        return attacked
    return torch.where(pictures, attacked, clean)
