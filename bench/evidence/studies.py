"""What the study trains: its parts, their regimes, arms and seeds.

A library of `bench.evidence`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

from bench.evidence.arms import (
    ARMS,
    AUGMIX,
    BASE,
    CONTROL,
    OURS,
    OURS_AUGMIX,
    OURS_LATE,
    OURS_STEPS,
)
from pipelines.machine import usable_cores


@dataclass(frozen=True)
class Regime:
    """How much there is to learn from, and how long."""

    images: int  # the first ones of CIFAR-10's training set
    epochs: int  # of vanilla training
    model: str = "cifar_resnet8"
    clean_batch: int = 64
    group_rows: int = 32  # two main batch-norm groups: both passes of Fast AdvProp's step are equal

    @property
    def name(self) -> str:
        return f"{self.model.removeprefix('cifar_')}_{self.images}images_{self.epochs}epochs"

    @property
    def title(self) -> str:
        network = self.model.removeprefix("cifar_").replace("resnet", "ResNet-")
        return f"{network}, {self.images:,} images, {self.epochs} epochs"

    @property
    def milestones(self) -> tuple[Fraction, Fraction]:
        """Shares of the schedule at which the learning rate falls to a tenth."""
        return Fraction(5, 8), Fraction(11, 12)


STRONGLY_ATTACKED_SEEDS = 1  # AutoAttack takes minutes for a run
# Fields of a study: numbers of test images.
TESTED = ("test", "corrupted", "attacked", "strongly_attacked")


class Run(NamedTuple):
    regime: Regime
    arm: str  # one of ARMS
    seed: int

    @property
    def name(self) -> str:
        return f"{self.regime.name}/{self.arm}/seed{self.seed}"


@dataclass(frozen=True)
class Part:
    """One question of the study: arms that are compared with one of them in some regimes."""

    question: str
    regimes: tuple[Regime, ...]
    arms: tuple[str, ...]
    seeds: int  # at most, from 0 on
    base: str = BASE  # the arm that the others are compared with

    def round(self, seed: int) -> Iterator[Run]:
        """The runs of one seed."""
        if seed < self.seeds:
            for regime in self.regimes:
                for arm in self.arms:
                    yield Run(regime, arm, seed)


@dataclass(frozen=True)
class Study:
    parts: dict[str, Part]  # by title
    test: int  # images that are evaluated clean
    corrupted: int  # the first of them, corrupted
    attacked: int  # the first of these, attacked

    strongly_attacked: int
    """By AutoAttack, of the headline's first seeds alone; 0: none are."""
    workers: int | None = None
    """Runs at once, each with its share of the cores; None: one for each core."""
    corrupt: tuple[str, ...] = ("all",)
    """`--corrupt` of fap-eval."""

    @property
    def headline(self) -> Part | None:
        """Of one regime; a study of some parts may lack it."""
        return self.parts.get("headline")

    @property
    def methods(self) -> Part | None:
        """The part of one regime with the most arms."""
        return self.parts.get("methods", self.headline)

    def only(self, titles: Sequence[str]) -> Study:
        """Some of its parts."""
        return replace(self, parts={title: self.parts[title] for title in titles})

    def with_images(self, count: int) -> Study:
        """The same with so many training images in every regime."""
        parts = {}
        for title, part in self.parts.items():
            regimes = tuple(replace(regime, images=count) for regime in part.regimes)
            parts[title] = replace(part, regimes=regimes)
        return replace(self, parts=parts)

    def in_headline(self, run: Run) -> bool:
        return self.headline is not None and run in self.headline.round(run.seed)

    def is_strongly_attacked(self, run: Run) -> bool:
        few = run.seed < STRONGLY_ATTACKED_SEEDS
        return bool(self.strongly_attacked) and few and self.in_headline(run)

    @property
    def side_by_side(self) -> int:
        """Runs at once."""
        return self.workers or usable_cores()

    @property
    def regimes(self) -> list[Regime]:
        """Each once."""
        return list(dict.fromkeys(one for part in self.parts.values() for one in part.regimes))

    def sizes(self) -> list[int]:
        """Of the training sets, in images."""
        return sorted({regime.images for regime in self.regimes})

    def tree(self) -> dict[str, Any]:
        """What the numbers of its rows depend on, as JSON: more seeds are the same study."""
        regimes = {regime.name: asdict(regime) for regime in self.regimes}
        arms = {name: asdict(ARMS[name]) for name in {run.arm for run in self.runs()}}
        tested = {name: getattr(self, name) for name in TESTED}
        return json.loads(json.dumps({"regimes": regimes, "arms": arms} | tested, sort_keys=True))

    def runs(self) -> list[Run]:
        """Every run once, in the order of training.

        Of the first seed all parts' runs, then the headline's other seeds, then of the other
        parts one seed after the other.
        """
        rounds = range(max(part.seeds for part in self.parts.values()))
        every = [run for part in self.parts.values() for run in part.round(0)]
        if self.headline is not None:
            every += [run for seed in rounds for run in self.headline.round(seed)]
        every += [
            run for seed in rounds for part in self.parts.values() for run in part.round(seed)
        ]
        return list(dict.fromkeys(every))


# Vanilla training has learnt its training set at 288 epochs: 99% of it is right.
SATURATED = Regime(images=500, epochs=288)

SMALL = Study(
    parts={
        "headline": Part(
            "Does Fast AdvProp pay where training is saturated, at equal cost and at equal steps?",
            (SATURATED,),
            (BASE, OURS, CONTROL, OURS_STEPS),
            seeds=5,
        ),
        "methods": Part(
            "Is it the adversarial direction, its radius, its share, the norms, or any noise?",
            (SATURATED,),
            tuple(ARMS),
            seeds=5,
        ),
        "saturation": Part(
            "How does the gain depend on how long is trained?",
            # Epochs of which Fast AdvProp's 7/9 are whole ones: equal to the image pass.
            tuple(Regime(images=500, epochs=epochs) for epochs in (36, 72, 144, 288, 576)),
            (BASE, OURS, OURS_LATE),
            seeds=5,
        ),
        "more images, a larger network": Part(
            "Does it hold with twice the images, or with nearly twice the layers?",
            (
                SATURATED,
                Regime(images=1_000, epochs=288),
                Regime(images=500, epochs=288, model="cifar_resnet14"),
            ),
            (BASE, OURS),
            seeds=5,
        ),
        "AugMix": Part(
            "Does Fast AdvProp add to AugMix?",
            (SATURATED,),
            (AUGMIX, OURS_AUGMIX),
            seeds=5,
            base=AUGMIX,
        ),
    },
    test=10_000,
    corrupted=2_000,
    attacked=500,
    strongly_attacked=100,
)

# One GPU: ResNet-18 on all of CIFAR-10, three arms side by side.
FULL = Study(
    parts={
        "headline": Part(
            "Does Fast AdvProp pay on all of CIFAR-10?",
            (
                Regime(
                    images=50_000, epochs=30, model="cifar_resnet18", clean_batch=256, group_rows=64
                ),
            ),
            (BASE, OURS, CONTROL),
            seeds=20,
        )
    },
    test=10_000,
    corrupted=10_000,
    attacked=1_000,
    strongly_attacked=200,
    workers=3,
)

STUDIES = {"small": SMALL, "full": FULL}
