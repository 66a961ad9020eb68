"""`fap.step.step.Step` against its slow twin in float64: every method, schedule and option."""

from __future__ import annotations

import copy
import random
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from fap.budget import cost_per_image
from fap.distributed import ONE_RANK
from fap.methods import ATTACK, METHODS, Method
from fap.nets.dual import convert
from fap.nets.stem import stem_of
from fap.step.step import Step
from tests.step.made_steps import SCHEDULES
from tests.step.twin_checks import (
    BranchedNet,
    PaddedNet,
    StandardisedNet,
    TinyNet,
    TinyResNet,
    check,
    config_of,
    draw,
    models,
)

FAST = {"name": "fast_advprop"}


def values_of(fields: dict[str, Any] | str) -> str:
    """A test's id."""
    if isinstance(fields, str):
        return fields
    return "-".join(str(value) for value in fields.values()) or "defaults"


@pytest.mark.parametrize("net", [TinyNet, TinyResNet])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("groups", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shuffle", ["off", "ranks"])
def test_fast_advprop(net: type[nn.Module], schedule: str, groups: int, shuffle: str) -> None:
    check(config_of(FAST | {"schedule": schedule, "shuffle": shuffle}, groups), net)


@pytest.mark.parametrize("net", [PaddedNet, StandardisedNet, BranchedNet])
@pytest.mark.parametrize(
    "method",
    [*({"schedule": schedule} for schedule in SCHEDULES), {"name": "decoupled"}],
    ids=values_of,
)
def test_every_kind_of_stem(net: type[nn.Module], method: dict[str, Any]) -> None:
    assert stem_of(models(net)[0]) is not None
    check(config_of(FAST | method, 3), net, steps=2)


SEPARATE: list[dict[str, Any]] = [
    {},
    {"attack_steps": 5, "eps_255": 4.0},
    {"attack_steps": 1, "eps_255": 1.0, "random_start": False},
    {"attack_steps": 3, "eps_255": 4.0, "shuffle": "ranks", "sync": True, "weight_adv": 0.5},
]


@pytest.mark.slow
@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.soak), 4])
@pytest.mark.parametrize("attack_bn", ["running", "batch"])
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("name", ["advprop", "decoupled"])
@pytest.mark.parametrize("more", SEPARATE, ids=values_of)
def test_attack_without_reuse(
    name: str, targeted: bool, attack_bn: str, more: dict[str, Any], groups: int
) -> None:
    method = {"name": name, "targeted": targeted, "attack_bn": attack_bn} | more
    if name == "advprop":
        method["p_adv"] = None
    check(config_of(method, groups), steps=2)


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("attack_bn", ["running", "batch"])
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("net", [TinyNet, TinyResNet])
def test_single_norm_adversarial_training(
    net: type[nn.Module], targeted: bool, attack_bn: str, groups: int
) -> None:
    method = {
        "name": "adversarial_training",
        "p_adv": None,
        "attack_steps": 3,
        "targeted": targeted,
        "attack_bn": attack_bn,
    }
    check(config_of(method, groups), net, steps=3)


def test_adversarial_training_needs_no_auxiliary_norms() -> None:
    config = config_of({"name": "adversarial_training", "p_adv": None})
    assert not config.method.entry.has_aux
    model = convert(TinyResNet(), aux=False).to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = Step(model, config)
    step.feed(lr=0.1, **draw(config)[0])
    step()
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["rows_adv"] == config.optim.clean_batch
    assert metrics["rows_clean"] == metrics["rows_noise"] == 0
    after = model.state_dict()
    assert all((after[name] != before[name]).any() for name in before if "num_batches" not in name)


FGSM_NOISE = Method(
    norms={"clean": "main", "adv": "aux"},
    attacked="own rows",
    direction="random",
    defaults=ATTACK | {"p_adv": Fraction(1, 5), "weight_clean": 1.0, "weight_adv": 1.0},
)


@pytest.mark.parametrize("random_start", [True, False])
def test_a_method_is_one_entry(random_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FGSM's step with a random sign, no gradient taken: nothing but an entry adds it."""
    monkeypatch.setitem(METHODS, "fgsm_noise", FGSM_NOISE)
    config = config_of({"name": "fgsm_noise", "random_start": random_start})
    assert cost_per_image(config.method) == 1
    check(config, steps=3)


@pytest.mark.parametrize("groups", [1, 4])
def test_vanilla(groups: int) -> None:
    check(config_of({"name": "vanilla", "p_adv": None}, groups))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_control(schedule: str) -> None:
    check(config_of({"name": "noise", "schedule": schedule}))


OPTIONS: dict[str, dict[str, Any]] = {
    "mixup": {"mix": "mixup"},
    "cutmix": {"mix": "cutmix"},
    "label smoothing": {"label_smoothing": 0.1},
    "mixup and label smoothing": {"mix": "mixup", "label_smoothing": 0.1},
    "imagenet mean and std": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", ["vanilla", "decoupled", *SCHEDULES])
def test_data_options(method: str, option: dict[str, Any]) -> None:
    given: dict[str, Any] = {"name": method}
    if method in SCHEDULES:
        given = FAST | {"schedule": method}
    if method == "vanilla":
        given["p_adv"] = None
    check(config_of(given, groups=3, **option), steps=3)


CLASS_WEIGHTS = (0.1, 3.0, 1.0, 0.7, 5.0)


@pytest.mark.parametrize(
    "method", ["vanilla", "decoupled", "advprop", "adversarial_training", *SCHEDULES]
)
def test_class_weights(method: str) -> None:
    """Of clean and adversarial rows, and in attacks through the statistics of a batch."""
    given: dict[str, Any] = {"name": method, "p_adv": None}
    if method in SCHEDULES:
        given = FAST | {"schedule": method}
    if method == "decoupled":
        given["p_adv"] = "1/3"
    if method in ("decoupled", "advprop", "adversarial_training"):
        given |= {"attack_steps": 2, "attack_bn": "batch"}
    check(config_of(given, groups=2, class_weights=CLASS_WEIGHTS), steps=2)


def mixes(*kinds: str) -> list[dict[str, Any]]:
    return [
        {"mix": mix, "mix_per": per, "mix_on": on}
        for mix in kinds
        for per in ("batch", "row")
        for on in ("clean", "adv", "both")
    ]


# `either` has rows of both kinds; with one kind alone every schedule is for the soak.
MIXES = [
    *(("fused", mix) for mix in mixes("mixup", "cutmix")),
    *((method, mix) for method in ("decoupled", *SCHEDULES) for mix in mixes("either")),
    *(
        pytest.param(method, mix, marks=pytest.mark.soak)
        for method in ("decoupled", *(other for other in SCHEDULES if other != "fused"))
        for mix in mixes("mixup", "cutmix")
    ),
]
ALL_OF_IT = {"mix": "either", "mix_per": "row", "mix_on": "both"}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mix"), MIXES, ids=values_of)
def test_mixes(method: str, mix: dict[str, Any]) -> None:
    given: dict[str, Any] = {"name": method}
    if method in SCHEDULES:
        given = FAST | {"schedule": method}
    check(config_of(given, groups=3, **mix), steps=3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_row_mixed_by_draws_of_its_own(schedule: str) -> None:
    """Also through the carry of `pipelined`, with smoothed labels, and classes of other weight."""
    mix = ALL_OF_IT | {"label_smoothing": 0.1, "class_weights": CLASS_WEIGHTS}
    check(config_of(FAST | {"schedule": schedule}, groups=3, **mix), steps=3)


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("method", ["decoupled", "advprop", "adversarial_training"])
def test_an_attack_of_its_own_follows_the_mixed_loss(method: str, targeted: bool) -> None:
    """Copies are those of mixed rows."""
    given: dict[str, Any] = {"name": method, "attack_steps": 2, "targeted": targeted}
    if method != "decoupled":
        given["p_adv"] = None
    check(config_of(given, groups=2, **ALL_OF_IT), steps=2)


SWITCHES: dict[str, dict[str, Any]] = {
    "sync off": {"sync": False},
    "weights 1:1:1": {"weight_clean": 1.0, "weight_noise": 1.0, "weight_adv": 1.0},
    "no random start": {"random_start": False},
    "no shuffle": {"shuffle": "off"},
    "combine mean": {"combine": "mean"},
    "sync off, weights 1:1:1": {"sync": False, "weight_noise": 1.0, "weight_adv": 1.0},
    "eps 2, step 3": {"eps_255": 2.0, "step_255": 3.0},
    "p_adv 1/5": {"p_adv": "1/5"},
}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_switch_equals_the_twin_and_differs_from_the_default(
    schedule: str, switch: dict[str, Any]
) -> None:
    method = FAST | {"schedule": schedule}
    check(config_of(method | switch), steps=3)
    configs = [config_of(method), config_of(method | switch)]
    converted = models(TinyResNet)[0]
    feeds = [draw(configs[0])[0] for _ in range(2)]
    after = []
    for config in configs:
        step = Step(copy.deepcopy(converted), config)
        for feed in feeds:
            step.feed(lr=0.1, **cut(feed, step.inputs.n_clean, config.loader_adv_rows))
            step()
        after.append(step.network.flat.param.data.clone())
    assert (after[0] - after[1]).abs().max() > 1e-6


def cut(feed: dict[str, Any], n_clean: int, n_adv: int) -> dict[str, Any]:
    """The same batch with fewer adversarial rows, the first ones; all of them if it has no more."""
    rows = slice(0, n_clean + n_adv)
    order = feed["shuffle"]
    fewer = {
        "images": feed["images"][rows],
        "targets": feed["targets"][rows],
        "shuffle": order[order < n_adv],
    }
    return feed | fewer


def test_any_combination() -> None:
    """What no list above names: switches drawn at random."""
    pick = random.choice
    for _ in range(6):
        method = {
            "name": pick(["fast_advprop", "noise"]),
            "schedule": pick(SCHEDULES),
            "sync": pick([True, False]),
            "p_adv": pick(["1/5", "1/3", "1/2"]),
            "weight_noise": pick([0.25, 0.5, 1.0]),
            "weight_adv": pick([0.25, 0.5, 1.0]),
            "random_start": pick([True, False]),
            "shuffle": pick(["ranks", "groups", "off"]),
            "eps_255": pick([0.5, 1.0, 4.0]),
        }
        option = pick([{}, *mixes("mixup", "cutmix", "either")]) | {
            "label_smoothing": pick([0.0, 0.1]),
            "class_weights": pick([None, CLASS_WEIGHTS]),
        }
        print(method, option)
        check(config_of(method, pick([1, 2, 5]), **option), pick([TinyNet, TinyResNet]), steps=2)
