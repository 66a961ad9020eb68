"""The learning rate of every step: a warm-up, then milestones, a cosine, a line, or a constant.

A rate is that of the whole run, whatever `run.max_steps` is, so a resumed run goes on with it.
Twins: torch's own schedulers (tests/test_rates.py).
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from fap.sections.budget import LrSchedule


@dataclass(frozen=True)
class Fall:
    """A learning rate, and where it begins to hold."""

    lr: float
    epoch: int  # counted from 0
    step: int  # counted from 0 over the whole run
    milestones: int  # how many meet here; each multiplies by gamma


@dataclass(frozen=True)
class Rates:
    """The rates of one run. Steps and epochs are counted from 0 over the whole run."""

    schedule: LrSchedule
    peak: float
    steps: int  # of the run
    steps_per_epoch: int
    warmup_steps: int  # fewer than `steps`; the last of them has the peak
    milestones: tuple[int, ...] = ()  # epochs, ascending
    gamma: float = 1.0
    final: float = 0.0  # share of the peak where cosine and linear end

    def at(self, step: int) -> float:
        """The rate of one step.

        Cosine and linear would reach `final` at the step after the last one.
        """
        rate = self.peak * self._share(step)
        if step < self.warmup_steps:
            rate *= (step + 1) / self.warmup_steps
        return rate

    @property
    def falls(self) -> list[Fall]:
        """With milestones: where the rate falls, apart from the warm-up.

        A milestone at which the run has ended is among them.
        """
        return [
            Fall(
                lr=self.peak * self._fallen(epoch),
                epoch=epoch,
                step=epoch * self.steps_per_epoch,
                milestones=self.milestones.count(epoch),
            )
            for epoch in sorted(set(self.milestones))
        ]

    def _share(self, step: int) -> float:
        """Of the peak, without the warm-up."""
        # Of the steps after the warm-up: 0 at the first one.
        done = max(0, step - self.warmup_steps) / (self.steps - self.warmup_steps)
        match self.schedule:
            case "milestones":
                return self._fallen(step // self.steps_per_epoch)
            case "cosine":
                return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2
            case "linear":
                return 1 - (1 - self.final) * done
            case "constant":
                return 1.0

    def _fallen(self, epoch: int) -> float:
        """The share that the milestones leave in an epoch."""
        n_passed = bisect.bisect_right(self.milestones, epoch)
        return self.gamma**n_passed
