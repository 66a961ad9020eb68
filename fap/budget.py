"""The training budget: image passes, and the epochs and learning rate that spend it.

The unit is the image pass, one image forward and backward once. Vanilla training costs 1 per image
and epoch (eq. 1), AdvProp K + 2 (eq. 2), decoupled training and Fast AdvProp 1 + p_adv K (eq. 4).
Section 4.1 divides epochs and milestones by that cost.
"""

import bisect
from dataclasses import dataclass
from fractions import Fraction

from fap.config import Config, MethodConfig, nearest


def cost_per_image(method: MethodConfig) -> Fraction:
    """Image passes per image of the epoch."""
    attack_steps = method.attack_steps or 0
    if method.name == "advprop":
        return Fraction(attack_steps + 2)
    return 1 + (method.p_adv or Fraction(0)) * attack_steps


def divided(epochs: int, cost: Fraction) -> int:
    """epochs / cost to the nearest whole epoch, ties down (105 / 1.2 = 87.5 -> 87, as in Table 4),
    at least 1.
    """
    return max(1, nearest(epochs / cost))


@dataclass(frozen=True)
class Fall:
    """A learning rate, and where it begins to hold: epoch and step are counted from 0 over the
    whole run.
    """

    lr: float
    epoch: int
    step: int
    milestones: int  # that meet here: more than one multiplies by gamma as often


@dataclass(frozen=True)
class Budget:
    """What one run does. `steps_per_epoch` full batches; a partial last batch is dropped."""

    epochs: int
    milestones: tuple[int, ...]  # epochs
    gamma: float
    steps_per_epoch: int
    image_passes_per_step: int  # over all ranks
    base_lr: float
    warmup_steps: int

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def image_passes(self) -> int:
        return self.steps * self.image_passes_per_step

    @property
    def falls(self) -> list[Fall]:
        """Where the learning rate falls, apart from the warm-up; also where the run has ended
        before.
        """
        return [
            Fall(
                self._lr_in(epoch),
                epoch,
                epoch * self.steps_per_epoch,
                self.milestones.count(epoch),
            )
            for epoch in sorted(set(self.milestones))
        ]

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over the whole run."""
        lr = self._lr_in(step // self.steps_per_epoch)
        return lr * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else lr

    def _lr_in(self, epoch: int) -> float:
        return self.base_lr * self.gamma ** bisect.bisect_right(self.milestones, epoch)


def budget(config: Config, images: int) -> Budget:
    """The budget of a run over a training set of `images` images.

    Milestones may meet each other or the end of the run once they are divided by the cost. Raises
    ValueError if there is no full batch, or if the warm-up is as long as the run.
    """
    method, rows = config.method, config.optim.clean_batch
    cost = cost_per_image(method)
    divisor = cost if config.budget.same_budget else Fraction(1)
    loaded = rows + config.loader_adv_rows
    if images < loaded:
        raise ValueError(
            f"data.train has {images} images, fewer than one batch of {loaded}; lower"
            " optim.clean_batch"
        )
    steps = images // loaded
    epochs = divided(config.budget.epochs, divisor)
    warmup_steps = round(config.optim.warmup_epochs * steps)
    if warmup_steps >= epochs * steps:
        warmup = f"optim.warmup_epochs = {config.optim.warmup_epochs:g}"
        raise ValueError(
            f"{warmup} must be less than the {epochs} epoch(s) of this run (budget.epochs / cost)"
        )
    return Budget(
        epochs=epochs,
        milestones=tuple(divided(m, divisor) for m in config.budget.milestones),
        gamma=config.budget.gamma,
        steps_per_epoch=steps,
        image_passes_per_step=int(loaded * cost),
        base_lr=config.optim.lr * rows / 256,
        warmup_steps=warmup_steps,
    )
