"""LAMB (arXiv 1904.00962) over flat buffers, without a host sync.

Twin: one parameter after the other, in tests/step/test_optimisers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fap.step.flat import Flat


class Lamb:
    """Adam's direction, as long for each parameter as the parameter itself, times the rate.

    As in timm a parameter without decay is not adapted: its step is Adam's. Gradients are not
    clipped here (`optim.clip_norm`). The interface is that of torch's fused optimisers:
    param_groups, found_inf, grad_scale, step.
    """

    def __init__(
        self,
        flat: Flat,
        groups: list[dict[str, Any]],  # in the order of flat.stretches: params, lr, weight_decay
        buffers: Mapping[str, Tensor],  # exp_avg, exp_avg_sq: as flat.param
        steps: Tensor,  # float32 (tensors of all groups,): all are equal
        *,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self.flat = flat
        self.param_groups = groups
        self.exp_avg = buffers["exp_avg"]
        self.exp_avg_sq = buffers["exp_avg_sq"]
        self.steps = steps
        self.betas = betas
        self.eps = eps
        self.found_inf = torch.zeros((), device=flat.param.device)
        self.grad_scale: Tensor | None = None

        names = sorted(flat.slices, key=lambda name: flat.slices[name].start)
        self.places = [flat.slices[name] for name in names]
        device = flat.param.device
        ends = [place.start for place in self.places[1:]] + [len(flat.param)]
        lengths = [end - place.start for end, place in zip(ends, self.places, strict=True)]
        self.lengths = torch.tensor(lengths, device=device)
        """int64 (parameters,): of each, with the gap behind it."""
        adapted = [flat.settings[name].decay > 0 for name in names]
        self.adapted = torch.tensor(adapted, device=device)

    @torch.no_grad()
    def step(self) -> None:
        """One that is to be skipped (`found_inf`) leaves parameters, averages and count alone."""
        values = self.flat.param.data
        skips = self.found_inf.bool()
        update = self._direction(skips)
        for group, places in zip(self.param_groups, self.flat.stretches.values(), strict=True):
            if group["weight_decay"]:
                for place in places:
                    update[place].add_(values[place], alpha=group["weight_decay"])
        update.mul_(self._trust(values, update))
        for group, places in zip(self.param_groups, self.flat.stretches.values(), strict=True):
            for place in places:
                update[place].mul_(group["lr"])
        torch.where(skips, values, values - update, out=values)
        self.steps.add_(1 - self.found_inf)

    def _direction(
        self,
        skips: Tensor,  # bool ()
    ) -> Tensor:  # as flat.param
        """Adam's, with its bias corrected; both averages move, unless the step is skipped."""
        beta1, beta2 = self.betas
        gradient = self.flat.grad
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        # Not by a weight of 0 alone: 0 times infinity is NaN.
        gradient = torch.where(skips, 0.0, gradient)
        applies = 1 - self.found_inf.to(gradient.dtype)
        self.exp_avg.lerp_(gradient, (1 - beta1) * applies)
        self.exp_avg_sq.lerp_(gradient.square_(), (1 - beta2) * applies)

        # In float64, as 1 - 0.999 is inexact in float32.
        count = self.steps[0].double() + 1
        correction = (1 - beta1**count).to(gradient.dtype)
        correction_sq = (1 - beta2**count).to(gradient.dtype)
        root = (self.exp_avg_sq / correction_sq).sqrt_().add_(self.eps)
        return (self.exp_avg / correction).div_(root)

    def _trust(self, values: Tensor, update: Tensor) -> Tensor:  # as flat.param
        """Of each parameter its norm divided by that of its update; 1 where either is 0."""
        of_values = torch.stack(torch._foreach_norm([values[place] for place in self.places]))
        of_update = torch.stack(torch._foreach_norm([update[place] for place in self.places]))
        adapts = self.adapted & (of_values > 0) & (of_update > 0)
        ratios = torch.where(adapts, of_values / of_update, 1.0)
        # `output_size` spares the host the question how long it becomes.
        return ratios.repeat_interleave(self.lengths, output_size=len(values))
