"""The end of a step: gradients over all ranks, the optimiser, and what a non-finite step undoes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fap.distributed import Ranks
from fap.sections import OptimConfig
from fap.step.ema import Ema
from fap.step.flat import Flat
from fap.step.metrics import Metrics
from fap.step.optimisers import Optimiser
from fap.step.weights import Weights

# Dynamic loss scaling as torch.amp.GradScaler does it by default.
FIRST_SCALE = 2.0**16
GROWTH = 2.0
BACKOFF = 0.5
STEPS_TO_GROWTH = 2000


class Update:
    """The optimiser on flat buffers, with dynamic loss scaling for fp16, and the average of it.

    Unlike torch.amp.GradScaler it leaves the verdict on the device, for the step to read: if a
    gradient is not finite on any rank, weights, statistics and averages stay as they were.
    """

    def __init__(
        self,
        flat: Flat,
        model: nn.Module,  # whose parameters `flat` holds
        lr: Tensor,  # float32 (), which the step is fed with
        config: OptimConfig,
        weights: Weights,
        ranks: Ranks,
        *,
        scaled: bool,  # fp16
    ) -> None:
        self.flat = flat
        self.weights = weights
        self.ranks = ranks
        self.scaled = scaled
        device = flat.param.device
        self.optimiser = Optimiser(flat, lr, config)
        self.clip_norm = config.clip_norm
        self.ema: Ema | None = None
        if config.ema is not None:
            self.ema = Ema(flat, model, config.ema)
        self.scale = torch.full((), FIRST_SCALE if scaled else 1.0, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)

    def set_lr(self, lr: float) -> None:
        self.optimiser.set_lr(lr)

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on: live tensors by name."""
        state = self.optimiser.state() | {"scale": self.scale, "growth": self.growth}
        if self.ema is not None:
            state |= self.ema.state()
        return state

    def __call__(self, stats_before: Tensor, metrics: Metrics) -> None:
        """Spend the gradients in `flat.grad`; `stats_before` are the running statistics before the
        step.
        """
        flat = self.flat
        if self.weights.main != 1:
            flat.grad[flat.main].mul_(self.weights.main)
        if self.weights.aux != 1:
            flat.grad[flat.aux].mul_(self.weights.aux)
        self.ranks.sum_(flat.grad)
        # The mean of the ranks' averages is the average over all groups.
        self.ranks.sum_(flat.stats.div_(self.ranks.world))

        # One reduction, which a NaN gets through.
        largest = torch.linalg.vector_norm(flat.grad, torch.inf)
        found_inf = (~largest.isfinite()).float()
        if self.clip_norm is not None:
            # Gradients are still multiplied by the loss scale; so is the longest allowed.
            norm = torch.linalg.vector_norm(flat.grad)
            longest = self.clip_norm * self.scale.to(norm.dtype)
            flat.grad.mul_((longest / norm).clamp(max=1))
        self.optimiser(found_inf, self.scale if self.scaled else None)
        if self.scaled:
            torch._amp_update_scale_(
                self.scale, self.growth, found_inf, GROWTH, BACKOFF, STEPS_TO_GROWTH
            )
        torch.where(found_inf.bool(), stats_before, flat.stats, out=flat.stats)
        if self.ema is not None:
            self.ema.update(found_inf)
        metrics.count_step(found_inf)
