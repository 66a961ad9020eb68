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
    return method.entry.cost_per_image(method.p_adv, method.attack_steps, method.attack_loss)


def divided(epochs: int, cost: Fraction) -> int:
    """epochs / cost to the nearest whole epoch, at least 1.

    Ties go down: 105 / 1.2 = 87.5 gives 87, as in Table 4.
    """
    return max(1, nearest(epochs / cost))


@dataclass(frozen=True)
class Fall:
    """A learning rate, and where it begins to hold."""

    lr: float
    epoch: int  # counted from 0
    step: int  # counted from 0 over the whole run
    milestones: int  # how many meet here; each multiplies by gamma


@dataclass(frozen=True)
class Budget:
    """What one run does, and at which learning rate."""

    epochs: int
    milestones: tuple[int, ...]  # epochs, ascending
    gamma: float
    steps_per_epoch: int  # full batches; a partial last batch is dropped
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
        """Where the learning rate falls, apart from the warm-up.

        A milestone at which the run has ended is among them.
        """
        return [
            Fall(
                lr=self._lr_in(epoch),
                epoch=epoch,
                step=epoch * self.steps_per_epoch,
                milestones=self.milestones.count(epoch),
            )
            for epoch in sorted(set(self.milestones))
        ]

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over the whole run."""
        lr = self._lr_in(step // self.steps_per_epoch)
        if self.warmup_steps:
            lr *= min(1.0, (step + 1) / self.warmup_steps)
        return lr

    def _lr_in(self, epoch: int) -> float:
        """Of an epoch, counted from 0, without the warm-up."""
        n_passed = bisect.bisect_right(self.milestones, epoch)
        return self.base_lr * self.gamma**n_passed


def budget(config: Config, n_images: int) -> Budget:
    """The budget of a run over a training set of `n_images` images.

    Milestones may meet each other or the end of the run once they are divided by the cost.

    Raises:
        ValueError: there is no full batch, or the warm-up is as long as the run.
    """
    clean_rows = config.optim.clean_batch
    loaded_rows = clean_rows + config.loader_adv_rows
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
            f"optim.warmup_epochs = {config.optim.warmup_epochs:g} must be less than the "
            f"{epochs} epoch(s) of this run (budget.epochs / cost)"
        )
    return Budget(
        epochs=epochs,
        milestones=tuple(divided(epoch, divisor) for epoch in config.budget.milestones),
        gamma=config.budget.gamma,
        steps_per_epoch=steps_per_epoch,
        image_passes_per_step=int(loaded_rows * cost),
        base_lr=config.optim.lr * clean_rows / LR_ROWS,
        warmup_steps=warmup_steps,
    )
