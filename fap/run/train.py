"""The training run: joins plan, loader, step, checkpoints, log and evaluation. The loop is
`Run.train`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipelines
from fap.budget import budget
from fap.checkpoint import Checkpoints, run_meta
from fap.config import Config, make_config, with_classes
from fap.distributed import ONE_RANK, Ranks, Votes
from fap.draws import dropout_seed
from fap.evaluate.exact import evaluate
from fap.methods import KINDS
from fap.nets.build import prepare
from fap.nets.pretrained import load_init
from fap.run.data import open_data
from fap.run.folder import RunFolder
from fap.run.log import Log
from fap.run.resume import check_same_data, check_same_run, checksum_of, facts
from fap.run.session import (
    Interrupted,
    StopSignal,
    Stopwatch,
    limit_threads,
    norm_kernel,
    set_up_torch,
)
from fap.run.summary import describe
from fap.step.graph import out_of_memory, runner
from fap.step.half import Amp
from fap.step.metrics import METRICS, rates
from fap.step.step import Step
from fap.tasks import make_task
from fap.tasks.base import Result, Task
from fap.versions import versions
from pipelines.ahead import run_ahead
from pipelines.files import write_whole

# Of the step's state: every rank holds its own rows.
PER_RANK = {"carry.images_255", "carry.targets"}
# Of an earlier version's checkpoints.
RENAMED_TENSORS = {"carry.labels": "carry.targets"}


class NonFinite(RuntimeError):  # noqa: N818
    """Too many steps in a row had a non-finite loss or gradient."""


class NotSaved(RuntimeError):  # noqa: N818
    """The run's last checkpoint or its result could not be written. The message says which
    checkpoint is the last good one.
    """


class Run:
    """One training run in `<run.dir>/<name>/seed<k>`, where nothing is written before the first
    step is done.

    `stop`, entered by the caller, notes the signals that ask the run to leave; without it none
    does. Raises ValueError for users' mistakes. All ranks raise if one does, or if they would not
    train the same run.
    """

    def __init__(
        self, config: Config, ranks: Ranks = ONE_RANK, stop: StopSignal | None = None
    ) -> None:
        self.started = time.perf_counter()
        self.ranks = ranks
        self.stop = stop or StopSignal()
        self.votes = Votes(ranks)
        self.run_folder = RunFolder(
            Path(config.run.dir) / config.name / f"seed{config.seed}", self._say
        )
        self.folder = self.run_folder.path
        self.done = 0  # optimiser steps
        self.closed = 0  # epochs evaluated and logged
        self.totals = dict.fromkeys(METRICS, 0.0)  # of the epoch so far
        self.last: dict[str, float] = {}
        self.resumed: Path | None = None
        self.saved: int | None = None  # step of the newest good checkpoint
        self.log: Log | None = None  # from the first step on
        try:
            with ranks.together():
                self._prepare(config)
                known = facts(
                    self._settled(), self.data.train_identity, self.data.val_identity, self.resumed
                )
            ranks.check_same(known | {"device": self.device.type, "weights": self.weights})
        except BaseException:
            self.run_folder.release()
            raise

    def _prepare(self, config: Config) -> None:
        """Everything before the first step that can fail without the other ranks."""
        self.device = self.ranks.device(config.run.device)
        self.amp: Amp = "fp16" if self.device.type == "cuda" else "off"
        if config.run.amp != "auto":
            self.amp = config.run.amp
        limit_threads(config.run.torch_threads)
        set_up_torch(self.device)

        self.norm_kernel = norm_kernel(config, self.device)
        self.data = open_data(config)
        self.config = config = with_classes(config, self.data.n_classes)
        self.budget = budget(config, len(self.data.train))
        self.steps = min(self.budget.steps, config.run.max_steps or self.budget.steps)
        self.task = make_task(config)
        self.best: dict[str, float] = {self.task.primary: -1.0, "epoch": 0}
        self.spec = plan_spec(config, self.ranks)

        torch.manual_seed(config.seed)
        aux = config.method.entry.has_aux
        self.model = prepare(self.task.plain_model(), aux=aux, size=config.data.size)
        if config.model.init:
            load_init(self.model, config.model.init, config, self._say)
        self.weights = checksum_of(self.model.state_dict())
        self.model.to(self.device)
        self.step = Step(self.model, config, self.ranks, amp=self.amp, task=self.task)
        self.step.network.norm_state.kernel = self.norm_kernel
        if config.run.compile:
            self.step.network.forward = torch.compile(self.model)

        self._say(
            "\n".join(
                [
                    describe(config, self.budget, self.step, self.spec.shuffle_groups),
                    *self.data.lines,
                ]
            )
        )
        if self.ranks.first:
            self.run_folder.take(may_go_on=config.resume == "auto")
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.run.keep, say=self._say)
        if config.resume == "auto" and (found := self.checkpoints.newest()):
            self._resume(*found)

    # ------------------------------------------------------------------ the loop

    def train(self) -> dict[str, Any]:
        """Train to the end of the budget; the result is also written to `result.json`. Can be
        called once.

        Raises Interrupted, NonFinite, NotSaved, and before the first step
        `fap.step.graph.FreshProcessNeeded`.
        """
        try:
            with self.ranks.together():
                loader = self._open_loader(self.data.train)
            with self._closing(loader):
                return self._train(loader)
        finally:
            if self.log is not None:
                self.log.close()
            self.run_folder.release()

    def _train(self, loader: pipelines.Loader) -> dict[str, Any]:
        run, per_epoch = self.config.run, self.budget.steps_per_epoch
        run_step, how = runner(self.step, run.graph)
        self._say(
            f"training from step {self.done} to {self.steps}, {how}, AMP {self.amp}, on"
            f" {self.device}"
        )
        self.stop.run_begins()
        for plan in self._plans():
            first = plan.epoch * per_epoch
            todo = range(self.done, min(first + per_epoch, self.steps))
            draws, waiting = self._draws(plan), Stopwatch()
            # Once per epoch: no step waits for a copy to the device.
            targets = self.task.targets(self.data.train, plan).to(self.device)
            for step, batch in zip(
                todo, waiting.on(loader.load(plan, self.done - first)), strict=False
            ):
                lr = self.budget.lr_at(step)
                torch.manual_seed(dropout_seed(self.config.seed, step, self.ranks.rank))
                row = {name: values[batch.step] for name, values in draws.items()}
                self.step.feed(batch.images, targets[batch.step], lr, **row)
                run_step()
                self.log = self.log or self._begin()  # the first step is done: the run can start
                self.done = step + 1
                self.log.advance(self.done)
                last = self.done == todo.stop
                if last or self.done % run.log_every == 0:
                    self._log_step(self.log, lr, waiting)
                self._leave_if_asked()
                if not last and self.done % run.checkpoint_every == 0:
                    self._save()
            self.log = self.log or self._begin()  # a run that is resumed at its end
            self._close_epoch(self.log)
        return self._finish()

    def _close_epoch(self, log: Log) -> None:
        """Evaluate, compare adversarial with clean training accuracy (the leak of section 4.3),
        save.
        """
        epoch, begun = divmod(self.done, self.budget.steps_per_epoch)
        record = {f"epoch_{k}": v for k, v in rates(self.totals).items()}
        # Mixed clean rows are scored on the first of two labels, so their accuracy is no measure of
        # a leak.
        comparable = self.config.data.mix is None
        if comparable and record.get("epoch_acc_adv", 0) > record.get("epoch_acc_clean", 1):
            record["leak"] = 1.0
            self._say(
                f"warning: epoch {epoch}: training accuracy of adversarial rows"
                f" ({record['epoch_acc_adv']:.1%}) is above that of clean rows"
                f" ({record['epoch_acc_clean']:.1%}): statistics leak labels (section 4.3); see"
                " method.shuffle"
            )
        if self.done == self.steps or epoch % self.config.run.eval_every == 0:
            self.last = last = self._evaluate()
            record |= {f"val_{k}": v for k, v in last.items()}
            reached = last[self.task.primary]
            if reached > self.best[self.task.primary]:
                self.best = {self.task.primary: reached, "epoch": epoch}
            self._say(f"epoch {epoch}: {in_words(last, self.task)}")
        log.record(self.done, record | {"epoch": epoch})
        if not begun:
            self.closed, self.totals = epoch, dict.fromkeys(METRICS, 0.0)
        self._save()

    def _evaluate(self) -> Result:
        data = self.config.data
        store = self.data.val
        world = self.ranks.world
        rows = max(1, self.config.run.eval_batch // world) * world
        plan = pipelines.eval_plan(
            store.heights, store.widths, size=data.size, resize=data.resize, batch=rows
        ).for_rank(self.ranks.rank, world)
        targets = self.task.targets(store, plan).to(self.device)
        with self._closing(self._open_loader(store)) as loader:

            def batches() -> Iterator[tuple[Tensor, Tensor]]:
                for batch in loader.load(plan):  # as many on every rank
                    self._leave_if_asked()
                    yield batch.images, targets[batch.step]

            result = evaluate(
                self.model,
                batches(),
                self.task.evaluator(self.device, self.data.matching),
                mean=data.mean,
                std=data.std,
                device=self.device,
                amp=self.amp,
            )
        del result["count"]  # that of data.val
        return result

    # ------------------------------------------------------------------ the data

    def _open_loader(self, store: pipelines.Store) -> pipelines.Loader:
        data = self.config.data
        # Each back end gets the options that it has: not all of them decode in threads, say.
        options = data.model_dump(include=pipelines.loader_options(data.pipeline))
        return pipelines.open_loader(
            data.pipeline, store, size=data.size, device=self.device, **options
        )

    @contextmanager
    def _closing(self, loader: pipelines.Loader) -> Iterator[pipelines.Loader]:
        """Close it after the block; a failure to is secondary, and hides no error of the block."""
        try:
            yield loader
        finally:
            try:
                loader.close()
            except Exception as error:
                self._say(f"warning: the loader was not closed properly: {error}")

    def _plans(self) -> Iterator[pipelines.EpochPlan]:
        """This rank's plans of the epochs that are not closed; the next one is drawn while one
        runs.
        """
        draw = partial(
            pipelines.draw_epoch, self.spec, self.data.train.heights, self.data.train.widths
        )
        epochs = range(self.closed, -(-self.steps // self.budget.steps_per_epoch))
        for plan in run_ahead((partial(draw, epoch) for epoch in epochs), threads=1, ahead=2):
            yield plan.for_rank(self.ranks.rank, self.ranks.world)

    def _draws(self, plan: pipelines.EpochPlan) -> dict[str, Tensor]:
        """The plan's draws for the step, on the device, one row per step."""
        names = ["shuffle", "noise_key"]
        if self.config.data.mix:
            names += ["mix_lam", "mix_box", "mix_partner"]
        draws = {name: torch.from_numpy(getattr(plan, name).copy()) for name in names}
        return {name: draw.to(self.device) for name, draw in draws.items()}

    # ------------------------------------------------------------------ the record

    def _log_step(self, log: Log, lr: float, waiting: Stopwatch) -> None:
        metrics, (seconds, waited) = self.step.metrics.take(self.ranks), waiting.lap()
        self.totals = {name: self.totals[name] + value for name, value in metrics.items()}
        steps, skipped, in_a_row = metrics["steps"], metrics["skipped"], metrics["skipped_in_a_row"]
        passes = steps * self.budget.image_passes_per_step
        shown = (
            {"epoch": self.done / self.budget.steps_per_epoch, "lr": lr}
            | rates(metrics)
            | {"skipped": skipped}
        )
        log.step(
            self.done,
            shown
            | {"image_passes_per_second": passes / seconds, "waiting_for_data": waited / seconds},
        )
        if skipped:
            self._say(
                f"step {self.done}: {skipped:.0f} of the last {steps:.0f} steps were not finite and"
                " were skipped"
            )
        if in_a_row >= self.config.run.max_skipped:
            bad = ", ".join(k for k in KINDS if metrics[f"nonfinite_{k}"]) or "no"
            raise NonFinite(
                f"{in_a_row:.0f} non-finite steps in a row up to step {self.done} (loss of the"
                f" {bad} rows; else gradients only); {self._last_good()}"
            )

    def _finish(self) -> dict[str, Any]:
        self.votes.drain()
        if self.saved != self.done:
            raise NotSaved(
                f"training is done, but its last checkpoint could not be saved; {self._last_good()}"
            )
        result = {
            "name": self.config.name, "seed": self.config.seed, "method": self.config.method.name, "steps": self.done,
            "epochs": self.closed, "image_passes": self.done * self.budget.image_passes_per_step,
            "seconds": time.perf_counter() - self.started, "last": self.last, "best": self.best, "versions": versions(),
        }  # fmt: skip
        if self.ranks.first:
            try:
                write_whole(
                    self.folder / "result.json", [json.dumps(result, indent=1).encode() + b"\n"]
                )
            except OSError as error:
                raise NotSaved(
                    f"training is done, but its result.json could not be written ({error});"
                    f" {self._last_good()}"
                ) from error
        return result

    def _say(self, message: str) -> None:
        if not self.ranks.first:
            return
        if self.log is None:
            print(message, flush=True)
        else:
            self.log.say(message)

    # ------------------------------------------------------------------ survival

    def _begin(self) -> Log:
        """Write the folder's first files. Before the first step is done, nothing in it changes."""
        if self.ranks.first:
            # config.yaml goes on with the run that it describes.
            config = self.config.model_copy(update={"resume": "auto"}).to_yaml()
            self.run_folder.begin(
                {"config.yaml": config, "versions.json": json.dumps(versions(), indent=1) + "\n"},
                self.done,
            )
        log = Log(self.folder, self.done, self.steps, quiet=not self.ranks.first)
        self.run_folder.has_begun()
        return log

    def _leave_if_asked(self) -> None:
        """Called as often on every rank, so that all leave after the same step or batch."""
        self.stop.beat()
        number = self.votes.cast(self.stop.number or 0)
        if not number:
            return
        self.votes.drain()
        stopped = Interrupted(number)
        if not self._save():
            raise NotSaved(
                f"{stopped}, and step {self.done} could not be saved; {self._last_good()}"
            )
        self._say(f"saved at step {self.done}; continue with resume=auto")
        raise stopped

    def _save(self) -> bool:
        """True, on every rank, if the checkpoint is on the disk. A failure costs the checkpoint,
        not the run.
        """
        meta = {
            "config": self._settled().model_dump(mode="json"), "step": self.done, "closed": self.closed, "totals": self.totals,
            "best": self.best, "last": self.last, "seconds": time.perf_counter() - self.started, "world": self.ranks.world,
            "versions": versions(), "train": self.data.train_identity, "val": self.data.val_identity,
        }  # fmt: skip
        state = self.step.state() | {"metrics": self.step.metrics.of_all_ranks(self.ranks)}
        for name in sorted(PER_RANK & state.keys()):  # in the same order on every rank
            state[name] = self.ranks.gather_rows(state[name])
        failed = False
        with self.stop.saving():
            if self.ranks.first:
                try:
                    self.checkpoints.save(self.done, state, meta)
                except Exception as error:
                    if not (isinstance(error, OSError) or out_of_memory(error)):
                        raise
                    failed = True
                    self._say(
                        f"warning: could not save step {self.done} ({error}); {self._last_good()}"
                    )
            failed = self.ranks.any(failed)
        if not failed:
            self.saved = self.done
        return not failed

    def _last_good(self) -> str:
        if self.saved is None:
            return "no step of it has been saved"
        return f"the last good checkpoint is that of step {self.saved} in {self.checkpoints.folder}"

    def _settled(self) -> Config:
        """The config with what `auto` came to where the state depends on it: half precision has a
        loss scale.
        """
        return self.config.model_copy(
            update={"run": self.config.run.model_copy(update={"amp": self.amp})}
        )

    def _resume(self, path: Path, tensors: dict[str, Tensor], written: dict[str, Any]) -> None:
        meta = run_meta(path, written)
        check_same_data("data.train", meta.train.model_dump(), self.data.train_identity, path)
        check_same_data("data.val", meta.val.model_dump(), self.data.val_identity, path)
        check_same_run(make_config(meta.config), self._settled(), path)
        if meta.world != self.ranks.world:
            raise ValueError(
                f"{path} was written by {meta.world} ranks, this run has {self.ranks.world}: rank"
                " slices, and with them the batch-norm groups, would differ; resume on as many"
                " ranks"
            )
        if meta.step > self.steps:
            raise ValueError(
                f"run.max_steps = {self.config.run.max_steps}, but {path} is already at step"
                f" {meta.step}"
            )
        tensors = {RENAMED_TENSORS.get(name, name): tensor for name, tensor in tensors.items()}
        for name in PER_RANK & tensors.keys():
            tensors[name] = tensors[name][self.ranks.rank * self.step.n_adv :][: self.step.n_adv]
        if not self.ranks.first:  # saved as sums over all ranks
            tensors["metrics"][: METRICS.index("steps")] = 0
        self.step.load_state(tensors)
        self.done, self.closed, self.totals = meta.step, meta.closed, meta.totals
        self.best, self.last = meta.best, meta.last
        self.started -= meta.seconds  # of the run's earlier processes
        self.resumed, self.saved = path, self.done
        self._say(f"resuming {path} at step {self.done}")


def in_words(result: Result, task: Task) -> str:
    """`top-1 76.20%, top-5 93.00%, loss 0.9612`: percentages first."""
    parts = [f"{words} {result[name]:.2%}" for name, words in task.percents.items()]
    parts += [f"{name} {v:.4f}" for name, v in result.items() if name not in task.percents]
    return ", ".join(parts)


def plan_spec(config: Config, ranks: Ranks = ONE_RANK) -> pipelines.PlanSpec:
    """The plan of a run: global rows per step, groups, augmentation and the scope of the shuffle."""
    method = config.method
    data = config.data
    clean_rows = config.optim.clean_batch

    # Vanilla training has no adversarial rows; each other method a group per clean group.
    adv_groups = 0
    if method.adv_group_rows:
        adv_groups = clean_rows // method.group_rows

    match method.shuffle:
        case "ranks":
            shuffle_groups = adv_groups
        case "groups":
            shuffle_groups = adv_groups // ranks.world
        case _:
            shuffle_groups = 0
    return pipelines.PlanSpec(
        seed=config.seed,
        size=data.size,
        clean_rows=clean_rows,
        clean_group_rows=method.group_rows,
        adv_rows=adv_groups * method.adv_group_rows,
        adv_group_rows=method.adv_group_rows or 1,
        adv_are_copies=method.entry.attacked == "copies",
        shuffle_groups=shuffle_groups,
        crop=data.crop,
        scale=data.scale,
        ratio=data.ratio,
        pad=data.pad,
        flip=data.flip,
        mix=data.mix,
        mix_alpha=data.mix_alpha,
    )
