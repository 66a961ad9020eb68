"""Every config field arrives where it acts: two runs with no field at its default.

What reaches plan, loader, optimiser, step and evaluation is compared with values worked out here. A
field that is new must be added to a run, or the first test fails. test_fields.py has one case per
field.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import pipelines
from fap.config import Config, load_config
from fap.draws import dropout_seed
from fap.nets.build import plain
from pipelines.augment.spec import AugmentSpec
from pipelines.plan import EpochPlan, draw_epoch, eval_plan
from pipelines.plan_spec import PlanSpec
from tests.run.wiring import (
    DRAWS,
    FIELDS,
    IMAGES,
    OF_DETECTION,
    OF_LAYERS,
    Seen,
    beton,
    observe,
    written,
)

COMMON: dict[str, Any] = {
    "name": "every_field", "seed": 11, "resume": "auto", "paper": {"top1": 12.5}, "task": "doubled",
    "model.name": "cifar_resnet14", "model.num_classes": 5, "model.init": "{init}",
    "model.drop_path": 0.0,
    "method.group_rows": 4, "method.p_adv": "1/3", "method.eps_255": 3.0, "method.step_255": 2.0,
    "method.random_start": False, "method.weight_clean": 2.0, "method.weight_adv": 0.25,
    "method.aux": "norms",
    "data.train": "{five}", "data.val": "{other_five}", "data.pipeline": "dali", "data.size": 8,
    "data.resize": 11, "data.scale": [0.3, 0.9], "data.ratio": [0.8, 1.2], "data.flip": 0.3,
    "data.mean": [0.4, 0.5, 0.6], "data.std": [0.2, 0.3, 0.4], "data.threads": 2,
    "data.prefetch": 5, "data.filter": "bilinear", "data.eval_filter": "bicubic",
    "data.hw_decoder_load": 0.25,
    "data.decode": "auto",
    "optim.clean_batch": 8, "optim.lr": 0.8, "optim.weight_decay": 0.02,
    "optim.accumulate": 2, "optim.decay_on": "weights", "optim.head_lr_scale": 2.0,
    "optim.freeze": ["conv1"], "optim.ema": 0.75,
    "optim.label_smoothing": 0.1, "optim.clip_norm": 0.5,
    "budget.epochs": 4, "budget.warmup_epochs": 1.5, "budget.same_budget": False,
    "optim.class_weights": [0.5, 1.0, 2.0, 1.5, 0.75],
    "run.dir": "{runs}", "run.device": "cpu", "run.graph": "off", "run.norm_kernel": "framework",
    "run.compile": True, "run.torch_threads": 2, "run.max_steps": 7, "run.log_every": 3,
    "run.checkpoint_every": 3, "run.keep": 5, "run.keep_best": False, "run.eval_every": 3,
    "run.eval_batch": 10, "run.max_skipped": 7,
}  # fmt: skip
REUSE = COMMON | {
    "optim.momentum": 0.6, "optim.nesterov": True,
    "method.name": "noise", "method.schedule": "pipelined", "method.weight_noise": 0.75,
    "method.sync": False, "method.combine": "mean", "method.shuffle": "groups",
    "data.sampling": "balanced", "data.repeats": 2,
    "data.mix": "either", "data.mix_alpha": 0.7, "data.cutmix_alpha": 0.6, "data.mix_per": "row",
    "data.mix_on": "both", "run.amp": "bf16",
    "budget.milestones": [2, 3], "budget.gamma": 0.5,
    "data.augment": "randaugment", "data.augment_ops": 3, "data.augment_magnitude": 12,
    "data.color_jitter": [0.4, 0.3, 0.2, 0.1], "data.erase": 0.4, "data.augment_on": "clean",
}  # fmt: skip
SEPARATE = COMMON | {
    "optim.name": "adamw", "optim.betas": [0.7, 0.9], "optim.eps": 1e-3,
    "method.name": "decoupled", "method.attack_steps": 3, "method.targeted": False,
    "method.attack_bn": "batch", "method.sync": True, "method.shuffle": "groups",
    "data.crop": "pad", "data.pad": 2, "run.amp": "off", "data.sizes": [[0, 6], [2, 8]],
    "budget.lr_schedule": "linear", "budget.final_lr": 0.25,
    "data.augment": "augmix", "data.augment_ops": None, "data.augment_magnitude": 2,
    "data.color_jitter": [0.0, 0.5, 0.0, 0.0], "data.erase": 0.8, "data.augment_on": "adv",
}  # fmt: skip
NO_DEFAULT = {"reuse": REUSE, "separate": SEPARATE}
# What the method itself takes for a field that is unset.
UNSET = {
    "method.p_adv": "1/5", "method.eps_255": 1.0, "method.step_255": 1.0, "method.attack_steps": 1,
    "method.schedule": "fused", "method.random_start": True, "method.targeted": True,
    "method.attack_bn": "running", "method.weight_clean": 1.0, "method.weight_noise": 0.5,
    "method.weight_adv": 1.0, "method.combine": "sum",
}  # fmt: skip
# What cannot stand beside a field that these runs set: test_held_out.py.
IN_PLACE_OF_ANOTHER = {"data.val_share"}
MIX_DRAWS = ("mix_lam", "mix_box", "mix_partner")


@pytest.fixture(scope="module")
def everything(
    files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Seen]:
    """The runs of NO_DEFAULT, each made once."""
    folder = tmp_path_factory.mktemp("everything")
    torch.manual_seed(5)
    init = folder / "init.safetensors"
    safetensors.torch.save_file(plain("cifar_resnet14", 5).state_dict(), init)
    named = files | {"init": init, "other_five": beton(folder / "other_five.beton", 3, 5)}
    made: dict[str, Seen] = {}

    def run(name: str) -> Seen:
        if name not in made:
            words = [f"{k}={written(v)}" for k, v in NO_DEFAULT[name].items() if k != "paper"]
            # Those of BASE have no meaning for another schedule of the rate.
            words = ["budget.milestones=null", *words, "paper.top1=12.5"]
            made[name] = observe(words, named, folder / name)
        return made[name]

    return run


def size_in(name: str, epoch: int) -> int:
    """That of training, with data.sizes of the run called `separate`."""
    return 6 if name == "separate" and epoch < 2 else 8


def settled(seen: Seen) -> Config:
    """The config, and what data.decode = auto comes to on a CPU."""
    data = seen.config.data.model_copy(update={"decode": "cpu"})
    return seen.config.model_copy(update={"data": data})


def test_the_two_runs_have_no_field_at_its_default() -> None:
    """The generic part: a field that is new, or whose default becomes a value used here, fails."""
    given = REUSE | SEPARATE
    missing = "add the new field to a run, and to what is compared below"
    elsewhere = OF_DETECTION | OF_LAYERS | IN_PLACE_OF_ANOTHER
    assert set(given) | elsewhere == set(FIELDS), missing
    for runs in NO_DEFAULT.values():
        for name, value in runs.items():
            default = UNSET.get(name, FIELDS[name])
            same = json.loads(json.dumps(default, default=str)) == value
            # These have too few values for both runs to differ from the default in each; of the
            # policies one has a number of operations.
            few = ("method.sync", "run.amp", "data.augment_ops")
            assert not same or name in few, f"{name} = {value}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_DEFAULT)
def test_what_reaches_the_plan(name: str, everything: Callable[[str], Seen]) -> None:
    seen = everything(name)
    assert seen.error == ""
    expected = PlanSpec(
        seed=11,
        size=8,
        clean_rows=8,
        clean_group_rows=4,
        adv_rows=4,
        adv_group_rows=2,
        scale=(0.3, 0.9),
        ratio=(0.8, 1.2),
        flip=0.3,
        filter="bilinear",
        shuffle_groups=2,
    )
    own: dict[str, Any] = {
        "reuse": {
            "sampling": "balanced",
            "repeats": 2,
            "mix": "either",
            "mix_alpha": 0.7,
            "cutmix_alpha": 0.6,
            "mix_per": "row",
            "mix_on": "both",
            "augment": AugmentSpec("randaugment", 3, 12, (0.4, 0.3, 0.2, 0.1), 0.4, "clean"),
        },
        "separate": {
            "crop": "pad",
            "pad": 2,
            "augment": AugmentSpec("augmix", 2, 2, (0.0, 0.5, 0.0, 0.0), 0.8, "adv"),
        },
    }
    expected = replace(expected, **own[name])
    store = pipelines.open_store(seen.config.data.train or "")
    assert [plan.epoch for plan in seen.plans] == [0, 1, 2, 3]
    for plan in seen.plans:
        of_epoch = replace(expected, size=size_in(name, plan.epoch))
        assert plan.spec == of_epoch
        want = draw_epoch(of_epoch, store.heights, store.widths, plan.epoch, store.labels)
        for draw in DRAWS:
            np.testing.assert_array_equal(getattr(plan, draw), getattr(want, draw))
        for draw, values in vars(want.augment).items():
            np.testing.assert_array_equal(getattr(plan.augment, draw), values)


@pytest.mark.parametrize("name", NO_DEFAULT)
def test_what_reaches_the_step(name: str, everything: Callable[[str], Seen]) -> None:
    """The loader's images, the targets and the plan's draws of that very step; seed, threads."""
    seen = everything(name)
    assert seen.run is not None
    assert seen.run.config == settled(seen)
    assert len(seen.inputs) == 7
    mixes = name == "reuse"
    draws = ["noise_key", "shuffle"]
    if mixes:
        draws += MIX_DRAWS
    store = pipelines.open_store(seen.config.data.train or "")
    steps: list[tuple[EpochPlan, pipelines.Batch]] = []
    for plan in seen.plans:
        size = size_in(name, plan.epoch)
        loader = pipelines.open_loader("reference", store, size=size)
        steps += [(plan, batch) for batch in loader.load(plan)]
    for k, (inputs, (plan, batch)) in enumerate(zip(seen.inputs, steps, strict=False)):
        row = k % 2
        assert inputs.keys() == {"images", "targets", *draws}
        assert torch.equal(inputs["images"], batch.images)
        assert inputs["targets"].tolist() == store.labels[plan.index[row]].tolist()
        for draw in draws:
            want = torch.from_numpy(np.asarray(getattr(plan, draw)[row]).copy())
            assert torch.equal(inputs[draw], want.to(inputs[draw])), draw
    assert seen.seeds == [dropout_seed(11, k, 0) for k in range(7)]
    assert seen.threads == [2]
    assert seen.compiled == 1
    assert seen.run.step.network.norm_state.kernel == "framework"
    assert seen.runner == "off"
    assert seen.run.step.network.amp == seen.config.run.amp
    keys = torch.cat([inputs["noise_key"] for inputs in seen.inputs])
    assert len(keys.unique()) == 2 * 7, "every step and group has a noise of its own"
    if mixes:
        for inputs in seen.inputs:
            assert inputs["mix_lam"].shape == (12,)
            assert len(inputs["mix_lam"].unique()) >= 4  # areas of boxes in 8 x 8 pixels, shares


def nesterov(
    before: Tensor, gradient: Tensor, rate: Tensor, decay: Tensor, state: dict[str, Tensor], _: int
) -> Tensor:
    gradient = gradient + decay * before
    state["v"] = 0.6 * state.get("v", torch.zeros_like(before)) + gradient
    return before - rate * (gradient + 0.6 * state["v"])


def adamw(
    before: Tensor, gradient: Tensor, rate: Tensor, decay: Tensor, state: dict[str, Tensor], t: int
) -> Tensor:
    state["m"] = 0.7 * state.get("m", torch.zeros_like(before)) + 0.3 * gradient
    state["v"] = 0.9 * state.get("v", torch.zeros_like(before)) + 0.1 * gradient**2
    root = (state["v"] / (1 - 0.9**t)).sqrt() + 1e-3
    return before * (1 - rate * decay) - rate * state["m"] / (1 - 0.7**t) / root


@pytest.mark.parametrize("name", NO_DEFAULT)
def test_what_reaches_the_optimiser(name: str, everything: Callable[[str], Seen]) -> None:
    """The rates of the schedule, and the weights' movement: momentum and decay act."""
    seen = everything(name)
    assert seen.run is not None
    flat = seen.run.step.network.flat
    base = 0.8 * 8 / 256
    warm_up = [base * k / 3 for k in (1, 2, 3)]  # 1.5 epochs of 2 steps
    after = {
        "reuse": [1, 1 / 2, 1 / 2, 1 / 4],
        "separate": [1, 0.85, 0.7, 0.55],  # 5 steps from 1 to 1 / 4, of which max_steps leaves 4
    }[name]
    assert seen.rates == pytest.approx([*warm_up, *(base * share for share in after)], rel=1e-6)
    scale = torch.zeros_like(seen.weights[0])
    decay = torch.zeros_like(scale)
    for parameter, place in flat.slices.items():
        if parameter != "conv1.weight":
            scale[place] = 2.0 if parameter.startswith("fc.") else 1.0
            decay[place] = 0.02 if flat.parameters[parameter].ndim > 1 else 0.0
    assert seen.optimiser["kind"] == {"reuse": "SGD", "separate": "AdamW"}[name]
    update = nesterov if name == "reuse" else adamw
    state: dict[str, Tensor] = {}
    for i, rate in enumerate(seen.rates):
        before = seen.weights[i]
        expected = update(before, seen.gradients[i], rate * scale, decay, state, i + 1)
        torch.testing.assert_close(seen.weights[i + 1], expected, rtol=1e-5, atol=1e-6)
    frozen = flat.slices["conv1.weight"]
    assert torch.equal(seen.weights[-1][frozen], seen.weights[0][frozen])
    norms = [gradient.norm() for gradient in seen.gradients]
    assert max(norms).item() == pytest.approx(0.5, rel=1e-5), (
        "all are longer than clip_norm at first"
    )
    start = safetensors.torch.load_file(seen.config.model.init or "")
    first = seen.run.step.network.flat.named(seen.weights[0])
    assert all(torch.equal(v, start[k.replace(".aux.", ".")]) for k, v in first.items())


@pytest.mark.parametrize("name", NO_DEFAULT)
def test_what_reaches_loader_and_evaluation(name: str, everything: Callable[[str], Seen]) -> None:
    seen = everything(name)
    options: dict[str, Any] = {"size": 8, "threads": 2, "prefetch": 5, "hw_decoder_load": 0.25}
    options["device"] = torch.device("cpu")
    opened = [("five.beton", 8), *[("other_five.beton", 8)] * 4]
    if name == "separate":
        opened.insert(0, ("five.beton", 6))
    assert seen.loaders == [("dali", data, options | {"size": size}) for data, size in opened]
    # After epoch 3, and at the end: the raw weights, then their average.
    assert len(seen.evaluations) == 4
    for evaluation in seen.evaluations:
        assert evaluation["mean"] == (0.4, 0.5, 0.6)
        assert evaluation["std"] == (0.2, 0.3, 0.4)
        assert evaluation["amp"] == seen.config.run.amp
    store = pipelines.open_store(seen.config.data.val or "")
    sides = np.stack([store.heights, store.widths], 1)
    plan = seen.eval_plans[0]
    assert plan.index.shape == (3, 10)
    window = plan.window.reshape(-1, 4)[:IMAGES]
    np.testing.assert_array_equal(window[:, 2:], sides)
    place = plan.place.reshape(-1, 4)[:IMAGES]
    np.testing.assert_array_equal(place[:, 2:].min(1), 11)
    np.testing.assert_array_equal(place[:, :2], -np.rint((place[:, 2:] - 8) / 2))
    want = eval_plan(store.heights, store.widths, size=8, resize=11, batch=10, filter="bicubic")
    batches = [b.images for b in pipelines.open_loader("reference", store, size=8).load(want)]
    assert torch.equal(torch.cat(seen.evaluated[:3]), torch.cat(batches))


@pytest.mark.parametrize("name", NO_DEFAULT)
def test_what_reaches_the_run_folder(name: str, everything: Callable[[str], Seen]) -> None:
    seen = everything(name)
    assert seen.run is not None
    assert seen.folder == f"{name}/every_field/seed11"
    assert load_config(seen.run.folder / "config.yaml") == settled(seen)
    # Each third step and each epoch's last.
    assert [r["step"] for r in seen.records if "lr" in r] == [2, 3, 4, 6, 7]
    assert [r["step"] for r in seen.records if "val_top1" in r] == [6, 7]
    saved = [path.name for path in seen.run.saving.checkpoints.paths()]
    assert saved == [f"step_{k:08d}.safetensors" for k in (2, 3, 4, 6, 7)]


@pytest.mark.parametrize("name", NO_DEFAULT)
def test_what_reaches_the_model_and_the_summary(
    name: str, everything: Callable[[str], Seen]
) -> None:
    seen = everything(name)
    assert seen.run is not None
    model = seen.run.step.network.model
    assert model.fc.weight.shape == (5, 64)  # type: ignore[union-attr]
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert convolutions == 15  # cifar_resnet14
    for part in (
        "every_field, seed 11",
        "cifar_resnet14, 5 classes, 8 px",
        "norms      15 BatchNorm2d with auxiliary twins",
        "eps 3/255",
        "shuffle    groups",
    ):
        assert part in seen.said
    of_its_own = "away from the true label, through batch statistics" in seen.said
    assert of_its_own == (name == "separate")
