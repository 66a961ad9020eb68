"""One run of the study: what `fap-train` is told, and its folder.

A library of `bench.evidence`.
"""

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from bench.commands import fap
from bench.evidence.arms import ARMS, BASE, Arm
from bench.evidence.studies import Regime, Run
from fap import run_settings
from fap.budget import budget
from fap.config import Config, load_config
from pipelines.machine import usable_cores


@dataclass(frozen=True)
class Runs:
    """The runs of a study, each trained once, in `folder`."""

    folder: Path
    train: dict[int, Path]  # `.beton` by the number of its images
    test: Path
    pipeline: str
    workers: int
    """Runs side by side: each gets its share of the cores."""

    def folder_of(self, run: Run) -> Path:
        return self.folder / run.name

    @property
    def threads(self) -> int:
        return max(1, usable_cores() // self.workers)

    def log_of(self, run: Run) -> Path:
        return self.folder / "logs" / f"{run.name.replace('/', '-')}.log"

    def finished(self, run: Run) -> bool:
        """Raises SystemExit for a run that was trained with other settings."""
        folder = self.folder_of(run)
        if not (folder / "result.json").exists():
            return False
        trained = load_config(str(folder / "config.yaml"), [])
        if settings_of(trained) != settings_of(self.config(run)):
            raise SystemExit(
                f"{folder} was trained with other settings than the study's; move it away"
            )
        return True

    def checkpoint(self, run: Run) -> Path:
        """The last one of a finished run."""
        return sorted((self.folder_of(run) / "checkpoints").glob("step_*.safetensors"))[-1]

    def config(self, run: Run) -> Config:
        file, *words = self.words(run)
        return load_config(file, [word for word in words if word != "resume=auto"])

    def train_one(self, run: Run) -> None:
        """The run, or what is left of it."""
        if self.finished(run):
            return
        resumed = (self.folder_of(run) / "checkpoints").exists()
        seconds = fap("train", *self.words(run), log=self.log_of(run), threads=self.threads)
        if not resumed:  # the rest of an interrupted run has the seconds of a rest
            (self.folder_of(run) / "cpu_seconds.json").write_text(json.dumps(seconds))

    def words(self, run: Run) -> list[str]:
        """Those of fap-train."""
        regime, name, seed = run
        arm = ARMS[name]
        epochs = epochs_of(arm, regime)
        milestones = sorted({round(share * epochs) for share in regime.milestones} - {0, epochs})
        return [
            config_file(arm),
            *words_of(arm, regime),
            f"name={name}",
            f"seed={seed}",
            f"budget.epochs={epochs}",
            f"budget.milestones={milestones}",
            f"data.train={self.train[regime.images]}",
            f"data.val={self.test}",
            f"data.pipeline={self.pipeline}",
            f"data.threads={self.threads}",
            f"run.dir={self.folder / regime.name}",
            f"run.eval_every={epochs}",
            "run.keep=1",
            "run.keep_best=false",
            f"run.torch_threads={self.threads}",
            "resume=auto",
        ]


LOADING = ("data.pipeline", "data.decode")  # all loaders give the same rows


def settings_of(config: Config) -> dict[str, Any]:
    """What a run's result depends on, whatever loads its data."""
    every = run_settings.settings_of(config)
    return {field: value for field, value in every.items() if field not in LOADING}


def config_file(arm: Arm) -> str:
    return f"configs/cifar10/{arm.config}.yaml"


def words_of(arm: Arm, regime: Regime) -> list[str]:
    """What says how an arm trains, but for how long."""
    return [
        *arm.words,
        f"model.name={regime.model}",
        f"method.group_rows={regime.group_rows}",
        f"optim.clean_batch={regime.clean_batch}",
        # The study computes the epochs itself: same_budget would forget the rows that are left
        # over at the end of every epoch, which are more of 80 rows a step than of 64.
        "budget.same_budget=false",
    ]


def epochs_of(arm: Arm, regime: Regime) -> int:
    """As many as spend what vanilla training spends, to the nearest whole one."""
    base = _in_one_epoch(ARMS[BASE], regime)[arm.spends]
    own = _in_one_epoch(arm, regime)[arm.spends]
    return max(1, round(Fraction(regime.epochs * base, own)))


def _in_one_epoch(arm: Arm, regime: Regime) -> dict[str, int]:
    words = [*words_of(arm, regime), "budget.epochs=1", "budget.milestones=[]"]
    one = budget(load_config(config_file(arm), words), regime.images)
    return {"passes": one.image_passes, "steps": one.steps}
