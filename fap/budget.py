"""The training budget: image passes, and the epochs and learning rate that spend it.

The unit is the image pass, one image forward and backward once. Section 4.1 of the paper divides
epochs and milestones by a method's image passes per image (`fap.methods.Method.cost_per_image`).
"""

import bisect
from dataclasses import dataclass
from fractions import Fraction

from fap.config import Config
from fap.sections import MethodConfig, nearest

LR_ROWS = 256  # clean rows for which `optim.lr` is given (section 4.1)


def cost_per_image(method: MethodConfig) -> Fraction:
    """Image passes per image of the epoch."""
    return method.entry.cost_per_image(method.p_adv, method.attack_steps)


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


def budget(config: Config, n_images: int) -> Budget:
    """The budget of a run over a training set of `n_images` images.

    Milestones may meet each other or the end of the run once they are divided by the cost.
    Raises ValueError if there is no full batch, or if the warm-up is as long as the run.
    """
    rows = config.optim.clean_batch
    loaded_rows = rows + config.loader_adv_rows
    if n_images < loaded_rows:
        raise ValueError(
            f"data.train has {n_images} images, fewer than one batch of {loaded_rows}; "
            "lower optim.clean_batch"
        )
    cost = cost_per_image(config.method)
    divisor = Fraction(1)
    if config.budget.same_budget:
        divisor = cost
    epochs = divided(config.budget.epochs, divisor)
    steps_per_epoch = n_images // loaded_rows
    warmup_steps = round(config.optim.warmup_epochs * steps_per_epoch)
    if warmup_steps >= epochs * steps_per_epoch:
        raise ValueError(
            f"optim.warmup_epochs = {config.optim.warmup_epochs:g} must be less than "
            f"the {epochs} epoch(s) of this run (budget.epochs / cost)"
        )
    return Budget(
        epochs=epochs,
        milestones=tuple(divided(epoch, divisor) for epoch in config.budget.milestones),
        gamma=config.budget.gamma,
        steps_per_epoch=steps_per_epoch,
        image_passes_per_step=int(loaded_rows * cost),
        base_lr=config.optim.lr * rows / LR_ROWS,
        warmup_steps=warmup_steps,
    )
