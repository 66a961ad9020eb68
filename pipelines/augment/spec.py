"""What of the augmentation stays fixed for a run, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.augment.policies import POLICIES, SPACES, Policy

MOST_OPS = 10
# (brightness, contrast, saturation, hue)
ColorJitter = tuple[float, float, float, float]


def magnitude_range(policy: Policy) -> tuple[int, int]:
    """The least and the greatest `magnitude`: a bin, or for `augmix` a number of bins."""
    bins = SPACES[policy].bins
    if policy == "augmix":
        return 1, bins
    return 0, bins - 1


@dataclass(frozen=True)
class AugmentSpec:
    """Operations of a policy, then colours, then erasing: each as torchvision's transform.

    `randaugment`: `n_ops` operations of bin `magnitude` (0..30). `trivialaugment`: one, of any bin.
    `augmix`: three chains of one to three operations, of the first `magnitude` bins (1..10), mixed.
    `autoaugment`: the two operations of one of ImageNet's 25 pairs. What they move out of the
    canvas is gone; what they uncover is black.

    Raises:
        ValueError: a field out of range.
    """

    policy: Policy | None = None
    n_ops: int = 2
    magnitude: int = 9
    color_jitter: ColorJitter | None = None
    """How far from 1 the factors of brightness, contrast and saturation may be, and how much of the
    colour circle the hue may turn, at most one half."""
    erase: float = 0.0
    """Probability that a random box of a row becomes noise."""
    on: Literal["both", "clean", "adv"] = "both"
    """Of the loaded rows."""

    @property
    def changes(self) -> bool:
        """Whether it changes anything."""
        return self.policy is not None or self.color_jitter is not None or self.erase > 0

    @property
    def moves(self) -> bool:
        """Whether it moves or hides what a picture shows, which boxes would not follow."""
        return self.policy is not None or self.erase > 0

    def __post_init__(self) -> None:
        if self.policy not in (None, *POLICIES):
            raise ValueError(f"policy = {self.policy!r}: must be one of {', '.join(POLICIES)}")
        if not 1 <= self.n_ops <= MOST_OPS:
            raise ValueError(f"n_ops = {self.n_ops}: must be from 1 to {MOST_OPS}")
        least, most = magnitude_range(self.policy or "randaugment")
        if not least <= self.magnitude <= most:
            raise ValueError(f"magnitude = {self.magnitude}: must be from {least} to {most}")
        if not 0 <= self.erase <= 1:
            raise ValueError(f"erase = {self.erase}: must be from 0 to 1")
        jitter = self.color_jitter
        if jitter is not None and not (min(jitter) >= 0 and max(jitter) > 0 and jitter[3] <= 0.5):
            raise ValueError(
                f"color_jitter = {jitter}: must be (brightness, contrast, saturation, hue), none"
                " below 0, not all 0, hue at most 0.5"
            )
        if self.on not in ("both", "clean", "adv"):
            raise ValueError(f"on = {self.on!r}: must be 'both', 'clean' or 'adv'")


NO_AUGMENT = AugmentSpec()
