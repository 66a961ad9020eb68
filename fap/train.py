"""The training run: joins plan, loader, step, checkpoints, log and evaluation. The loop is `Run.train`."""

from __future__ import annotations

import ctypes
import json
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import pipelines
from fap.budget import budget
from fap.checkpoint import Checkpoints
from fap.config import Config, make_config
from fap.distributed import ONE_RANK, Ranks
from fap.evaluate import evaluate
from fap.graph import runner
from fap.log import Log, versions
from fap.models import build, load_init
from fap.step import KINDS, METRICS, Amp, Step, dropout_seed
from fap.summary import describe
from pipelines.batch import run_ahead

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
PER_RANK = {"carry.images_255", "carry.labels"}  # of the step's state: every rank holds its own rows


class Interrupted(Exception):  # noqa: N818
    """SIGINT or SIGTERM arrived; the run has been saved. `exit_code` is the shell's convention."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class NonFinite(RuntimeError):  # noqa: N818
    """Too many steps in a row had a non-finite loss or gradient."""


class StopSignal(ExitStack):
    """While entered, notes SIGINT and SIGTERM, to be looked at between steps; a second signal acts at once."""

    number: int | None = None

    def __enter__(self) -> StopSignal:
        for s in (signal.SIGINT, signal.SIGTERM):
            self.callback(signal.signal, s, signal.signal(s, self._note))
        return self

    def _note(self, number: int, *_: Any) -> None:
        self.number = number
        self.close()


class Run:
    """One training run in `<run.dir>/<name>/seed<k>`. Raises ValueError for users' mistakes before anything is written."""

    def __init__(self, config: Config, ranks: Ranks = ONE_RANK) -> None:
        self.started = time.perf_counter()
        self.config, self.ranks, self.stop = config, ranks, StopSignal()
        self.device = ranks.device(config.run.device)
        self.amp: Amp = config.run.amp if config.run.amp != "auto" else "fp16" if self.device.type == "cuda" else "off"
        if config.run.torch_threads:
            torch.set_num_threads(config.run.torch_threads)
        set_up_torch(self.device)

        self.norm_kernel = norm_kernel(config, self.device)
        self.store, self.val_store = _open_store("train", config), _open_store("val", config)
        if self.store.classes and self.val_store.classes and self.store.classes != self.val_store.classes:
            raise ValueError(f"data.val = {config.data.val} has other classes than data.train = {config.data.train}")
        self.budget = budget(config, len(self.store))
        self.steps = min(self.budget.steps, config.run.max_steps or self.budget.steps)
        self.spec = plan_spec(config, ranks)

        torch.manual_seed(config.seed)
        wanted, aux = config.model, config.method.name != "vanilla"
        self.model = build(wanted.name, wanted.classes, aux=aux, size=config.data.size)
        if wanted.init:
            load_init(self.model, wanted.init, config, self._say)
        self.model.to(self.device)
        self.step = Step(self.model, config, ranks, amp=self.amp)
        self.step.row_groups.kernel = self.norm_kernel
        self._prepare_folder()
        if config.run.compile:
            self.step.forward = torch.compile(self.model)

        self.done = 0  # optimiser steps
        self.closed = 0  # epochs evaluated and logged
        self.totals = dict.fromkeys(METRICS, 0.0)  # of the epoch so far
        self.best: dict[str, float] = {"top1": -1.0, "epoch": 0}
        self.last: dict[str, float] = {}
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.run.keep, say=self._say)
        if config.resume == "auto" and (found := self.checkpoints.newest()):
            self._resume(*found)
        self.log = Log(self.folder, self.done, self.steps, quiet=not ranks.first)

    # ------------------------------------------------------------------ the loop

    def train(self) -> dict[str, Any]:
        """Train to the end of the budget; the result is also written to `result.json`.

        Raises Interrupted, NonFinite, and before the first step `fap.graph.FreshProcessNeeded`.
        """
        run, per_epoch = self.config.run, self.budget.steps_per_epoch
        with self.stop, closing(self.log), closing(self._open_loader(self.store)) as loader:
            run_step, how = runner(self.step, run.graph)
            self._say(f"training from step {self.done} to {self.steps}, {how}, AMP {self.amp}, on {self.device}")
            for plan in self._plans():
                first = plan.epoch * per_epoch
                todo = range(self.done, min(first + per_epoch, self.steps))
                draws, waiting = self._draws(plan), Stopwatch()
                for step, batch in zip(todo, waiting.on(loader.load(plan, self.done - first)), strict=False):
                    lr = self.budget.lr_at(step)
                    torch.manual_seed(dropout_seed(self.config.seed, step, self.ranks.rank))
                    self.step.feed(batch.images, batch.labels, lr, **{k: v[batch.step] for k, v in draws.items()})
                    run_step()
                    self.done = step + 1
                    self.log.advance(self.done)
                    last = self.done == todo.stop
                    if last or self.done % run.log_every == 0:
                        self._log_step(lr, waiting)
                    self._leave_if_asked()
                    if not last and self.done % run.checkpoint_every == 0:
                        self._save()
                self._close_epoch()
            return self._finish()

    def _close_epoch(self) -> None:
        """Evaluate, compare adversarial with clean training accuracy (the leak of section 4.3), save."""
        epoch, begun = divmod(self.done, self.budget.steps_per_epoch)
        record = {f"epoch_{k}": v for k, v in rates(self.totals).items()}
        # Mixed clean rows are scored on the first of two labels, so their accuracy is no measure of a leak.
        comparable = self.config.data.mix is None
        if comparable and record.get("epoch_acc_adv", 0) > record.get("epoch_acc_clean", 1):
            record["leak"] = 1.0
            self._say(
                f"warning: epoch {epoch}: training accuracy of adversarial rows ({record['epoch_acc_adv']:.1%}) is above that "
                f"of clean rows ({record['epoch_acc_clean']:.1%}): statistics leak labels (section 4.3); see method.shuffle"
            )
        if self.done == self.steps or epoch % self.config.run.eval_every == 0:
            self.last = last = self._evaluate()
            record |= {f"val_{k}": v for k, v in last.items()}
            self.best = max(self.best, {"top1": last["top1"], "epoch": epoch}, key=lambda best: best["top1"])
            self._say(f"epoch {epoch}: top-1 {last['top1']:.2%}, top-5 {last['top5']:.2%}, loss {last['loss']:.4f}")
        self.log.record(self.done, record | {"epoch": epoch})
        if not begun:
            self.closed, self.totals = epoch, dict.fromkeys(METRICS, 0.0)
        self._save()

    def _evaluate(self) -> dict[str, float]:
        data, store, world = self.config.data, self.val_store, self.ranks.world
        batch = max(1, self.config.run.eval_batch // world) * world
        plan = pipelines.eval_plan(store.heights, store.widths, size=data.size, resize=data.resize, batch=batch)

        def batches() -> Iterator[pipelines.Batch]:
            for batch in loader.load(plan.for_rank(self.ranks.rank, world)):
                if world == 1:
                    self._leave_if_asked()
                yield batch

        with closing(self._open_loader(store)) as loader:
            result = evaluate(self.model, batches(), mean=data.mean, std=data.std, device=self.device, amp=self.amp)
        return {"top1": result.top1, "top5": result.top5, "loss": result.loss}

    # ------------------------------------------------------------------ the data

    def _open_loader(self, store: pipelines.Store) -> pipelines.Loader:
        options = self.config.data.model_dump(include={"size", "threads", "prefetch", "hw_decoder_load"})
        return pipelines.open_loader(self.config.data.pipeline, store, device=self.device, **options)

    def _plans(self) -> Iterator[pipelines.EpochPlan]:
        """This rank's plans of the epochs that are not closed; the next one is drawn while one runs."""
        draw = partial(pipelines.draw_epoch, self.spec, self.store.heights, self.store.widths)
        epochs = range(self.closed, -(-self.steps // self.budget.steps_per_epoch))
        for plan in run_ahead((partial(draw, epoch) for epoch in epochs), threads=1, ahead=2):
            yield plan.for_rank(self.ranks.rank, self.ranks.world)

    def _draws(self, plan: pipelines.EpochPlan) -> dict[str, Tensor]:
        """The plan's draws for the step, on the device, one row per step."""
        first = self.ranks.rank * self.step.n_adv
        shuffle = plan.shuffle[:, first : first + self.step.n_adv] - (first if self.config.method.shuffle == "groups" else 0)
        names = ("noise_key", "mix_lam", "mix_box", "mix_partner") if self.config.data.mix else ("noise_key",)
        draws = {"shuffle": shuffle} | {name: getattr(plan, name) for name in names}
        return {k: torch.from_numpy(v.copy()).to(self.device) for k, v in draws.items()}

    # ------------------------------------------------------------------ the record

    def _log_step(self, lr: float, waiting: Stopwatch) -> None:
        metrics, (seconds, waited) = self.step.take_metrics(), waiting.lap()
        self.totals = {name: self.totals[name] + value for name, value in metrics.items()}
        steps, skipped, in_a_row = metrics["steps"], metrics["skipped"], metrics["skipped_in_a_row"]
        passes = steps * self.budget.image_passes_per_step
        shown = {"epoch": self.done / self.budget.steps_per_epoch, "lr": lr} | rates(metrics) | {"skipped": skipped}
        self.log.step(self.done, shown | {"image_passes_per_second": passes / seconds, "waiting_for_data": waited / seconds})
        if skipped:
            self._say(f"step {self.done}: {skipped:.0f} of the last {steps:.0f} steps were not finite and were skipped")
        if in_a_row >= self.config.run.max_skipped:
            bad = ", ".join(k for k in KINDS if metrics[f"nonfinite_{k}"]) or "no"
            raise NonFinite(
                f"{in_a_row:.0f} non-finite steps in a row up to step {self.done} (loss of the {bad} rows; else gradients "
                f"only); the last good checkpoint is in {self.checkpoints.folder}"
            )

    def _finish(self) -> dict[str, Any]:
        result = {
            "name": self.config.name, "seed": self.config.seed, "method": self.config.method.name, "steps": self.done,
            "epochs": self.closed, "image_passes": self.done * self.budget.image_passes_per_step,
            "seconds": time.perf_counter() - self.started, "last": self.last, "best": self.best, "versions": versions(),
        }  # fmt: skip
        if self.ranks.first:
            (self.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        return result

    def _say(self, message: str) -> None:
        if self.ranks.first:
            self.log.say(message) if hasattr(self, "log") else print(message, flush=True)

    # ------------------------------------------------------------------ survival

    def _leave_if_asked(self) -> None:
        """Several ranks agree every tenth step, so that all of them leave after the same one."""
        if (self.ranks.world == 1 or self.done % 10 == 0) and self.ranks.any(self.stop.number is not None):
            self._save()
            self._say(f"saved at step {self.done}; continue with resume=auto")
            raise Interrupted(self.stop.number or signal.SIGTERM)

    def _save(self) -> None:
        meta = {
            "config": self.config.model_dump(mode="json"), "step": self.done, "closed": self.closed, "totals": self.totals,
            "best": self.best, "last": self.last, "seconds": time.perf_counter() - self.started, "world": self.ranks.world,
            "versions": versions(), "classes": list(self.store.classes or ()),
        }  # fmt: skip
        state = self.step.state() | {"metrics": self.step.metrics_of_all_ranks()}
        for name in sorted(PER_RANK & state.keys()):  # in the same order on every rank
            state[name] = self.ranks.gather_rows(state[name])
        if self.ranks.first:
            try:
                self.checkpoints.save(self.done, state, meta)
            except OSError as e:
                self._say(f"warning: could not save step {self.done} ({e}); the older checkpoints stay, training goes on")
        self.ranks.barrier()

    def _resume(self, path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        _same_run(self.config, make_config(meta["config"]), path)
        if meta["world"] != self.ranks.world:
            raise ValueError(
                f"{path} was written by {meta['world']} ranks, this run has {self.ranks.world}: rank slices, and with them the "
                "batch-norm groups, would differ; resume on as many ranks"
            )
        for name in PER_RANK & tensors.keys():
            tensors[name] = tensors[name][self.ranks.rank * self.step.n_adv :][: self.step.n_adv]
        if not self.ranks.first:  # saved as sums over all ranks
            tensors["metrics"][: METRICS.index("steps")] = 0
        self.step.load_state(tensors)
        self.done, self.closed, self.totals = meta["step"], meta["closed"], meta["totals"]
        self.best, self.last = meta["best"], meta["last"]
        self.started -= meta["seconds"]  # of the run's earlier processes
        self._say(f"resuming {path} at step {self.done}")

    def _prepare_folder(self) -> None:
        self.folder = folder = Path(self.config.run.dir) / self.config.name / f"seed{self.config.seed}"
        if self.ranks.first:
            print(describe(self.config, self.budget, self.step, self.spec.shuffle_groups), flush=True)
            if self.config.resume == "never" and folder.exists() and any(folder.iterdir()):
                raise ValueError(f"{folder} holds an earlier run and is never overwritten: resume=auto, another name or seed")
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "config.yaml").exists():
                (folder / "config.yaml").write_text(self.config.to_yaml())
                (folder / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
        self.ranks.barrier()


class Stopwatch:
    """Seconds since the last lap, and how many of them were spent waiting for the loader."""

    def __init__(self) -> None:
        self.start, self.waited = time.perf_counter(), 0.0

    def on(self, batches: Iterable[pipelines.Batch]) -> Iterator[pipelines.Batch]:
        before = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - before
            yield batch
            before = time.perf_counter()

    def lap(self) -> tuple[float, float]:
        former, self.start = self.start, time.perf_counter()
        waited, self.waited = self.waited, 0.0
        return self.start - former, waited


def rates(metrics: dict[str, float]) -> dict[str, float]:
    """Mean loss and accuracy per kind of row, and the share of exactly zero gradient signs."""
    out = {"zero_signs": metrics["zero_signs"] / metrics["signs"]} if metrics["signs"] else {}
    for kind in KINDS:
        if rows := metrics[f"rows_{kind}"]:
            out |= {f"loss_{kind}": metrics[f"loss_{kind}"] / rows, f"acc_{kind}": metrics[f"correct_{kind}"] / rows}
    return out


def norm_kernel(config: Config, device: torch.device) -> Literal["auto", "triton", "split"]:
    """`run.norm_kernel` as `fap.norm.RowGroups` says it. ValueError where Triton cannot run."""
    wanted = config.run.norm_kernel
    if wanted == "framework" or config.run.compile:  # the framework's is what a compiler fuses
        return "split"
    if wanted == "triton":
        lacks = ""
        if device.type != "cuda":
            lacks = "it needs a GPU"
        elif find_spec("triton") is None:
            lacks = "it needs the package triton"
        if lacks:
            raise ValueError(f"run.norm_kernel = 'triton': {lacks}; use 'auto' or 'framework'")
    return wanted


def plan_spec(config: Config, ranks: Ranks = ONE_RANK) -> pipelines.PlanSpec:
    """The plan of a run: global rows per step, groups, augmentation and the scope of the shuffle."""
    method, data, rows = config.method, config.data, config.optim.clean_batch
    groups = rows // method.group if method.adv_group else 0
    return pipelines.PlanSpec(
        **data.model_dump(include={"size", "crop", "scale", "ratio", "pad", "flip", "mix", "mix_alpha"}), seed=config.seed,
        clean_rows=rows, adv_rows=groups * method.adv_group, clean_group=method.group, adv_group=method.adv_group or 1,
        paired=method.name == "advprop",
        shuffle_groups={"ranks": groups, "groups": groups // ranks.world}.get(method.shuffle or "off", 0),
    )  # fmt: skip


def _open_store(field: Literal["train", "val"], config: Config) -> pipelines.Store:
    path = getattr(config.data, field)
    if path is None:
        raise ValueError(f"data.{field} is not set: give a .beton file (make one with fap-convert) or an image folder")
    store = pipelines.open_store(path)
    least, most = int(store.labels.min(initial=0)), int(store.labels.max(initial=0))
    if least < 0 or most >= config.model.classes:
        raise ValueError(f"model.num_classes = {config.model.num_classes}, but {path} holds labels {least} to {most}")
    return store


def _same_run(config: Config, saved: Config, path: Path) -> None:
    """Resuming exactly needs the same run; only where it runs and how often it reports may differ."""
    free: Any = {"resume": True, "run": True, "paper": True, "data": {"threads", "prefetch", "hw_decoder_load", "val"}}
    ours, theirs = (c.model_dump(mode="json", exclude=free) for c in (config, saved))
    differ = [f"{s}.{k}" for s, v in ours.items() if isinstance(v, dict) for k in v if v[k] != theirs[s][k]]
    differ += [s for s in ("name", "seed") if ours[s] != theirs[s]]
    if differ:
        raise ValueError(f"resume=auto: {path} was trained with another {', '.join(differ)}; use another name or seed")


def set_up_torch(device: torch.device) -> None:
    """What makes every step of this process faster and changes no result but by rounding."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        # glibc keeps what a step frees: else the next step's page faults take a fifth of its time (bench/NOTES.md).
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
