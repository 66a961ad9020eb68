"""The training run: joins plan, loader, step, checkpoints, log and evaluation.

The loop is `Run._train`.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pipelines
from fap.budget import budget
from fap.config import Config, with_classes
from fap.distributed import ONE_RANK, Ranks, Votes
from fap.draws import dropout_seed, has_drawn
from fap.nets.build import check_model_sizes, prepare
from fap.nets.dual import divides_statistics, has_aux
from fap.nets.pretrained import load_init
from fap.nets.weights.about import Weights
from fap.nets.weights.settle import Start, start_of
from fap.run.back_end import described, settle
from fap.run.data import closing, open_data, open_loader
from fap.run.epoch import Epoch, check_sizes, epochs, plan_spec
from fap.run.folder import RunFolder
from fap.run.log import Log
from fap.run.monitor import check_finite, leak, skipped_steps
from fap.run.result import result_of, write_result
from fap.run.resume import checksum_of, facts
from fap.run.saving import NotSaved, Progress, Saving, no_totals
from fap.run.session import Interrupted, StopSignal
from fap.run.stopwatch import Stopwatch
from fap.run.summary import describe
from fap.run.torch_setup import limit_threads, norm_kernel, precision, set_up_torch, settled
from fap.run.validation import Validation, in_words
from fap.step.graph import give_memory_back, runner
from fap.step.metrics import rates
from fap.step.step import Step
from fap.tasks import make_task
from fap.tasks.base import Result
from fap.versions import versions
from pipelines.files import shown
from pipelines.sizes import Size, size_in_words


class Run:
    """One training run in `<run.dir>/<name>/seed<k>`.

    Nothing is written before the first step is done. `stop`, entered by the caller, notes the
    signals that ask the run to leave; without it none does. Raises ValueError for users' mistakes.
    All ranks raise if one does, or if they would not train the same run.
    """

    def __init__(
        self, config: Config, ranks: Ranks = ONE_RANK, stop: StopSignal | None = None
    ) -> None:
        self.started = time.perf_counter()
        self.ranks = ranks
        self.stop = stop or StopSignal()
        self.votes = Votes(ranks)
        self.log: Log | None = None  # from the first step on
        self.folder = Path(config.run.dir) / config.name / f"seed{config.seed}"
        self.run_folder = RunFolder(self.folder, self._say)
        try:
            # Downloads, if any: of several ranks one after another.
            start = ranks.in_turns(lambda: start_of(config))
            with ranks.together():
                self._prepare(start)
                known = self._facts()
            ranks.check_same(known)
        except BaseException:
            self.run_folder.release()
            raise

    # ------------------------------------------------------------------ the start

    def _prepare(self, start: Start) -> None:
        """Everything before the first step that can fail without the other ranks."""
        config = start.config
        self.device = self.ranks.device(config.run.device)
        self.amp = precision(config, self.device)
        limit_threads(config.run.torch_threads)
        set_up_torch(self.device)
        kernel = norm_kernel(config, self.device)

        self.data = open_data(config)
        asked = config
        config = with_classes(config, self.data.n_classes)
        config = settle(config, [self.data.train, self.data.val], self.device)
        self.config = config
        self.budget = budget(config, len(self.data.train))
        self.steps = self.budget.steps
        if config.run.max_steps is not None:
            self.steps = min(self.steps, config.run.max_steps)
        self.task = make_task(config)
        class_weights = self.task.look_at(self.data.train)

        check_sizes(config, self.ranks)
        self.model = self._first_model(start.weights)
        self.step = Step(self.model, config, self.ranks, amp=self.amp, task=self.task)
        self.step.network.norm_state.kernel = kernel
        self.step.resize(self.budget.size_in(0))
        if config.run.compile:
            self.step.network.forward = torch.compile(self.model)
        shuffle_groups = plan_spec(config, self.ranks).shuffle_groups
        summary = describe(config, self.budget, self.step, shuffle_groups)
        loader = described(asked.data, config.data)
        lines = [summary, *start.lines, loader, *self.data.lines, *class_weights]
        self._say("\n".join(lines))

        if self.ranks.first:
            self.run_folder.take(may_go_on=config.resume == "auto")
        self.validate = Validation(
            config, self.data, self.task, self.ranks, self.device, self.amp, self._say
        )
        folder = self.folder / "checkpoints"
        self.settled = settled(config, self.amp)
        self.saving = Saving(
            folder, self.settled, self.data, self.step, self.ranks, self.stop, self._say
        )
        self.progress = Progress(self.started, best={self.task.primary: -1.0, "epoch": 0})
        if config.resume == "auto":
            resumed = self.saving.resume(self.task, self.steps, self.budget.size_in)
            self.progress = resumed or self.progress

    def _first_model(self, weights: Weights | None) -> nn.Module:
        """The converted model on the device: random weights of the seed, or those of model.init."""
        config = self.config
        torch.manual_seed(config.seed)
        method = config.method
        model = prepare(
            self.task.plain_model(),
            aux=method.has_aux,
            size=config.data.size,
            any_norm=method.any_norm,
        )
        if method.aux == "norms" and not has_aux(model):
            raise ValueError(
                f"method.aux = 'norms': model.name = {shown(config.model.name)} has no norm that "
                "can have an auxiliary twin; 'auto' trains without any"
            )
        if config.data.sizes is not None:
            check_model_sizes(model, [size for _, size in config.data.sizes])
        if weights is not None:
            load_init(model, config.model.name, weights, config.model.classes, self._say)
        self.first_weights = "of the only rank"
        if self.ranks.world > 1:
            self.first_weights = checksum_of(model.state_dict())
        return model.to(self.device)

    def _facts(self) -> dict[str, Any]:
        """What all ranks must have in common before the first step."""
        train = self.data.train_identity
        shared = facts(self.settled, train, self.data.val_identity, self.saving.resumed)
        return shared | {"device": self.device.type, "weights": self.first_weights}

    # ------------------------------------------------------------------ the loop

    def train(self) -> dict[str, Any]:
        """Train to the end of the budget. Can be called once.

        The result is also written to `result.json`. Raises Interrupted, NonFinite, NotSaved, and
        before the first step of a size `fap.step.graph.FreshProcessNeeded`.
        """
        try:
            n_epochs = math.ceil(self.steps / self.budget.steps_per_epoch)
            todo = range(self.progress.closed, n_epochs)
            # One part, unless images change their size: then loader and step begin anew.
            for size, numbers in self.budget.by_size(todo):
                with self.ranks.together():
                    loader = open_loader(self.config, self.data.train, self.device, size)
                with closing(loader, self._say):
                    self._train(loader, size, numbers)
                if self.device.type == "cuda":
                    give_memory_back()  # of a graph of this size
            return self._finish()
        finally:
            if self.log is not None:
                self.log.close()
            self.run_folder.release()

    def _train(self, loader: pipelines.Loader, size: Size, numbers: range) -> None:
        """The epochs of these numbers, whose images have one size."""
        self.step.resize(size)
        run_step, how = runner(self.step, self.config.run.graph)
        end = min(numbers.stop * self.budget.steps_per_epoch, self.steps)
        self._say(
            f"training from step {self.progress.step} to {end}, {size_in_words(size)} px, {how}, "
            f"AMP {self.amp}, on {self.device}"
        )
        self.stop.run_begins()
        with self._saved_if_asked_to_leave():
            for epoch in self._epochs(size, numbers):
                self._train_epoch(epoch, loader, run_step)
                self._close_epoch()

    def _epochs(self, size: Size, numbers: range) -> Iterator[Epoch]:
        train = self.data.train
        return epochs(self.config, self.ranks, train, self.task, self.device, numbers, size)

    def _train_epoch(
        self, epoch: Epoch, loader: pipelines.Loader, run_step: Callable[[], object]
    ) -> None:
        """Those of its steps that are not done yet."""
        run = self.config.run
        progress = self.progress
        first = epoch.number * self.budget.steps_per_epoch
        todo = range(progress.step, min(first + self.budget.steps_per_epoch, self.steps))
        waiting = Stopwatch()
        batches = waiting.on(loader.load(epoch.plan, progress.step - first))
        # `todo` first: after its last step, which may come early, no batch is waited for.
        for step, batch in zip(todo, batches, strict=False):
            # Dropout draws by the number of the step, so that a resumed run repeats it.
            seed = dropout_seed(self.config.seed, step, self.ranks.rank)
            torch.manual_seed(seed)
            lr = self.budget.rates.at(step)
            targets = epoch.targets[batch.step]
            self.step.feed(batch.images, targets, lr, **epoch.draws_of(batch.step))
            run_step()
            if self.log is None:  # once: the first step of this process
                progress.dropout = has_drawn(seed, self.device)

            log = self._begun()
            progress.step = step + 1
            log.advance(progress.step)
            is_last = progress.step == todo.stop
            if is_last or progress.step % run.log_every == 0:
                self._log_step(log, lr, waiting)
            self._leave_if_asked()
            # An epoch's last step is saved once it has been evaluated.
            if not is_last and progress.step % run.checkpoint_every == 0:
                self.saving.save(progress)

    def _close_epoch(self) -> None:
        """Evaluate, compare adversarial with clean training accuracy, save."""
        log = self._begun()  # not earlier than here if a run is resumed at its end
        progress = self.progress
        epoch, steps_of_next = divmod(progress.step, self.budget.steps_per_epoch)
        trained = rates(progress.totals)
        record = {f"epoch_{name}": value for name, value in trained.items()}
        former_best = (progress.best, progress.best_step)
        statistics = divides_statistics(self.model)
        warning = leak(progress.totals, self.config, epoch, statistics=statistics)
        if warning:
            record["leak"] = 1.0
            self._say(warning)
        if progress.step == self.steps or epoch % self.config.run.eval_every == 0:
            found = self._evaluate(record)
            progress.last = found
            progress.last_step = progress.step
            reached = found[self.task.primary]
            if reached > progress.best[self.task.primary]:
                progress.best = {self.task.primary: reached, "epoch": epoch}
                progress.best_step = progress.step
            self._say(f"epoch {epoch}: {self._in_words(found, record)}")
        log.record(progress.step, record | {"epoch": epoch})
        if not steps_of_next:  # max_steps may end a run inside an epoch, which then stays open
            progress.closed = epoch
            progress.totals = no_totals()
        # Before it is saved: what a checkpoint holds is what the next step begins with.
        self.step.resize(self.budget.size_in(progress.closed))
        if not self.saving.save(progress):
            # What has not been saved cannot be kept; a later epoch may be the best that is.
            progress.best, progress.best_step = former_best

    def _evaluate(self, record: dict[str, float]) -> Result:
        """The result of the weights as they are, or with `optim.ema` that of their average.

        It is what counts for the best epoch. `record` gets both.
        """
        found = self.validate(self.model, self._leave_if_asked)
        average = self.step.update.ema
        if average is not None:
            record |= {f"val_raw_{name}": value for name, value in found.items()}
            with average.in_model():
                found = self.validate(self.model, self._leave_if_asked)
        record |= {f"val_{name}": value for name, value in found.items()}
        return found

    def _in_words(self, found: Result, record: dict[str, float]) -> str:
        words = in_words(found, self.task)
        primary = self.task.primary
        raw = record.get(f"val_raw_{primary}")
        if raw is not None:
            words += f" of the average; of the raw weights {in_words({primary: raw}, self.task)}"
        return words

    def _finish(self) -> dict[str, Any]:
        self.votes.drain()
        step = self.progress.step
        if self.saving.saved != step:
            raise NotSaved(
                "training is done, but its last checkpoint could not be saved; "
                f"{self.saving.last_good()}"
            )
        passes = step * self.budget.image_passes_per_step
        result = result_of(self.config, self.progress, passes)
        if self.ranks.first:
            result["checkpoints"] = self.saving.names(self.progress)
            write_result(result, self.folder, self.saving.last_good())
        return result

    # ------------------------------------------------------------------ the record

    def _begun(self) -> Log:
        """The log. Before the first call, after the first step, nothing in the folder changes."""
        if self.log is None:
            step = self.progress.step
            if self.ranks.first:
                # config.yaml goes on with the run that it describes.
                config = self.config.model_copy(update={"resume": "auto"}).to_yaml()
                with_what = json.dumps(versions(), indent=1) + "\n"
                self.run_folder.begin({"config.yaml": config, "versions.json": with_what}, step)
            log = Log(self.folder, step, self.steps, quiet=not self.ranks.first)
            self.run_folder.has_begun()
            self.log = log
        return self.log

    def _log_step(self, log: Log, lr: float, waiting: Stopwatch) -> None:
        step = self.progress.step
        metrics = self.step.metrics.take(self.ranks)
        seconds, waited = waiting.lap()
        self.progress.add(metrics)
        passes = metrics["steps"] * self.budget.image_passes_per_step
        shown = {"epoch": step / self.budget.steps_per_epoch, "lr": lr}
        shown |= rates(metrics)
        shown |= {
            "skipped": metrics["skipped"],
            "image_passes_per_second": passes / seconds,
            "waiting_for_data": waited / seconds,
        }
        log.step(step, shown)
        warning = skipped_steps(metrics, step)
        if warning:
            self._say(warning)
        check_finite(metrics, step, self.config.run.max_skipped, self.saving.last_good())

    def _say(self, message: str) -> None:
        if not self.ranks.first:
            return
        if self.log is None:
            print(message, flush=True)
        else:
            self.log.say(message)

    # ------------------------------------------------------------------ leaving

    def _leave_if_asked(self) -> None:
        """Called as often on every rank, so that all leave after the same step or batch.

        Raises Interrupted, also from within an evaluation; `_saved_if_asked_to_leave` saves.
        """
        self.stop.beat()
        number = self.votes.cast(self.stop.number or 0)
        if number:
            raise Interrupted(number)

    @contextlib.contextmanager
    def _saved_if_asked_to_leave(self) -> Iterator[None]:
        """Around the steps and what lends the model other weights: an evaluation of the average.

        So what is saved are the weights that the next step begins with.
        """
        try:
            yield
        except Interrupted as stopped:
            self.votes.drain()
            step = self.progress.step
            if not self.saving.save(self.progress):
                raise NotSaved(
                    f"{stopped}, and step {step} could not be saved; {self.saving.last_good()}"
                ) from None
            self._say(f"saved at step {step}; continue with resume=auto")
            raise
