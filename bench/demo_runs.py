"""Which runs a demo makes, and of what length: equal cost is equal to the image pass.

A library of `bench.demo`; it writes nothing.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from bench import demo_words
from bench.cifar import Files
from bench.demo_common import RunsInAFolder
from bench.demo_words import BASE, EQUAL_COST, EQUAL_STEPS
from fap.budget import Budget, budget
from fap.config import Config, load_config
from pipelines.corrupt import NAMES, QUICK

MODEL = "cifar_resnet8"
CLEAN_BATCH = 64
ROWS = 80  # that Fast AdvProp reads per step: the clean ones and 1/5 for the attack
PASSES = 96  # image passes of its step: 64 clean, 16 noisy, 16 adversarial
GROUP_ROWS = 32  # two main batch-norm groups per step, so both passes of a step are equally large
EPS_255 = 4
CONFIGS = {  # of configs/cifar10 and configs/imagenet
    BASE: "vanilla",
    EQUAL_COST: "fast_advprop",
    EQUAL_STEPS: "fast_advprop",
}


@dataclass(frozen=True)
class Size:
    """How much a demo trains and measures.

    `epochs` must give every arm whole ones, see `Demo.share`: then equal cost is equal to the image
    pass.
    """

    images: int
    test: int
    attacked: int  # test images
    seeds: int
    epochs: int  # of vanilla training
    milestones: tuple[int, ...]  # likewise
    arms: tuple[str, ...]
    corrupt: tuple[str, ...]  # at severity 3
    rounds: int  # of the measurement of cost


FULL = Size(
    images=500,
    test=2_000,
    attacked=2_000,
    seeds=3,
    epochs=234,
    milestones=(146, 214),
    arms=(BASE, EQUAL_COST, EQUAL_STEPS),
    corrupt=NAMES,
    rounds=20,
)
FAST = Size(
    images=500,
    test=1_000,
    attacked=500,
    seeds=2,
    epochs=36,
    milestones=(22, 32),
    arms=(BASE, EQUAL_COST),
    corrupt=QUICK,
    rounds=8,
)


@dataclass(frozen=True)
class Demo(RunsInAFolder):
    """What every part of one demo needs."""

    size: Size
    pipeline: str
    folder: Path
    files: Files

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Arm and seed: of the first seed all arms, then of the next."""
        return [(arm, seed) for seed in range(self.size.seeds) for arm in self.size.arms]

    def share(self, arm: str) -> Fraction:
        """Epochs of an arm per epoch of vanilla training."""
        steps = self.size.images // CLEAN_BATCH  # of an epoch
        our_steps = self.size.images // ROWS
        match arm:
            case demo_words.BASE:
                return Fraction(1)
            case demo_words.EQUAL_COST:
                return Fraction(steps * CLEAN_BATCH, our_steps * PASSES)
            case demo_words.EQUAL_STEPS:
                return Fraction(steps, our_steps)
        raise ValueError(f"arm = {arm!r}: must be one of {', '.join(CONFIGS)}")

    def words(self, arm: str, seed: int) -> list[str]:
        """fap-train's words for one run."""
        share = self.share(arm)
        epochs = share * self.size.epochs
        assert epochs.denominator == 1, f"{arm}: {epochs} epochs"
        milestones = [int(share * m) for m in self.size.milestones]
        words = []
        if arm != BASE:
            # same_budget would divide the epochs by 1.2 and forget the rows that are left over at
            # the end of each: 500 images are 7 batches of 64 and 6 of 80, and Fast AdvProp would
            # get 7% more image passes than vanilla.
            words = [f"method.eps_255={EPS_255}", "budget.same_budget=false"]
        return [
            *words,
            f"name={arm}",
            f"seed={seed}",
            f"model.name={MODEL}",
            "model.num_classes=10",
            f"method.group_rows={GROUP_ROWS}",
            f"optim.clean_batch={CLEAN_BATCH}",
            f"budget.epochs={epochs}",
            f"budget.milestones={milestones}",
            f"data.train={self.files['train']}",
            f"data.val={self.files['test']}",
            f"data.pipeline={self.pipeline}",
            "data.threads=1",
            f"run.dir={self.folder}",
            f"run.eval_every={epochs}",
            "run.torch_threads=1",
            "resume=auto",
        ]

    def config_file(self, arm: str) -> str:
        return f"configs/cifar10/{CONFIGS[arm]}.yaml"

    def command(self, arm: str, seed: int) -> list[str]:
        return [self.config_file(arm), *self.words(arm, seed)]

    def config(self, arm: str) -> Config:
        """Of the arm's run of seed 0."""
        return load_config(self.config_file(arm), self.words(arm, seed=0))

    def budget(self, arm: str) -> Budget:
        return budget(self.config(arm), self.size.images)
