"""The ways to train that the study compares, as data: a config, and what is other than it says.

A library of `bench.evidence`.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

BASE = "vanilla"
"""What every other arm is compared with."""
OURS = "fast_advprop"
OURS_STEPS = "fast_advprop_steps"
OURS_LATE = "fast_advprop_late"
CONTROL = "noise"
AUGMIX = "augmix"
OURS_AUGMIX = "fast_advprop_augmix"
THROUGH_BOTH = (OURS, OURS_STEPS, CONTROL, OURS_AUGMIX)
"""Measured through their auxiliary norms too."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    title: str
    config: str  # of configs/cifar10
    words: tuple[str, ...] = ()  # key=value, what is otherwise than in the config
    spends: Literal["passes", "steps"] = "passes"
    """As much of what as vanilla training: image passes, which is its cost, or optimiser steps."""
    vanilla_first: str = "0"
    """The share of the schedule that vanilla training makes: the arm goes on with its weights."""

    @property
    def begins(self) -> Fraction:
        """The share of the schedule that is over when the arm's own training begins."""
        return Fraction(self.vanilla_first)


def attacking(eps_255: float) -> tuple[str, ...]:
    """One attack step that reaches every corner of the ball."""
    return (f"method.eps_255={eps_255:g}", f"method.step_255={eps_255:g}")


# The radius where nothing else is said: that of the first trials at 32 px. The paper's is 1, on
# ImageNet at 224 px.
EPS_255 = 4
ATTACK = attacking(EPS_255)

ARMS = {
    BASE: Arm("vanilla", "vanilla"),
    OURS: Arm("Fast AdvProp", "fast_advprop", ATTACK),
    OURS_STEPS: Arm("Fast AdvProp, equal steps", "fast_advprop", ATTACK, spends="steps"),
    OURS_LATE: Arm(
        "Fast AdvProp, last 3/8 of the epochs", "fast_advprop", ATTACK, vanilla_first="5/8"
    ),
    CONTROL: Arm("noise control", "noise", ATTACK),
    "eps1": Arm("Fast AdvProp, eps 1", "fast_advprop", attacking(1)),
    "eps2": Arm("Fast AdvProp, eps 2", "fast_advprop", attacking(2)),
    "eps8": Arm("Fast AdvProp, eps 8", "fast_advprop", attacking(8)),
    "p11": Arm("Fast AdvProp, p_adv 1/9", "fast_advprop", (*ATTACK, "method.p_adv=1/9")),
    "p33": Arm("Fast AdvProp, p_adv 1/3", "fast_advprop", (*ATTACK, "method.p_adv=1/3")),
    "no_aux": Arm("Fast AdvProp, one set of norms", "fast_advprop", (*ATTACK, "method.aux=none")),
    "decoupled": Arm("decoupled training", "decoupled", ATTACK),
    "advprop": Arm("AdvProp, PGD-1", "advprop_pgd1", ATTACK),
    "adversarial_training": Arm("adversarial training", "adversarial_training", ATTACK),
    AUGMIX: Arm("AugMix", "vanilla", ("data.augment=augmix",)),
    OURS_AUGMIX: Arm("Fast AdvProp with AugMix", "fast_advprop", (*ATTACK, "data.augment=augmix")),
}
