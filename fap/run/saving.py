"""The checkpoints of a run: what is saved, gathered over the ranks, and resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fap.checkpoint import Checkpoints, DamagedCheckpoint
from fap.config import Config
from fap.distributed import Ranks
from fap.run.data import RunData
from fap.run.resume import check_same_data, check_same_groups, check_same_run, ranks_in_words
from fap.run.session import StopSignal
from fap.run_meta import RunMeta, run_meta
from fap.step.graph import out_of_memory
from fap.step.metrics import METRICS, OF_ROWS
from fap.step.step import Step
from fap.tasks.base import Result, Task
from fap.versions import versions
from pipelines.sizes import Size

# Of the step's state: every rank holds its own rows.
PER_RANK = {"carry.images_255", "carry.targets", "carry.partners", "carry.lam"}
# Tensors of an earlier version's checkpoints, and what they are called now.
RENAMED_TENSORS = {"carry.labels": "carry.targets"}


class NotSaved(RuntimeError):  # noqa: N818
    """The run's last checkpoint or its result could not be written.

    The message says which checkpoint is the last good one.
    """


def no_totals() -> dict[str, float]:
    return dict.fromkeys(METRICS, 0.0)


@dataclass
class Progress:
    """How far a run is: what its checkpoint says besides the step's tensors."""

    started: float  # of time.perf_counter; earlier by the seconds of the run's former processes
    best: Result  # the primary metric of the best epoch, and its number
    best_step: int | None = None  # whose checkpoint is that of the best epoch
    step: int = 0  # optimiser steps done
    closed: int = 0  # epochs evaluated and logged
    totals: dict[str, float] = field(default_factory=no_totals)  # of the epoch so far, by METRICS
    last: Result = field(default_factory=dict)  # the newest evaluation
    last_step: int | None = None  # of which step it is
    dropout: bool | None = None  # does a step draw from torch's generator? None: not known

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def add(self, metrics: Mapping[str, float]) -> None:
        self.totals = {name: self.totals[name] + value for name, value in metrics.items()}


class Saving:
    """The checkpoints of one run, written by its first rank and read by all."""

    def __init__(
        self,
        folder: Path,
        config: Config,  # with what run.amp came to: half precision has a loss scale
        data: RunData,
        step: Step,
        ranks: Ranks,
        stop: StopSignal,
        say: Callable[[str], Any],
    ) -> None:
        self.config = config
        self.data = data
        self.step = step
        self.ranks = ranks
        self.stop = stop
        self.say = say
        self.checkpoints = Checkpoints(folder, config.run.keep, say=say)
        self.saved: int | None = None  # step of the newest good checkpoint
        self.resumed: Path | None = None

    # ------------------------------------------------------------------ saving

    def save(self, progress: Progress) -> bool:
        """True, on every rank, if the checkpoint is on the disk.

        A failure costs the checkpoint, not the run.
        """
        meta = self._meta(progress)
        state = self._state_of_all_ranks()
        if self.ranks.first:
            with self.stop.saving():
                written = self._write(progress, state, meta)
            # The others wait for this one already: if one keeps it waiting, that one hangs.
            failed = self.ranks.any(not written)
        else:
            with self.stop.saving():  # which takes as long as the first rank's disk
                failed = self.ranks.any(False)
        if not failed:
            self.saved = progress.step
        return not failed

    def _meta(self, progress: Progress) -> dict[str, Any]:
        """What `fap.run_meta.RunMeta` reads."""
        return {
            "config": self.config.model_dump(mode="json"),
            "step": progress.step,
            "closed": progress.closed,
            "totals": progress.totals,
            "best": progress.best,
            "best_step": progress.best_step,
            "last": progress.last,
            "last_step": progress.last_step,
            "seconds": progress.seconds,
            "world": self.ranks.world,
            "dropout": progress.dropout,
            "versions": versions(),
            "train": self.data.train_identity,
            "val": self.data.val_identity,
        }

    def _state_of_all_ranks(self) -> dict[str, Tensor]:
        state = self.step.state() | {"metrics": self.step.metrics.of_all_ranks(self.ranks)}
        for name in sorted(PER_RANK & state.keys()):  # in the same order on every rank
            state[name] = self.ranks.gather_rows(state[name])
        return state

    def _write(self, progress: Progress, state: dict[str, Tensor], meta: dict[str, Any]) -> bool:
        step = progress.step
        try:
            self.checkpoints.save(step, state, meta, self._best_step(progress))
        except Exception as error:
            if not (isinstance(error, OSError) or out_of_memory(error)):
                raise
            self.say(f"warning: could not save step {step} ({error}); {self.last_good()}")
            return False
        return True

    def _best_step(self, progress: Progress) -> int | None:
        """Whose checkpoint is kept as the best one."""
        if not self.config.run.keep_best:
            return None
        return progress.best_step

    def names(self, progress: Progress) -> dict[str, str]:
        """Where a finished run's checkpoints lie in its folder; only the first rank may ask."""
        # An earlier process may have been killed after its last save.
        self.checkpoints.keep_best(self._best_step(progress))
        return self.checkpoints.names(progress.step)

    def last_good(self) -> str:
        """For a message: which checkpoint there is."""
        if self.saved is None:
            return "no step of it has been saved"
        return f"the last good checkpoint is that of step {self.saved} in {self.checkpoints.folder}"

    # ------------------------------------------------------------------ resuming

    def resume(self, task: Task, last_step: int, size_in: Callable[[int], Size]) -> Progress | None:
        """Put the newest checkpoint's state into the step; None where there is no checkpoint.

        `size_in` says which size of images an epoch has. The open one's is the carry's: also when
        the run was stopped after the epoch's last step, while it was evaluated.
        Raises DamagedCheckpoint, and ValueError for a checkpoint of another run.
        """
        found = self.checkpoints.newest()
        if found is None:
            return None
        path, tensors, written = found
        meta = run_meta(path, written)
        self._check(path, meta, task, last_step)
        self.step.resize(size_in(meta.closed))
        self.step.load_state(self._own_part(tensors))
        self.resumed = path
        self.saved = meta.step
        was = ""
        if meta.world != self.ranks.world:
            was = f", written by {ranks_in_words(meta.world)}"
        self.say(f"resuming {path} at step {meta.step}{was}")
        return Progress(
            started=time.perf_counter() - meta.seconds,
            best=meta.best,
            best_step=meta.best_step,
            step=meta.step,
            closed=meta.closed,
            totals=meta.totals,
            last=meta.last,
            last_step=meta.last_step,
            dropout=meta.dropout,
        )

    def _check(self, path: Path, meta: RunMeta, task: Task, last_step: int) -> None:
        if meta.totals.keys() != set(METRICS):
            raise DamagedCheckpoint(
                f"{path}: metadata: totals has other names than this version's metrics"
            )
        if task.primary not in meta.best:
            raise DamagedCheckpoint(f"{path}: metadata: best must hold {task.primary} and epoch")
        check_same_data("data.train", meta.train.model_dump(), self.data.train_identity, path)
        check_same_data("data.val", meta.val.model_dump(), self.data.val_identity, path)
        check_same_run(meta.config, self.config, path)
        check_same_groups(meta, self.config, self.ranks.world, path)
        if meta.step > last_step:
            raise ValueError(
                f"run.max_steps = {self.config.run.max_steps}, "
                f"but {path} is already at step {meta.step}"
            )

    def _own_part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of a saved state, by the names that it has now.

        Rows were saved in the order of the plan, whatever the number of ranks, which takes its
        slices of them as of everything else.
        """
        own = {RENAMED_TENSORS.get(name, name): tensor for name, tensor in tensors.items()}
        n_adv = self.step.n_adv
        first = self.ranks.rank * n_adv
        for name in PER_RANK & own.keys():
            own[name] = own[name][first : first + n_adv]
        if not self.ranks.first:  # saved as sums over all ranks, which the first one goes on with
            for name in OF_ROWS:
                own["metrics"][METRICS.index(name)] = 0
        return own
