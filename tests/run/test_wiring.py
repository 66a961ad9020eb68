"""Every config field arrives where it acts: tiny runs, in this process, seen from inside.

Three parts. Two runs with no field at its default: what reaches plan, loader, optimiser, step and
evaluation is compared with values worked out here. One case per field: changing it changes
something that can be seen from outside. Two ranks in two threads: the shuffle's scope. A field that
is new must be added to the lists, or the tests fail.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from pydantic import BaseModel
from torch import Tensor

import pipelines
from fap.cli import eval as eval_cli
from fap.config import Config, load_config
from fap.distributed import ONE_RANK, Ranks
from fap.nets.build import build, plain
from fap.run import train
from fap.run.log import Log
from fap.run.train import NonFinite, Run, plan_spec
from fap.step.step import Step, dropout_seed
from pipelines.plan import EpochPlan, PlanSpec, draw_epoch, eval_plan
from tests.conftest import write_beton

IMAGES, CLASSES = 24, 4


# ------------------------------------------------------------------ fields


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


def written(value: Any) -> str:
    """As on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def value_of(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


# ------------------------------------------------------------------ data


def beton(path: Path, seed: int, classes: int) -> Path:
    """Raw images of mixed sizes, 14-22 pixels a side; labels 0, 1, ... in turn."""
    rng = np.random.default_rng(seed)
    shapes = rng.integers(14, 23, (IMAGES, 2))
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return write_beton(path, images, [i % classes for i in range(IMAGES)])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few kilobytes; a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the words below name in braces."""
    folder = tmp_path_factory.mktemp("wiring")
    torch.manual_seed(99)
    state = plain("cifar_resnet8", CLASSES).state_dict()
    safetensors.torch.save_file(state, folder / "weights.safetensors")
    return {
        "data": beton(folder / "data.beton", 0, CLASSES),
        "other": beton(folder / "other.beton", 1, CLASSES),
        "five": beton(folder / "five.beton", 2, 5),
        "weights": folder / "weights.safetensors",
    }


BASE = [
    "data.train={data}", "data.val={data}", "data.pipeline=reference", "data.threads=1", "data.size=8", "data.resize=10",
    "model.name=cifar_resnet8", f"model.num_classes={CLASSES}", "optim.clean_batch=8", "method.group_rows=4", "method.p_adv=1/3",
    "budget.epochs=6", "budget.milestones=[3]", "run.device=cpu", "run.amp=off", "run.dir={runs}", "run.log_every=1",
    "run.torch_threads=1", "run.keep=50", "run.eval_every=4",
]  # fmt: skip
# 8 clean and 4 adversarial rows of 24 images: 2 steps an epoch; 6 / (4/3) = 4 epochs, milestone 3 /
# (4/3) = 2.


# ------------------------------------------------------------------ what a run shows


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
    loaders: list[tuple[str, str, dict[str, Any]]] = field(
        default_factory=list
    )  # pipeline, data, options
    optimiser: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Tensor]] = field(default_factory=list)  # what the step holds as it runs
    rates: list[float] = field(
        default_factory=list
    )  # the learning rate the optimiser has, after each step
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
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def aspects(self) -> dict[str, Any]:
        """What two runs are compared by."""
        shown: dict[str, Any] = {
            "error": self.error,
            "folder": self.folder,
            "loaders": self.loaders,
            "runner": self.runner,
        }
        shown |= {
            "optimiser": self.optimiser,
            "rates": self.rates,
            "threads": self.threads,
            "compiled": self.compiled,
        }
        shown |= {"accuracy": self.result.get("last")}
        shown |= {"seeds": self.seeds, "steps": len(self.inputs), "evaluations": self.evaluations}
        for name in (
            "index",
            "window",
            "flip",
            "noise_key",
            "mix_lam",
            "mix_box",
            "mix_partner",
            "shuffle",
        ):
            shown[f"plan.{name}"] = digest(*(getattr(p, name) for p in self.plans))
            shown[f"eval.{name}"] = digest(*(getattr(p, name) for p in self.eval_plans))
        for name in self.inputs[0] if self.inputs else ():
            shown[f"input.{name}"] = digest(*(i[name] for i in self.inputs))
        shown |= {"start": digest(*self.weights[:1]), "weights": digest(*self.weights[1:])}
        shown |= {"adversarial": digest(*self.adversarial), "evaluated": digest(*self.evaluated)}
        if self.run is not None:
            step = self.run.step
            shown["model"] = {k: tuple(v.shape) for k, v in step.model.state_dict().items()}
            shown["passes"] = [[tuple(b) for b in blocks] for blocks in step.passes]
            shown["row weights"] = (step.row_weight, step.main_factor, step.aux_factor)
            shown["kernel"] = step.norm_state.kernel
            shown["device"] = str(step.device)
            shown["checkpoints"] = sorted(
                p.name for p in (self.run.folder / "checkpoints").glob("*")
            )
            shown["log"] = [r["step"] for r in self.records if "lr" in r]
        return shown


@contextlib.contextmanager
def spies(seen: Seen) -> Iterator[None]:
    """Look at the joints of a run; everything goes on as without, but every pipeline is
    `reference`, nothing compiles.
    """
    open_loader, evaluate, runner, call = (
        pipelines.open_loader,
        train.evaluate,
        train.runner,
        Step.__call__,
    )
    sgd = torch.optim.SGD

    def opened(name: str, store: pipelines.Store, **options: Any) -> pipelines.Loader:
        seen.loaders.append((name, Path(store.path).name, dict(options)))
        loader = open_loader("reference", store, size=options["size"], device=options["device"])
        load = loader.load

        def loaded(plan: EpochPlan, start_step: int = 0) -> Iterator[pipelines.Batch]:
            (seen.eval_plans if plan.spec.crop == "center" else seen.plans).append(plan)
            return load(plan, start_step)

        loader.load = loaded  # type: ignore[method-assign]
        return loader

    def optimiser(*args: Any, **options: Any) -> torch.optim.Optimizer:
        seen.optimiser = {k: float(v) for k, v in options.items() if k not in ("fused",)}
        return sgd(*args, **options)

    def stepped(step: Step) -> None:
        if not seen.weights:
            seen.weights.append(step.flat.param.detach().clone())
        seen.inputs.append({k: v.clone() for k, v in vars(step.inputs).items()})
        seen.seeds.append(torch.initial_seed())
        call(step)
        seen.rates.append(float(step.optimizer.param_groups[0]["lr"]))
        seen.weights.append(step.flat.param.detach().clone())
        seen.gradients.append(step.flat.grad.clone())
        seen.adversarial.append(step.adv_255.clone())

    def evaluated(
        model: torch.nn.Module, batches: Iterator[pipelines.Batch], **options: Any
    ) -> Any:
        def looked_at() -> Iterator[pipelines.Batch]:
            for batch in batches:
                seen.evaluated.append(batch.images.clone())
                yield batch

        seen.evaluations.append(
            {k: digest(v) if isinstance(v, Tensor) else v for k, v in options.items()}
        )
        return evaluate(model, looked_at(), **options)

    def run_as(step: Step, mode: Any) -> Any:
        seen.runner = mode
        return runner(step, mode)

    def compiled(model: torch.nn.Module) -> torch.nn.Module:
        seen.compiled += 1
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines, "open_loader", opened)
        patch.setattr(torch.optim, "SGD", optimiser)
        patch.setattr(torch, "compile", compiled)
        patch.setattr(Step, "__call__", stepped)
        patch.setattr(train, "evaluate", evaluated)
        patch.setattr(train, "runner", run_as)
        patch.setattr(torch, "set_num_threads", seen.threads.append)
        yield


def observe(words: Sequence[str], files: dict[str, Path], runs: Path) -> Seen:
    """Run with `words` on top of BASE to its end, or to its error."""
    config = load_config(None, [word.format(**files, runs=runs) for word in (*BASE, *words)])
    seen = Seen(config)
    said: list[str] = []
    with spies(seen), pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *text, **_: said.append(" ".join(map(str, text))))
        patch.setattr(Log, "say", lambda _, message: said.append(message))
        try:
            seen.run = Run(config)
            seen.folder = str(seen.run.folder.relative_to(runs.parent))
            seen.result = seen.run.train()
        except (ValueError, NonFinite) as e:
            seen.error = str(e).partition(";")[0]
    seen.said = "\n".join(said)
    return seen


# ------------------------------------------------------------------ 1. no field at its default


COMMON: dict[str, Any] = {
    "name": "every_field", "seed": 11, "resume": "auto", "paper": {"top1": 12.5},
    "model.name": "cifar_resnet14", "model.num_classes": 5, "model.init": "{init}",
    "method.group_rows": 4, "method.p_adv": "1/3", "method.eps_255": 3.0, "method.step_255": 2.0, "method.random_start": False,
    "method.weight_clean": 2.0, "method.weight_adv": 0.25,
    "data.train": "{five}", "data.val": "{other_five}", "data.pipeline": "dali", "data.size": 8, "data.resize": 11,
    "data.scale": [0.3, 0.9], "data.ratio": [0.8, 1.2], "data.flip": 0.3, "data.mean": [0.4, 0.5, 0.6],
    "data.std": [0.2, 0.3, 0.4], "data.threads": 2, "data.prefetch": 5, "data.hw_decoder_load": 0.25,
    "optim.clean_batch": 8, "optim.lr": 0.8, "optim.momentum": 0.6, "optim.weight_decay": 0.02, "optim.label_smoothing": 0.1,
    "optim.warmup_epochs": 1.5, "budget.epochs": 4, "budget.milestones": [2, 3], "budget.gamma": 0.5,
    "budget.same_budget": False, "run.dir": "{runs}", "run.device": "cpu", "run.graph": "off",
    "run.norm_kernel": "framework", "run.compile": True, "run.torch_threads": 2, "run.max_steps": 7, "run.log_every": 3,
    "run.checkpoint_every": 3, "run.keep": 5, "run.eval_every": 3, "run.eval_batch": 10, "run.max_skipped": 7,
}  # fmt: skip
REUSE = COMMON | {
    "method.name": "noise", "method.schedule": "pipelined", "method.weight_noise": 0.75, "method.sync": False,
    "method.combine": "mean", "method.shuffle": "groups", "data.mix": "cutmix", "data.mix_alpha": 0.7, "run.amp": "bf16",
}  # fmt: skip
SEPARATE = COMMON | {
    "method.name": "decoupled", "method.attack_steps": 3, "method.targeted": False, "method.attack_bn": "batch",
    "method.sync": True, "method.shuffle": "groups", "data.crop": "pad", "data.pad": 2, "run.amp": "off",
}  # fmt: skip
NO_DEFAULT = {"reuse": REUSE, "separate": SEPARATE}
UNSET = {"method.p_adv": "1/5", "method.eps_255": 1.0, "method.step_255": 1.0, "method.attack_steps": 1,
         "method.schedule": "fused", "method.random_start": True, "method.targeted": True, "method.attack_bn": "running",
         "method.weight_clean": 1.0, "method.weight_noise": 0.5, "method.weight_adv": 1.0, "method.combine": "sum"}  # fmt: skip
"""What the method itself takes for a field that is unset."""


@pytest.fixture(scope="module")
def everything(
    files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Seen]:
    """The runs of NO_DEFAULT, each made once."""
    folder = tmp_path_factory.mktemp("everything")
    torch.manual_seed(5)
    safetensors.torch.save_file(
        plain("cifar_resnet14", 5).state_dict(), folder / "init.safetensors"
    )
    named = files | {
        "init": folder / "init.safetensors",
        "other_five": beton(folder / "other_five.beton", 3, 5),
    }
    made: dict[str, Seen] = {}

    def run(name: str) -> Seen:
        if name not in made:
            words = [f"{k}={written(v)}" for k, v in NO_DEFAULT[name].items() if k != "paper"]
            made[name] = observe([*words, "paper.top1=12.5"], named, folder / name)
        return made[name]

    return run


def test_the_two_runs_have_no_field_at_its_default() -> None:
    """The generic part: a field that is new, or whose default becomes a value used here, fails."""
    given = REUSE | SEPARATE
    assert set(given) == set(FIELDS), "add the new field to a run, and to what is compared below"
    for runs in NO_DEFAULT.values():
        for name, value in runs.items():
            default = UNSET.get(name, FIELDS[name])
            same = json.loads(json.dumps(default, default=str)) == value
            # Three fields have too few values for both runs to differ from the default in each.
            assert not same or name in ("method.sync", "run.amp"), f"{name} = {value}"


@pytest.mark.parametrize("name", NO_DEFAULT)
def test_what_reaches_the_plan(name: str, everything: Callable[[str], Seen]) -> None:
    seen = everything(name)
    assert seen.error == ""
    adv = {"adv_rows": 4, "adv_group_rows": 2}
    expected = PlanSpec(seed=11, size=8, clean_rows=8, clean_group_rows=4, **adv, scale=(0.3, 0.9), ratio=(0.8, 1.2), flip=0.3,
                        shuffle_groups=2)  # fmt: skip
    own: dict[str, Any] = {
        "reuse": {"mix": "cutmix", "mix_alpha": 0.7},
        "separate": {"crop": "pad", "pad": 2},
    }
    expected = replace(expected, **own[name])
    store = pipelines.open_store(seen.config.data.train or "")
    assert [p.epoch for p in seen.plans] == [0, 1, 2, 3]
    for plan in seen.plans:
        assert plan.spec == expected
        want = draw_epoch(expected, store.heights, store.widths, plan.epoch)
        for array in (
            "index",
            "window",
            "flip",
            "noise_key",
            "shuffle",
            "mix_lam",
            "mix_box",
            "mix_partner",
        ):
            np.testing.assert_array_equal(getattr(plan, array), getattr(want, array))


@pytest.mark.parametrize("name", NO_DEFAULT)
def test_what_reaches_the_step(name: str, everything: Callable[[str], Seen]) -> None:
    """As it runs: the loader's images and labels, the plan's draws of that very step, the seed, the
    threads.
    """
    seen = everything(name)
    assert seen.run is not None
    assert seen.run.step.config == seen.config
    assert len(seen.inputs) == 7
    store = pipelines.open_store(seen.config.data.train or "")
    loader = pipelines.open_loader("reference", store, size=8)
    steps = [(plan, batch) for plan in seen.plans for batch in loader.load(plan)]
    for k, (inputs, (plan, batch)) in enumerate(zip(seen.inputs, steps, strict=False)):
        row = k % 2
        assert torch.equal(inputs["images"], batch.images)
        assert inputs["labels"].tolist() == store.labels[plan.index[row]].tolist()
        for draw in (
            "noise_key",
            "shuffle",
            *(("mix_lam", "mix_box", "mix_partner") if name == "reuse" else ()),
        ):
            want = torch.from_numpy(np.asarray(getattr(plan, draw)[row]).copy())
            assert torch.equal(inputs[draw], want.to(inputs[draw])), draw
    assert seen.seeds == [dropout_seed(11, k, 0) for k in range(7)]
    assert seen.threads == [2]
    assert seen.compiled == 1
    assert seen.run.step.norm_state.kernel == "framework"
    assert seen.runner == "off"
    assert seen.run.step.amp == ("bf16" if name == "reuse" else "off")
    keys = torch.cat([i["noise_key"] for i in seen.inputs])
    assert len(keys.unique()) == 2 * 7, "every step and group has a noise of its own"
    if name == "reuse":
        assert (
            len({i["mix_lam"].item() for i in seen.inputs}) >= 4
        )  # areas of boxes in 8 x 8 pixels


@pytest.mark.parametrize("name", NO_DEFAULT)
def test_what_reaches_the_optimiser(name: str, everything: Callable[[str], Seen]) -> None:
    """The rates of the schedule, and the weights' movement from the gradients: momentum and decay
    act.
    """
    seen = everything(name)
    assert seen.optimiser == {"lr": 0.0, "momentum": 0.6, "weight_decay": 0.02}
    base = 0.8 * 8 / 256
    warm_up = [base * k / 3 for k in (1, 2, 3)]  # 1.5 epochs of 2 steps
    assert seen.rates == pytest.approx([*warm_up, base, base / 2, base / 2, base / 4], rel=1e-6)
    velocity = torch.zeros_like(seen.weights[0])
    for before, after, gradient, rate in zip(
        seen.weights, seen.weights[1:], seen.gradients, seen.rates, strict=False
    ):
        velocity = 0.6 * velocity + gradient + 0.02 * before
        torch.testing.assert_close(after, before - rate * velocity, rtol=1e-5, atol=1e-7)
    assert seen.gradients[0].abs().max() > 0
    assert seen.run is not None
    start = safetensors.torch.load_file(seen.config.model.init or "")
    first = seen.run.step.flat.named(seen.weights[0])
    assert all(torch.equal(v, start[k.replace(".aux.", ".")]) for k, v in first.items())


@pytest.mark.parametrize("name", NO_DEFAULT)
def test_what_reaches_loader_and_evaluation(name: str, everything: Callable[[str], Seen]) -> None:
    seen = everything(name)
    options = {
        "size": 8,
        "threads": 2,
        "prefetch": 5,
        "hw_decoder_load": 0.25,
        "device": torch.device("cpu"),
    }
    opened = [
        ("dali", "five.beton", options),
        ("dali", "other_five.beton", options),
        ("dali", "other_five.beton", options),
    ]
    assert seen.loaders == opened
    assert len(seen.evaluations) == 2  # after epoch 3, and at the end
    for options in seen.evaluations:
        assert (options["mean"], options["std"]) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
        assert options["amp"] == ("bf16" if name == "reuse" else "off")
    store = pipelines.open_store(seen.config.data.val or "")
    side = np.minimum(store.heights, store.widths) * 8 // 11
    plan = seen.eval_plans[0]
    assert plan.index.shape == (3, 10)
    window = plan.window.reshape(-1, 4)[:IMAGES]
    np.testing.assert_array_equal(window[:, 2], side)
    np.testing.assert_array_equal(window[:, 0], (store.heights - side) // 2)
    want = eval_plan(store.heights, store.widths, size=8, resize=11, batch=10)
    batches = [b.images for b in pipelines.open_loader("reference", store, size=8).load(want)]
    assert torch.equal(torch.cat(seen.evaluated[:3]), torch.cat(batches))


@pytest.mark.parametrize("name", NO_DEFAULT)
def test_what_reaches_the_run_folder(name: str, everything: Callable[[str], Seen]) -> None:
    seen = everything(name)
    assert seen.run is not None
    assert seen.folder == f"{name}/every_field/seed11"
    assert load_config(seen.run.folder / "config.yaml") == seen.config
    assert [r["step"] for r in seen.records if "lr" in r] == [
        2,
        3,
        4,
        6,
        7,
    ]  # each third step and each epoch's last
    assert [r["step"] for r in seen.records if "val_top1" in r] == [6, 7]
    assert [p.name for p in seen.run.checkpoints.paths()] == [
        f"step_{k:08d}.safetensors" for k in (2, 3, 4, 6, 7)
    ]
    assert seen.run.step.model.fc.weight.shape == (5, 64)  # type: ignore[union-attr]
    assert (
        sum(isinstance(m, torch.nn.Conv2d) for m in seen.run.step.model.modules()) == 15
    )  # cifar_resnet14
    for part in (
        "every_field, seed 11",
        "cifar_resnet14, 5 classes, 8 px",
        "eps 3/255",
        "shuffle    groups",
    ):
        assert part in seen.said
    assert ("away from the true label, through batch statistics" in seen.said) == (
        name == "separate"
    )


# ------------------------------------------------------------------ 2. one case per field


@dataclass(frozen=True)
class Case:
    """`change` on top of `base` makes each of the aspects another one."""

    change: str
    aspects: tuple[str, ...]
    base: tuple[str, ...] = ()
    error: str = ""  # of the changed run; "" = it trains to its end


SEPARATELY = (
    "method.name=decoupled",
    "method.eps_255=4",
    "method.attack_steps=2",
    "run.max_steps=2",
)
FIVE = ("data.train={five}", "data.val={five}", "model.num_classes=5")
PAD = ("data.crop=pad",)
MIX = ("data.mix=mixup",)
CASES = {
    "name": Case("name=other", ("folder",)),
    "seed": Case("seed=5", ("folder", "start", "seeds", "plan.index", "plan.noise_key", "weights")),
    "model.name": Case("model.name=cifar_resnet14", ("model",)),
    "model.num_classes": Case("model.num_classes=4", ("error",), FIVE, error="num_classes"),
    "model.init": Case("model.init={weights}", ("start", "weights")),
    "method.name": Case("method.name=noise", ("adversarial", "weights")),
    "method.group_rows": Case("method.group_rows=8", ("plan.noise_key", "adversarial", "weights")),
    "method.p_adv": Case("method.p_adv=1/2", ("passes", "row weights", "plan.shuffle", "steps")),
    "method.schedule": Case("method.schedule=pipelined", ("passes", "weights")),
    "method.eps_255": Case("method.eps_255=4", ("adversarial", "weights")),
    "method.step_255": Case("method.step_255=1.5", ("adversarial", "weights")),
    "method.attack_steps": Case("method.attack_steps=4", ("adversarial", "weights"), SEPARATELY),
    "method.random_start": Case("method.random_start=false", ("adversarial", "weights")),
    "method.targeted": Case("method.targeted=false", ("adversarial", "weights"), SEPARATELY),
    "method.attack_bn": Case("method.attack_bn=batch", ("adversarial", "weights"), SEPARATELY),
    "method.weight_clean": Case("method.weight_clean=2", ("row weights", "weights")),
    "method.weight_noise": Case("method.weight_noise=1", ("row weights", "weights")),
    "method.weight_adv": Case("method.weight_adv=1", ("row weights", "weights")),
    "method.sync": Case("method.sync=false", ("row weights", "weights")),
    "method.combine": Case("method.combine=mean", ("row weights", "weights")),
    "method.shuffle": Case("method.shuffle=off", ("plan.shuffle", "adversarial", "weights")),
    "data.train": Case("data.train={other}", ("loaders", "input.images", "weights")),
    "data.val": Case("data.val={other}", ("loaders", "evaluated", "accuracy")),
    "data.pipeline": Case("data.pipeline=dali", ("loaders",)),
    "data.size": Case("data.size=9", ("input.images", "evaluated")),
    "data.resize": Case("data.resize=13", ("eval.window", "evaluated")),
    "data.crop": Case("data.crop=pad", ("plan.window", "input.images")),
    "data.scale": Case("data.scale=[0.5,1]", ("plan.window", "input.images")),
    "data.ratio": Case("data.ratio=[1,1]", ("plan.window", "input.images")),
    "data.pad": Case("data.pad=1", ("plan.window", "input.images"), PAD),
    "data.flip": Case("data.flip=0", ("plan.flip", "input.images")),
    "data.mix": Case("data.mix=cutmix", ("input.mix_lam", "input.mix_box", "input.mix_partner", "weights")),
    "data.mix_alpha": Case("data.mix_alpha=0.1", ("plan.mix_lam", "input.mix_lam", "weights"), MIX),
    "data.mean": Case("data.mean=[0.1,0.5,0.5]", ("weights", "evaluations")),
    "data.std": Case("data.std=[0.5,0.5,0.1]", ("weights", "evaluations")),
    "data.threads": Case("data.threads=2", ("loaders",)),
    "data.prefetch": Case("data.prefetch=1", ("loaders",)),
    "data.hw_decoder_load": Case("data.hw_decoder_load=0", ("loaders",)),
    "optim.clean_batch": Case("optim.clean_batch=16", ("steps", "rates", "passes", "input.images")),
    "optim.lr": Case("optim.lr=0.2", ("rates", "weights")),
    "optim.momentum": Case("optim.momentum=0.5", ("optimiser", "weights")),
    "optim.weight_decay": Case("optim.weight_decay=0.1", ("optimiser", "weights")),
    "optim.label_smoothing": Case("optim.label_smoothing=0.2", ("weights",)),
    "optim.warmup_epochs": Case("optim.warmup_epochs=1", ("rates", "weights")),
    "budget.epochs": Case("budget.epochs=8", ("steps",)),
    "budget.milestones": Case("budget.milestones=[4]", ("rates", "weights")),
    "budget.gamma": Case("budget.gamma=0.5", ("rates", "weights")),
    "budget.same_budget": Case("budget.same_budget=false", ("steps",)),
    "run.dir": Case("run.dir={runs}/deeper", ("folder",)),
    "run.device": Case("run.device=cuda", ("device",), error="" if torch.cuda.is_available() else "sees no GPU"),
    "run.amp": Case("run.amp=bf16", ("weights", "evaluations")),
    "run.graph": Case("run.graph=on", ("runner",), error="" if torch.cuda.is_available() else "need a GPU"),
    "run.norm_kernel": Case("run.norm_kernel=framework", ("kernel",)),
    "run.compile": Case("run.compile=true", ("compiled",)),
    "run.torch_threads": Case("run.torch_threads=2", ("threads",)),
    "run.max_steps": Case("run.max_steps=3", ("steps",)),
    "run.log_every": Case("run.log_every=2", ("log",), ("run.eval_every=9",)),
    "run.checkpoint_every": Case("run.checkpoint_every=1", ("checkpoints",)),
    "run.keep": Case("run.keep=1", ("checkpoints",)),
    "run.eval_every": Case("run.eval_every=1", ("evaluations", "evaluated")),
    "run.eval_batch": Case("run.eval_batch=7", ("eval.index",)),
    "run.max_skipped": Case("run.max_skipped=2", ("steps",), ("optim.lr=1e30", "run.max_skipped=4"), error="2 non-finite"),
}  # fmt: skip
ELSEWHERE = {"resume", "paper"}  # the tests of these names below


@pytest.fixture(scope="module")
def bases(
    files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, ...]], Seen]:
    """The runs without the changes, each made once."""
    made: dict[tuple[str, ...], Seen] = {}

    def base(words: tuple[str, ...]) -> Seen:
        if words not in made:
            made[words] = observe(words, files, tmp_path_factory.mktemp("base") / "runs")
        return made[words]

    return base


def test_every_field_has_a_case() -> None:
    assert set(CASES) | ELSEWHERE == set(FIELDS), (
        "give the new field a case in which changing it changes something"
    )
    for name, case in CASES.items():
        assert case.change.startswith(f"{name}="), "a case changes its own field, and no other"
        assert case.aspects


def test_the_same_run_shows_the_same(
    bases: Callable[[tuple[str, ...]], Seen], files: dict[str, Path], tmp_path: Path
) -> None:
    """Else the cases below would prove nothing."""
    assert observe((), files, tmp_path / "runs").aspects() == bases(()).aspects()


@pytest.mark.parametrize("name", CASES)
def test_changing_a_field_changes_what_it_is_about(
    name: str, bases: Callable[[tuple[str, ...]], Seen], files: dict[str, Path], tmp_path: Path
) -> None:
    case = CASES[name]
    base = bases(case.base)
    changed = observe((*case.base, case.change), files, tmp_path / "runs")
    assert value_of(changed.config, name) != value_of(base.config, name)
    if name != "run.max_skipped":
        assert base.error == ""
    assert case.error in changed.error
    assert bool(case.error) == bool(changed.error), changed.error
    before, after = base.aspects(), changed.aspects()
    for aspect in case.aspects:
        assert aspect in before.keys() | after.keys()
        assert before.get(aspect) != after.get(aspect), f"{case.change} left {aspect} as it was"


def test_resume(files: dict[str, Path], tmp_path: Path) -> None:
    half = observe(["run.max_steps=4"], files, tmp_path / "runs")
    assert len(half.inputs) == 4
    never = observe(["resume=never"], files, tmp_path / "runs")
    assert "never overwritten" in never.error
    assert never.inputs == []
    auto = observe(["resume=auto"], files, tmp_path / "runs")
    whole = observe(["resume=auto"], files, tmp_path / "another" / "runs")
    assert (len(auto.inputs), len(whole.inputs)) == (4, 8)
    assert torch.equal(auto.weights[-1], whole.weights[-1])


def test_paper(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fap-eval shows the paper's number beside ours."""
    for number in (12.5, 67.0):
        seen = observe(
            [f"paper.top1={number}", "run.max_steps=1", f"name=n{number:.0f}"],
            files,
            tmp_path / "runs",
        )
        assert seen.run is not None
        newest = seen.run.checkpoints.paths()[-1]
        to = ["--device", "cpu", "--pipeline", "reference", "--out", str(tmp_path / "eval")]
        capsys.readouterr()
        eval_cli.main([str(newest), "--data", str(files["data"]), *to])
        assert f"(paper {number:g})" in capsys.readouterr().out


# ------------------------------------------------------------------ the leak monitor


@pytest.mark.parametrize("mix", [None, "mixup", "cutmix"])
@pytest.mark.parametrize("leaks", [True, False])
def test_the_leak_monitor_does_not_judge_mixed_rows(
    mix: str | None,
    leaks: bool,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mixed clean rows are scored on one of two labels: adversarial rows above them are no alarm."""
    taken = Step.take_metrics

    def made_up(step: Step) -> dict[str, float]:
        metrics = taken(step)
        share = {"correct_clean": 0.5, "correct_adv": 0.75 if leaks else 0.25}
        return metrics | {
            k: part * metrics[k.replace("correct", "rows")] for k, part in share.items()
        }

    monkeypatch.setattr(Step, "take_metrics", made_up)
    seen = observe([f"data.mix={written(mix)}", "run.max_steps=2"], files, tmp_path / "runs")
    assert seen.error == ""
    closed = [r for r in seen.records if "epoch_acc_adv" in r]
    assert [r["epoch_acc_adv"] > r["epoch_acc_clean"] for r in closed] == [leaks]
    warned = leaks and mix is None
    assert ("leak labels" in seen.said) == warned
    assert [r.get("leak") for r in closed] == [1.0 if warned else None]


# ------------------------------------------------------------------ 3. ranks


class Exchange:
    """What threads that play ranks pass through: everyone's value, in the order of the ranks."""

    def __init__(self, world: int) -> None:
        self.values: list[Tensor] = [torch.empty(0)] * world
        self.barrier = threading.Barrier(world, timeout=60)

    def all_of(self, rank: int, value: Tensor) -> list[Tensor]:
        self.values[rank] = value.clone()
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """A rank that is a thread of this process."""

    exchange: Exchange = field(default_factory=lambda: Exchange(1))

    def sum_(self, flat: Tensor) -> None:
        flat.copy_(torch.stack(self.exchange.all_of(self.rank, flat)).sum(0))

    def gather_rows(self, rows: Tensor) -> Tensor:
        return torch.cat(self.exchange.all_of(self.rank, rows))


def ranks_config(shuffle: str, schedule: str) -> Config:
    words = ["model.name=cifar_resnet8", "model.num_classes=5", "data.size=8", "data.resize=8", "data.crop=pad", "optim.lr=0.8",
             "optim.clean_batch=32", "method.group_rows=4", "method.p_adv=1/3", f"method.shuffle={shuffle}",
             f"method.schedule={schedule}"]  # fmt: skip
    return load_config(None, words)  # 8 clean and 8 adversarial groups, of 4 and 2 rows


def train_on(
    config: Config, ranks: Ranks, plan: EpochPlan, model: torch.nn.Module, out: dict[int, Step]
) -> None:
    """The steps of `plan` in float64 as the loop does them, but for the loader."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (144, 3, 8, 8), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 5, 144))
    step = Step(model, config, ranks)
    own = plan.for_rank(ranks.rank, ranks.world)
    draws = Run._draws(SimpleNamespace(ranks=ranks, step=step, config=config, device="cpu"), own)  # type: ignore[arg-type]
    for k in range(len(own)):
        rows = torch.from_numpy(own.index[k].astype(np.int64))
        step.feed(images[rows], labels[rows], 0.1, **{name: v[k] for name, v in draws.items()})
        step()
    out[ranks.rank] = step


@pytest.mark.parametrize("schedule", ["fused", "pipelined"])
@pytest.mark.parametrize("shuffle", ["ranks", "groups"])
def test_two_ranks_shuffle_within_their_scope_and_train_like_one(
    shuffle: str, schedule: str
) -> None:
    """`ranks`: over all groups. `groups`: inside each rank. One rank that executes the same plan
    gets the same weights.
    """
    config = ranks_config(shuffle, schedule)
    spec = plan_spec(config, Ranks(0, 2))
    assert spec.shuffle_groups == (8 if shuffle == "ranks" else 4)
    sides = np.full(144, 8)
    plan = draw_epoch(spec, sides, sides, epoch=0)
    crosses = (plan.shuffle // 8) != (np.arange(16) // 8)  # 8 adversarial rows a rank
    assert crosses.any() == (shuffle == "ranks")
    assert ((plan.shuffle // 2) != (np.arange(16) // 2)).all()  # every row leaves its group

    torch.manual_seed(0)
    model = build("cifar_resnet8", 5, size=8).double()
    one: dict[int, Step] = {}
    train_on(config, ONE_RANK, plan, copy.deepcopy(model), one)
    exchange, two = Exchange(2), dict[int, Step]()
    threads = [
        threading.Thread(
            target=train_on,
            args=(config, ThreadRanks(rank, 2, rank, exchange), plan, copy.deepcopy(model), two),
        )
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(two) == {0, 1}
    for step in two.values():
        torch.testing.assert_close(
            step.flat.param.data, one[0].flat.param.data, rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(step.flat.stats, one[0].flat.stats, rtol=1e-9, atol=1e-12)
    both = torch.cat([two[rank].adv_255 for rank in range(2)])
    torch.testing.assert_close(both, one[0].adv_255, rtol=1e-9, atol=1e-9)
    # Without the shuffle the same step trains otherwise, so the above can tell.
    off: dict[int, Step] = {}
    train_on(ranks_config("off", schedule), ONE_RANK, plan, copy.deepcopy(model), off)
    assert (off[0].flat.param.data - one[0].flat.param.data).abs().max() > 1e-6
