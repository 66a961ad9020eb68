"""Attacks of their own: what an unset one is, that it moves no statistics, that it works."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fap.config import load_config
from fap.distributed import ONE_RANK
from fap.step.step import Step
from tests.step.reference_step import Twin, forward_alone
from tests.step.twin_checks import TinyResNet, config_of, draw, models, rules_of


@pytest.mark.parametrize("name", ["advprop", "decoupled"])
def test_what_an_unset_attack_is(name: str) -> None:
    """Targeted, through running statistics: the same step as when it is said, and another one than
    with any other value.
    """
    method: dict[str, Any] = {
        "name": name,
        "p_adv": None if name == "advprop" else "1/3",
        "attack_steps": 2,
        "eps_255": 4.0,
    }
    unset = config_of(method)
    converted = models(TinyResNet)[0]
    feed, _ = draw(unset)
    made = {}
    for targeted in (None, True, False):
        for attack_bn in (None, "running", "batch"):
            step = Step(
                copy.deepcopy(converted),
                config_of(method | {"targeted": targeted, "attack_bn": attack_bn}),
            )
            step.feed(lr=0.1, **feed)
            step()
            made[targeted, attack_bn] = step.adv.rows.images_255.clone()
    for (targeted, attack_bn), adversarial in made.items():
        stated = (targeted is not False, attack_bn != "batch")
        assert torch.equal(adversarial, made[None, None]) == (stated == (True, True)), (
            targeted,
            attack_bn,
        )


def test_shipped_configs_say_that_they_attack_as_the_paper_reads() -> None:
    found = 0
    for file in Path("configs").rglob("*.yaml"):
        method = load_config(file).method
        if method.name in ("advprop", "decoupled"):
            found += 1
            text = file.read_text()
            assert "  targeted: true\n  attack_bn: running\n" in text, file
            assert "# Read from the paper (section 3.2.2)" in text, file
            assert (method.targeted, method.attack_bn) == (True, "running")
        elif method.name == "adversarial_training":
            assert (method.targeted, method.attack_bn) == (False, "running")
        else:
            assert (method.targeted, method.attack_bn) == (None, None)
    assert found >= 10


@pytest.mark.parametrize("attack_bn", ["running", "batch"])
@pytest.mark.parametrize("name", ["advprop", "decoupled"])
def test_an_attack_crafts_and_moves_no_statistics(
    name: str, attack_bn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the attack alone everything in the model is as it was: weights, statistics, counters."""
    method = {
        "name": name,
        "p_adv": None if name == "advprop" else "1/3",
        "attack_bn": attack_bn,
        "attack_steps": 5,
    }
    config = config_of(method)
    step = Step(models(TinyResNet)[0], config)
    seen: list[list[str]] = []

    def attack_and_look(*args: Tensor) -> Tensor:
        before = {k: v.clone() for k, v in step.network.model.state_dict().items()}
        made = Step._craft(step, *args)
        seen.append(
            [k for k, v in step.network.model.state_dict().items() if not torch.equal(v, before[k])]
        )
        return made

    monkeypatch.setattr(step, "_craft", attack_and_look)
    step.feed(lr=0.1, **draw(config)[0])
    step()
    assert seen == [[]]
    assert step.metrics.take(ONE_RANK)["steps"] == 1


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("method", ["vanilla", "fast_advprop", "advprop", "decoupled"])
def test_one_class_is_refused(method: str, classes: int) -> None:
    p_adv = None if method in ("vanilla", "advprop") else "1/3"
    base = config_of({"name": method, "p_adv": p_adv})
    config = base.model_copy(
        update={"model": base.model.model_copy(update={"num_classes": classes})}
    )
    model = models(TinyResNet)[0]
    if classes == 1:
        with pytest.raises(ValueError, match=r"model\.num_classes = 1: .*at least 2"):
            Step(model, config)
    else:
        Step(model, config)


@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_stays_in_the_ball_and_moves_the_loss(targeted: bool) -> None:
    """Against the loss at the random start, through the auxiliary norms' batch statistics."""
    config = config_of(
        {"name": "decoupled", "attack_steps": 5, "eps_255": 4.0, "targeted": targeted}
    )
    converted, plain = models(TinyResNet)
    step, twin = Step(converted, config), Twin(plain, rules_of(config))
    feed, draws = draw(config)
    step.feed(lr=0.0, **feed)
    step()
    x, labels = (
        feed["images"][step.inputs.n_clean :].double(),
        feed["targets"][step.inputs.n_clean :],
    )
    assert (step.adv.rows.images_255 - x).abs().max() <= 4
    assert step.adv.rows.images_255.min() >= 0
    assert step.adv.rows.images_255.max() <= 255

    def loss(grey: Tensor, target: Tensor) -> float:
        parts = zip(
            grey.split(config.method.adv_group_rows),
            target.split(config.method.adv_group_rows),
            strict=True,
        )
        each = [
            nn.functional.cross_entropy(forward_alone(twin.aux, twin._normalise(g))[0], t)
            for g, t in parts
        ]
        return sum(e.item() for e in each)

    assert draws.delta0 is not None
    if targeted:
        assert draws.target is not None
        assert loss(step.adv.rows.images_255, draws.target) < loss(x + draws.delta0, draws.target)
    else:
        assert loss(step.adv.rows.images_255, labels) > loss(x + draws.delta0, labels)
