"""The training budget: image passes, and the epochs and learning rate that spend it.

The unit is the image pass, one image forward and backward once. Section 4.1 of the paper divides
epochs and milestones by a method's image passes per image (`fap.methods.Method.cost_per_image`).
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fap.config import Config
from fap.rates import Rates
from fap.sections import MethodConfig
from fap.sections.budget import exact, nearest
from pipelines.sizes import Size

LR_ROWS = 256  # clean rows for which `optim.lr` is given (section 4.1)


def cost_per_image(method: MethodConfig) -> Fraction:
    """Image passes per image of the epoch."""
    return method.cost_per_image


def divided(epochs: int, cost: Fraction) -> int:
    """epochs / cost to the nearest whole epoch, at least 1.

    Ties go down: 105 / 1.2 = 87.5 gives 87, as in Table 4.
    """
    return max(1, nearest(epochs / cost))


@dataclass(frozen=True)
class Budget:
    """What one run does, and at which learning rates."""

    epochs: int
    steps_per_epoch: int  # full batches; a partial last batch is dropped
    image_passes_per_step: int  # over all ranks
    rates: Rates
    sizes: tuple[tuple[int, Size], ...]  # epochs, ascending from 0: what is trained from each on

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def image_passes(self) -> int:
        return self.steps * self.image_passes_per_step

    def size_in(self, epoch: int) -> Size:
        """What is trained in an epoch, counted from 0; after the run as in its last one.

        Of sizes that meet in one epoch the last one holds.
        """
        epoch = min(epoch, self.epochs - 1)
        held = [size for first, size in self.sizes if first <= epoch]
        return held[-1]

    def by_size(self, epochs: range) -> list[tuple[Size, range]]:
        """`epochs` in parts of one size; at least one part, which may be empty."""
        changes = [first for first, _ in self.sizes if epochs.start < first < epochs.stop]
        starts = sorted({epochs.start, *changes})
        ends = [*starts[1:], epochs.stop]
        parts = zip(starts, ends, strict=True)
        return [(self.size_in(start), range(start, end)) for start, end in parts]


def budget(config: Config, n_images: int) -> Budget:
    """The budget of a run over a training set of `n_images` images.

    Epochs, milestones and warm-up are divided by the cost: the warm-up to the nearest step, the
    others to whole epochs, so milestones may meet each other or the end of the run.

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
    return Budget(
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        image_passes_per_step=int(loaded_rows * cost),
        rates=_rates(config, divisor, epochs, steps_per_epoch),
        sizes=_sizes(config, divisor),
    )


def _sizes(config: Config, divisor: Fraction) -> tuple[tuple[int, Size], ...]:
    if config.data.sizes is None:
        return ((0, config.data.size),)
    first, *later = config.data.sizes
    return (first, *((divided(epoch, divisor), size) for epoch, size in later))


def _rates(config: Config, divisor: Fraction, epochs: int, steps_per_epoch: int) -> Rates:
    section = config.budget
    warmup_epochs = exact(section.warmup_epochs) / divisor
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if warmup_steps >= epochs * steps_per_epoch:
        raise ValueError(
            f"budget.warmup_epochs = {section.warmup_epochs:g} gives {float(warmup_epochs):.4g} "
            f"epochs of this run; they must be less than its {epochs} (budget.epochs / cost)"
        )
    shape: dict[str, Any] = {}
    if section.milestones is not None and section.gamma is not None:
        shape["milestones"] = tuple(divided(epoch, divisor) for epoch in section.milestones)
        shape["gamma"] = section.gamma
    if section.final_lr is not None:
        shape["final"] = section.final_lr
    return Rates(
        schedule=section.lr_schedule,
        peak=config.optim.lr * config.optim.clean_batch / LR_ROWS,
        steps=epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_steps,
        **shape,
    )
