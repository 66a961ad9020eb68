"""The section `budget`: epochs, and the learning rate over them."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo
from pydantic.functional_validators import field_validator, model_validator

from fap.fields import UNSET, NonNegativeFloat, PositiveInt, Section, Share
from pipelines.files import shown

PAPER_EPOCHS = 105  # section 4.1, with the milestones
PAPER_MILESTONES = (30, 60, 90, 100)
PAPER_GAMMA = 0.1

LrSchedule = Literal["milestones", "cosine", "linear", "constant"]
# The fields of `budget` that only some of them have a meaning for.
OF_LR_SCHEDULE: dict[LrSchedule, tuple[str, ...]] = {
    "milestones": ("milestones", "gamma"),
    "cosine": ("final_lr",),
    "linear": ("final_lr",),
    "constant": (),
}


def nearest(value: Fraction) -> int:
    """The nearest whole number, ties down: 87.5 epochs are 87, as in Table 4."""
    return math.ceil(value - Fraction(1, 2))


def exact(value: float) -> Fraction:
    """What a number in a config says: 0.1 is a tenth."""
    return Fraction(str(value))


def paper_milestones(epochs: int) -> tuple[int, ...]:
    """The paper's 30/60/90/100 of 105, scaled to `epochs`.

    What would meet another one or the end is left out.
    """
    milestones: list[int] = []
    last = 0
    for milestone in PAPER_MILESTONES:
        epoch = nearest(Fraction(milestone * epochs, PAPER_EPOCHS))
        if last < epoch < epochs:
            milestones.append(epoch)
            last = epoch
    return tuple(milestones)


class BudgetConfig(Section):
    epochs: PositiveInt = PAPER_EPOCHS
    """Epochs of vanilla training; other methods run epochs / cost (section 4.1)."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs of vanilla training over which the rate rises from 0, step by step; divided by the
    cost, like `epochs` and `milestones`, so it is the same share of every method's training."""
    lr_schedule: LrSchedule = "milestones"
    """The rate after the warm-up: the paper's falls at `milestones`, half a cosine or a straight
    line over all steps down to `final_lr`, or a constant."""
    milestones: Annotated[
        Annotated[tuple[PositiveInt, ...], Field(strict=False, max_length=100)] | None,
        Field(validate_default=True),
    ] = UNSET
    """Epochs of vanilla training after which the learning rate is multiplied by gamma; [] for
    none. Unset: the paper's 30, 60, 90 and 100 of 105, scaled to `epochs`."""
    gamma: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Field(validate_default=True)] = (
        UNSET
    )
    """Unset: 0.1."""
    final_lr: Annotated[Share | None, Field(validate_default=True)] = UNSET
    """Of cosine and linear: the share of the highest rate at which they end. Unset: 0."""
    same_budget: bool = True
    """False: as many epochs as vanilla, at (K + 2) or (1 + p_adv K) times its cost."""

    @field_validator("milestones", "gamma", "final_lr", mode="before")
    @classmethod
    def _fill(cls, given: Any, info: ValidationInfo) -> Any:
        """Replace what is unset, and refuse what has no meaning for the schedule."""
        schedule = info.data.get("lr_schedule")
        field = info.field_name
        if schedule is None:  # it is wrong, which is an error of its own
            return given
        if field not in OF_LR_SCHEDULE[schedule]:
            if given is None:
                return None
            raise ValueError(
                f"budget.{field} = {shown(given)} has no meaning for "
                f"budget.lr_schedule = {schedule!r}; leave it out, or write null"
            )
        if given is not None:
            return given
        match field:
            case "milestones":
                # `epochs` is absent only if it is wrong, which is an error of its own.
                return paper_milestones(info.data.get("epochs", PAPER_EPOCHS))
            case "gamma":
                return PAPER_GAMMA
            case _:
                return 0.0

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        if self.milestones is None:
            return self
        ascending = all(a < b for a, b in pairwise(self.milestones))
        in_time = all(milestone < self.epochs for milestone in self.milestones)
        if not (ascending and in_time):
            scaled = list(paper_milestones(self.epochs))
            raise ValueError(
                f"budget.milestones = {shown(list(self.milestones))} with "
                f"budget.epochs = {self.epochs}: must be strictly ascending and below "
                f"budget.epochs; null means the paper's, scaled: {scaled}"
            )
        return self
