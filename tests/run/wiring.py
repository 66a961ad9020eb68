"""A run seen from inside: tiny runs in this process, and spies at the joints of its parts.

`observe` runs and tells what reached plan, loader, optimiser, step and evaluation; `Seen.aspects`
is what two runs are compared by.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

import pipelines
from fap.config import Config, load_config
from fap.run import train, validation
from fap.run.log import Log
from fap.run.monitor import NonFinite
from fap.run.train import Run
from fap.step.step import Step
from fap.tasks.classification import Classification
from pipelines.plan import EpochPlan
from tests.conftest import write_beton

IMAGES = 24
CLASSES = 4
# What a plan draws for the loader and the step.
DRAWS = (
    *("index", "window", "place", "flip"),
    *("noise_key", "shuffle", "mix_lam", "mix_box", "mix_partner"),
)
# 8 clean and 4 adversarial rows of 24 images: 2 steps an epoch; 6 / (4/3) = 4 epochs, milestone 3 /
# (4/3) = 2.
BASE = [
    "data.train={data}", "data.val={data}", "data.pipeline=reference", "data.threads=1",
    "data.size=8", "data.resize=10", "model.name=cifar_resnet8", f"model.num_classes={CLASSES}",
    "optim.clean_batch=8", "method.group_rows=4", "method.p_adv=1/3", "budget.epochs=6",
    "budget.milestones=[3]", "run.device=cpu", "run.amp=off", "run.dir={runs}", "run.log_every=1",
    "run.torch_threads=1", "run.keep=50", "run.eval_every=4",
]  # fmt: skip


class Doubled(Classification):
    """Another task: every loss counts twice. The tests' conftest registers it as `doubled`."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * super().losses(outputs, targets)


# ---------------------------------------------------------------------- fields


def fields_of(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every field under its dotted name, with what it is if unset."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            found |= fields_of(type(default), f"{prefix}{name}.")
        else:
            found[prefix + name] = default
    return found


FIELDS = fields_of(Config)
# Those that have a meaning for detection only: test_detection.py.
OF_LAYERS = {"optim.layer_decay"}  # only models of timm are divided into layers: test_fields.py
OF_DETECTION = {"data.jitter", "data.most_boxes", "method.attack_loss"}


def written(value: Any) -> str:
    """As on a command line."""
    if isinstance(value, str):
        return value
    return json.dumps(value)


def value_of(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def beton(path: Path, seed: int, classes: int) -> Path:
    """Raw images of mixed sizes, 14-22 pixels a side; labels 0, 1, ... in turn."""
    rng = np.random.default_rng(seed)
    shapes = rng.integers(14, 23, (IMAGES, 2))
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return write_beton(path, images, [i % classes for i in range(IMAGES)])


# ---------------------------------------------------------------------- what a run shows


def digest(*values: Any) -> str:
    """Of arrays, tensors and anything with a repr."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach().float().numpy()
        if isinstance(value, np.ndarray):
            found.update(repr(value.shape).encode() + np.ascontiguousarray(value).tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()[:16]


@dataclass
class Seen:
    """What reached the parts of one run."""

    config: Config
    folder: str = ""  # of the run, below run.dir
    error: str = ""
    said: str = ""
    plans: list[EpochPlan] = field(default_factory=list)  # of training
    eval_plans: list[EpochPlan] = field(default_factory=list)
    # pipeline, data, options
    loaders: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    optimiser: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Tensor]] = field(default_factory=list)  # what the step is fed
    rates: list[float] = field(default_factory=list)  # that the optimiser has, after each step
    seeds: list[int] = field(default_factory=list)  # of torch's generator as the step runs
    weights: list[Tensor] = field(default_factory=list)  # before the first step and after each
    gradients: list[Tensor] = field(default_factory=list)
    adversarial: list[Tensor] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    evaluated: list[Tensor] = field(default_factory=list)  # images
    threads: list[int] = field(default_factory=list)  # that torch is told to use
    runner: str = ""
    compiled: int = 0
    run: Run | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def records(self) -> list[dict[str, Any]]:
        assert self.run is not None
        file = self.run.folder / "metrics.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines()]

    def aspects(self) -> dict[str, Any]:
        """What two runs are compared by."""
        shown: dict[str, Any] = {
            "error": self.error,
            "folder": self.folder,
            "loaders": self.loaders,
            "runner": self.runner,
            "optimiser": self.optimiser,
            "rates": self.rates,
            "threads": self.threads,
            "compiled": self.compiled,
            "accuracy": self.result.get("last"),
            "seeds": self.seeds,
            "steps": len(self.inputs),
            "evaluations": self.evaluations,
            "start": digest(*self.weights[:1]),
            "weights": digest(*self.weights[1:]),
            "adversarial": digest(*self.adversarial),
            "evaluated": digest(*self.evaluated),
        }
        for name in DRAWS:
            shown[f"plan.{name}"] = digest(*(getattr(plan, name) for plan in self.plans))
            shown[f"eval.{name}"] = digest(*(getattr(plan, name) for plan in self.eval_plans))
        augment = [values for plan in self.plans for values in vars(plan.augment).values()]
        shown["plan.augment"] = digest(*augment)
        if self.inputs:
            for name in self.inputs[0]:
                shown[f"input.{name}"] = digest(*(fed[name] for fed in self.inputs))
        if self.run is not None:
            shown |= self._of_the_run(self.run)
        return shown

    def _of_the_run(self, run: Run) -> dict[str, Any]:
        step = run.step
        checkpoints = (run.folder / "checkpoints").glob("*")
        return {
            "model": {name: tuple(v.shape) for name, v in step.network.model.state_dict().items()},
            "kept": sorted({name.partition(".")[0] for name in step.state()}),
            "passes": [[tuple(block) for block in one.blocks] for one in step.passes],
            "row weights": row_weights(step),
            "kernel": step.network.norm_state.kernel,
            "device": str(step.device),
            "task": type(run.task).__name__,
            "checkpoints": sorted(path.name for path in checkpoints),
            "log": [record["step"] for record in self.records if "lr" in record],
        }


# What of a step's inside the tests look at, in one place.


def adversarial_rows(step: Step) -> Tensor:
    return step.adv.rows.images_255.clone()


def row_weights(step: Step) -> tuple[Any, ...]:
    return step.weights


def rate_of(step: Step) -> float:
    """The step's own, without the factor of any part."""
    optimiser = step.update.optimiser
    return float(optimiser.torch.param_groups[0]["lr"]) / optimiser.scales[0]


def settings_of(step: Step) -> dict[str, Any]:
    """What the optimiser was made with, and how each parameter is trained."""
    optimiser = step.update.optimiser.torch
    groups = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimiser.param_groups
    ]
    parameters = {name: tuple(setting) for name, setting in step.network.flat.settings.items()}
    return {"kind": type(optimiser).__name__, "groups": groups, "parameters": parameters}


# ---------------------------------------------------------------------- the spies


@contextlib.contextmanager
def spies(seen: Seen) -> Iterator[None]:
    """Look at the joints of a run; all goes on as without them.

    Except that every pipeline is `reference`, and nothing compiles.
    """
    with pytest.MonkeyPatch.context() as patch:
        _watch_data(seen, patch)
        _watch_steps(seen, patch)
        _watch_evaluations(seen, patch)
        _watch_torch(seen, patch)
        yield


def _watch_data(seen: Seen, patch: pytest.MonkeyPatch) -> None:
    open_loader = pipelines.open_loader

    def opened(name: str, store: pipelines.Store, **options: Any) -> pipelines.Loader:
        seen.loaders.append((name, Path(store.path).name, dict(options)))
        # The options that the reference has too; all that was asked for stands in `seen`.
        loader = open_loader("reference", store, size=options["size"], device=options["device"])
        load = loader.load

        def loaded(plan: EpochPlan, start_step: int = 0) -> Iterator[pipelines.Batch]:
            plans = seen.plans
            if plan.spec.clean_group_rows == 1:  # as in no training of these tests
                plans = seen.eval_plans
            plans.append(plan)
            return load(plan, start_step)

        loader.load = loaded  # type: ignore[method-assign]
        return loader

    patch.setattr(pipelines, "open_loader", opened)


def _watch_steps(seen: Seen, patch: pytest.MonkeyPatch) -> None:
    feed = Step.feed
    call = Step.__call__
    runner = train.runner

    def fed(step: Step, images: Tensor, targets: Tensor, lr: float, **draws: Tensor) -> None:
        inputs = {"images": images, "targets": targets, **draws}
        seen.inputs.append({name: value.clone() for name, value in inputs.items()})
        feed(step, images, targets, lr, **draws)

    def stepped(step: Step) -> None:
        if not seen.weights:
            seen.optimiser = settings_of(step)
            seen.weights.append(step.network.flat.param.detach().clone())
        seen.seeds.append(torch.initial_seed())
        call(step)
        seen.rates.append(rate_of(step))
        seen.weights.append(step.network.flat.param.detach().clone())
        seen.gradients.append(step.network.flat.grad.clone())
        seen.adversarial.append(adversarial_rows(step))

    def run_as(step: Step, mode: Any) -> Any:
        seen.runner = mode
        return runner(step, mode)

    patch.setattr(Step, "feed", fed)
    patch.setattr(Step, "__call__", stepped)
    patch.setattr(train, "runner", run_as)


def _watch_evaluations(seen: Seen, patch: pytest.MonkeyPatch) -> None:
    evaluate = validation.evaluate

    def evaluated(
        model: torch.nn.Module, pairs: Any, evaluator: Any, **options: Any
    ) -> dict[str, float]:
        def looked_at() -> Iterator[tuple[Tensor, Tensor]]:
            for images, targets in pairs:
                seen.evaluated.append(images.clone())
                yield images, targets

        seen.evaluations.append(dict(options))
        return evaluate(model, looked_at(), evaluator, **options)

    patch.setattr(validation, "evaluate", evaluated)


def _watch_torch(seen: Seen, patch: pytest.MonkeyPatch) -> None:
    def compiled(model: torch.nn.Module) -> torch.nn.Module:
        seen.compiled += 1
        return model

    patch.setattr(torch, "compile", compiled)
    patch.setattr(torch, "set_num_threads", seen.threads.append)


def observe(words: Sequence[str], files: dict[str, Path], runs: Path) -> Seen:
    """Run with `words` on top of BASE to its end, or to its error."""
    config = load_config(None, [word.format(**files, runs=runs) for word in (*BASE, *words)])
    seen = Seen(config)
    said: list[str] = []

    def printed(*text: object, **_: object) -> None:
        said.append(" ".join(str(part) for part in text))

    with spies(seen), pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", printed)
        patch.setattr(Log, "say", lambda _, message: said.append(message))
        try:
            seen.run = Run(config)
            seen.folder = str(seen.run.folder.relative_to(runs.parent))
            seen.result = seen.run.train()
        except (ValueError, NonFinite) as error:
            seen.error = str(error).partition(";")[0]
    seen.said = "\n".join(said)
    return seen
