"""One run of the study: what `fap-train` is told, and its folder.

A library of `bench.evidence`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
        """How the arm itself trains, after what vanilla training may have made first."""
        return config_of(self.words(run))

    def stages(self, run: Run) -> list[Config]:
        """One after the other: what vanilla training makes first, and the arm itself."""
        first = [config_of(self.first_words(run))] if ARMS[run.arm].begins else []
        return [*first, self.config(run)]

    def results(self, run: Run) -> list[dict[str, Any]]:
        """What `fap-train` wrote of a finished run, by stage."""
        folders = [self.first_folder_of(run)] if ARMS[run.arm].begins else []
        folders.append(self.folder_of(run))
        return [json.loads((folder / "result.json").read_text()) for folder in folders]

    def train_one(self, run: Run) -> None:
        """The run, or what is left of it."""
        if self.finished(run):
            return
        commands = [self.words(run)]
        if ARMS[run.arm].begins:
            commands.insert(0, self.first_words(run))
        resumed = (self.folder_of(run) / "checkpoints").exists()
        resumed |= (self.first_folder_of(run) / "checkpoints").exists()
        seconds = sum(
            fap("train", *words, log=self.log_of(run), threads=self.threads) for words in commands
        )
        if not resumed:  # the rest of an interrupted run has the seconds of a rest
            (self.folder_of(run) / "cpu_seconds.json").write_text(json.dumps(seconds))

    def first_folder_of(self, run: Run) -> Path:
        """What vanilla training makes first."""
        regime, arm, seed = run
        return self.folder / regime.name / first_name(arm) / f"seed{seed}"

    def words(self, run: Run) -> list[str]:
        """Those of fap-train: the arm's own training."""
        regime, name, _ = run
        arm = ARMS[name]
        words = self._words(run, arm, name, Stretch(arm.begins, Fraction(1)))
        if arm.begins:
            config = load_config(config_file(arm), words_of(arm, regime))
            over = sum(share <= arm.begins for share in regime.milestones)
            words.append(f"optim.lr={config.optim.lr * config.budget.gamma**over:g}")
            words.append(f"model.init={self.first_folder_of(run)}")
        return words

    def first_words(self, run: Run) -> list[str]:
        """Those of fap-train: what vanilla training makes first."""
        stretch = Stretch(Fraction(0), ARMS[run.arm].begins)
        return self._words(run, ARMS[BASE], first_name(run.arm), stretch)

    def _words(self, run: Run, arm: Arm, name: str, stretch: Stretch) -> list[str]:
        """Those of fap-train for a stretch of the schedule."""
        regime = run.regime
        epochs = epochs_of(arm, regime, stretch)
        milestones = sorted(
            {
                round(stretch.within(share) * epochs)
                for share in regime.milestones
                if share in stretch
            }
            - {0, epochs}
        )
        return [
            config_file(arm),
            *words_of(arm, regime),
            f"name={name}",
            f"seed={run.seed}",
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


@dataclass(frozen=True)
class Stretch:
    """A part of the schedule, from one share of it to another."""

    begin: Fraction
    end: Fraction

    @property
    def length(self) -> Fraction:
        return self.end - self.begin

    def __contains__(self, share: Fraction) -> bool:
        return self.begin < share < self.end

    def within(self, share: Fraction) -> Fraction:
        """A share of the schedule as one of the stretch."""
        return (share - self.begin) / self.length


WHOLE = Stretch(Fraction(0), Fraction(1))


def first_name(arm: str) -> str:
    """Of what vanilla training makes before an arm."""
    return f"before_{arm}"


def config_of(words: Sequence[str]) -> Config:
    file, *overrides = words
    return load_config(file, [word for word in overrides if word != "resume=auto"])


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


def epochs_of(arm: Arm, regime: Regime, stretch: Stretch = WHOLE) -> int:
    """As many as spend what vanilla training spends in that stretch, to the nearest whole one."""
    base = _in_one_epoch(ARMS[BASE], regime)[arm.spends]
    own = _in_one_epoch(arm, regime)[arm.spends]
    return max(1, round(stretch.length * Fraction(regime.epochs * base, own)))


def _in_one_epoch(arm: Arm, regime: Regime) -> dict[str, int]:
    words = [*words_of(arm, regime), "budget.epochs=1", "budget.milestones=[]"]
    one = budget(load_config(config_file(arm), words), regime.images)
    return {"passes": one.image_passes, "steps": one.steps}
