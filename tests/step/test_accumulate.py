"""`optim.accumulate`: a step in parts is the step of the large batch, in less memory."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fap.methods import METHODS
from fap.sections import MethodConfig
from fap.step.passes import passes_of
from fap.step.step import Step
from tests.step.made_steps import SCHEDULES, feed, make
from tests.step.test_passes import any_method
from tests.step.twin_checks import TinyNet, TinyResNet, check, close, config_of, draw, models

METHODS_HERE: dict[str, dict[str, Any]] = {
    **{schedule: {"name": "fast_advprop", "schedule": schedule} for schedule in SCHEDULES},
    "noise": {"name": "noise"},
    "vanilla": {"name": "vanilla", "p_adv": None},
    "advprop": {"name": "advprop", "p_adv": None, "attack_steps": 2},
    "decoupled": {"name": "decoupled", "attack_bn": "batch", "attack_steps": 2},
    "adversarial_training": {"name": "adversarial_training", "p_adv": None, "attack_steps": 2},
}


def test_every_method_is_here() -> None:
    assert {fields["name"] for fields in METHODS_HERE.values()} == set(METHODS)


@pytest.mark.parametrize(
    ("groups", "accumulate"),
    [(2, 2), *(pytest.param(n, k, marks=pytest.mark.slow) for n, k in ((4, 2), (4, 4), (3, 3)))],
)
@pytest.mark.parametrize("method", METHODS_HERE.values(), ids=METHODS_HERE)
def test_a_step_in_parts_is_the_step_of_the_large_batch(
    method: dict[str, Any], groups: int, accumulate: int
) -> None:
    """Weights, statistics and adversarial rows, in float64 to rounding; over several steps."""
    whole_config = config_of(method, groups)
    config = config_of(method, groups, optim={"accumulate": accumulate})
    converted, _ = models(random.choice([TinyNet, TinyResNet]))
    whole = Step(copy.deepcopy(converted), whole_config)
    parts = Step(converted, config)
    assert len(parts.passes) == accumulate * len(whole.passes)
    for _ in range(2):
        given, _ = draw(config)
        for step in (whole, parts):
            step.feed(lr=0.1, **given)
            step()
        assert torch.equal(parts.adv.rows.images_255, whole.adv.rows.images_255)
        expected = whole.state()
        for name, value in parts.state().items():
            if value.is_floating_point():
                close(value, expected[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS_HERE.values(), ids=METHODS_HERE)
def test_a_step_in_parts_is_the_twin_s(method: dict[str, Any]) -> None:
    mixes = METHODS[method["name"]].attacked != "copies"
    option = {"mix": "cutmix"} if mixes else {}
    check(config_of(method, 4, optim={"accumulate": 2}, **option), steps=2)


@pytest.mark.parametrize("method", ["fused", "pipelined", "decoupled", "advprop"])
def test_mixed_rows_take_their_partners_and_weights_into_a_part(method: str) -> None:
    mix = {"mix": "either", "mix_per": "row", "mix_on": "both"}
    weights = (0.1, 3.0, 1.0, 0.7, 5.0)
    optim = {"accumulate": 2}
    config = config_of(METHODS_HERE[method], 2, optim=optim, class_weights=weights, **mix)
    check(config, steps=2)


@pytest.mark.parametrize("variant", ["fused", "decoupled"])
def test_layer_norms_in_parts_with_all_that_fine_tuning_asks_for(variant: str) -> None:
    """A ConvNeXt of timm: AdamW, layers of their own rates, decay on weights, an average."""
    recipe = {
        "name": "adamw",
        "eps": 1e-3,
        "layer_decay": 0.7,
        "decay_on": "weights",
        "head_lr_scale": 2.0,
        "clip_norm": 1.0,
        "ema": 0.9,
        "freeze": ["stem"],
    }
    steps = []
    for accumulate in (1, 2):
        optim = recipe | {"accumulate": accumulate}
        step = make(variant, model="timm/test_convnext", size=32, optim=optim, dtype=torch.float64)
        for seed in (1, 2):
            feed(step, seed)
            step()
        steps.append(step)
    whole, parts = steps
    assert torch.equal(whole.adv.rows.images_255, parts.adv.rows.images_255)
    expected = whole.state()
    for name, value in parts.state().items():
        if value.is_floating_point():
            close(value, expected[name], name)
    scales = {setting.lr_scale for setting in whole.network.flat.stretches}
    assert len(scales) >= 4
    assert not torch.equal(expected["ema.head.fc.weight"], expected["model.head.fc.weight"])


@pytest.mark.slow
def test_parts_of_every_loss_of_a_detector() -> None:
    """Det-AdvProp's attack, boxes, padding; float32, so the least that could differ is compared."""
    whole = make("max", task="detection")
    parts = make("max", task="detection", optim={"accumulate": 2})
    for step in (whole, parts):
        step()
    same = (whole.adv.rows.images_255 == parts.adv.rows.images_255).float().mean()
    assert same > 0.999
    torch.testing.assert_close(
        whole.network.flat.grad, parts.network.flat.grad, rtol=1e-2, atol=1e-4
    )


# ---------------------------------------------------------------------- the passes


def test_parts_have_the_rows_and_groups_of_the_whole() -> None:
    for _ in range(200):
        method, n_clean = any_method()
        n_groups = n_clean // method.group_rows
        accumulate = random.choice([k for k in range(1, n_groups + 1) if n_groups % k == 0])
        whole = passes_of(method, n_clean)
        parts = passes_of(method, n_clean, accumulate)
        assert len(parts) == accumulate * len(whole)
        for i, one in enumerate(whole):
            own = parts[i * accumulate : (i + 1) * accumulate]
            for block in one.blocks:
                pieces = [b for part in own for b in part.blocks if b.kind == block.kind]
                assert [b.start for b in pieces[1:]] == [b.stop for b in pieces[:-1]]
                assert (pieces[0].start, pieces[-1].stop) == (block.start, block.stop)
                assert tuple(group for b in pieces for group in b.groups) == block.groups
            assert [part.crafts_last for part in own] == [False] * (accumulate - 1) + [
                one.crafting is not None
            ]


@pytest.mark.parametrize("variant", [*SCHEDULES, "vanilla", "decoupled"])
def test_parts_are_as_small_as_whole_groups_allow(variant: str) -> None:
    method = {"name": variant} if variant in METHODS else {"schedule": variant}
    section = MethodConfig.model_validate(
        method | {"p_adv": None if variant == "vanilla" else "1/5"}
    )
    whole = max(one.n_rows for one in passes_of(section, 8 * 64))
    parts = max(one.n_rows for one in passes_of(section, 8 * 64, 4))
    assert parts == whole / 4


def test_groups_that_do_not_divide_are_refused_with_what_would() -> None:
    with pytest.raises(ValueError, match=r"optim\.accumulate = 4: a device has 6 groups of 8"):
        passes_of(MethodConfig.model_validate({"group_rows": 8, "p_adv": "1/3"}), 48, 4)
    with pytest.raises(ValueError, match=r"must be 1, 2, 3 or 6$"):
        passes_of(MethodConfig.model_validate({"group_rows": 8, "p_adv": "1/3"}), 48, 5)


# ---------------------------------------------------------------------- memory


class Saved:
    """The most bytes that autograd keeps for a backward at once; a storage counts once."""

    def __init__(self, step: Step) -> None:
        self.held: dict[int, int] = {}
        self.most = 0
        parameters = {p.untyped_storage().data_ptr() for p in step.network.model.parameters()}
        self.not_activations = parameters

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.not_activations:
            self.held[storage.data_ptr()] = storage.nbytes()
        self.most = max(self.most, sum(self.held.values()))
        return tensor


@pytest.mark.parametrize("variant", ["vanilla", "sequential", "pipelined", "decoupled"])
def test_activations_are_those_of_one_part(variant: str) -> None:
    most: dict[int, int] = {}
    for accumulate in (1, 2):
        step = make(variant, optim={"accumulate": accumulate})
        saved = Saved(step)
        forward = step.network.forward

        def one_forward(x: Tensor, saved: Saved = saved, forward: Any = forward) -> Tensor:
            saved.held.clear()  # the pass before has had its backward
            return forward(x)

        step.network.forward = one_forward
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            step()
        most[accumulate] = saved.most
    assert most[2] < 0.6 * most[1]


def test_norms_that_see_a_whole_pass_forbid_parts() -> None:
    model = models(TinyResNet)[0]
    model.odd = torch.nn.BatchNorm3d(3)
    config = config_of({"name": "vanilla", "p_adv": None}, 2, optim={"accumulate": 2})
    with pytest.raises(
        ValueError, match=r"optim\.accumulate = 2: the model has 1 BatchNorm3d that"
    ):
        Step(model, config)
