"""The exponential average of a step against one tensor after the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fap.step.step import Step
from tests.step.made_steps import clone, feed, make
from tests.step.twin_checks import TinyResNet, close, config_of, draw, models


def averaged(model: torch.nn.Module) -> dict[str, Tensor]:
    """What is averaged: parameters and statistics, no counters."""
    return {n: v.clone() for n, v in model.state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_is_that_of_every_tensor(decay: float) -> None:
    """With its warm-up: 2/11 after the first step, then 3/12, ..., at most `decay`."""
    config = config_of({"name": "fast_advprop"}, groups=1, optim={"ema": decay})
    converted, _ = models(TinyResNet)
    step = Step(converted, config)
    slow = averaged(converted)
    for t in (1, 2, 3):
        step.feed(lr=0.1, **draw(config)[0])
        step()
        kept = min(decay, (1 + t) / (10 + t))
        for name, value in averaged(converted).items():
            slow[name] = kept * slow[name] + (1 - kept) * value
        fast = {n: v for n, v in step.state().items() if n.startswith("ema.")}
        assert {f"ema.{name}" for name in slow} == fast.keys()
        for name, value in slow.items():
            close(fast[f"ema.{name}"], value, f"average of {name} after {t} steps")
    assert any(".aux.running_var" in name for name in slow)


def test_in_the_model_for_a_while() -> None:
    step = make("fused", optim={"ema": 0.9})
    step()
    model: Any = step.network.model
    raw = clone(step)
    pointers = [p.data_ptr() for p in model.parameters()]
    assert step.update.ema is not None
    with step.update.ema.in_model():
        inside = {name: value.clone() for name, value in model.state_dict().items()}
    assert [p.data_ptr() for p in model.parameters()] == pointers
    for name, value in inside.items():
        average = raw.get(f"ema.{name}", raw[f"model.{name}"])
        assert torch.equal(value, average), name
    assert not torch.equal(inside["fc.weight"], raw["model.fc.weight"])
    other = make("fused", optim={"ema": 0.9})
    other()
    for one in (step, other):  # a step after it is that of a step which was never looked at
        feed(one, 1)
        one()
    assert torch.equal(step.network.flat.param, other.network.flat.param)


def test_the_average_changes_nothing_in_training() -> None:
    with_average = make("fused", optim={"ema": 0.9})
    without = make("fused")
    for one in (with_average, without):
        one()
    assert torch.equal(with_average.network.flat.param, without.network.flat.param)
    assert without.state().keys() == {
        name for name in with_average.state() if not name.startswith("ema")
    }


def test_shared_parameters_are_averaged_under_all_their_names() -> None:
    class Tied(TinyResNet):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.fc

    config = config_of({"name": "vanilla", "p_adv": None}, groups=1, optim={"ema": 0.9})
    step = Step(copy.deepcopy(models(Tied)[0]), config)
    names = step.state().keys()
    assert {"ema.fc.weight", "ema.again.weight"} <= names
