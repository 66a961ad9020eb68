"""The learning rate of every step, beside torch's own schedulers."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from fap.budget import budget
from fap.config import make_config
from fap.rates import Rates
from fap.sections.budget import LrSchedule

PEAK = 0.4


def by_torch(wanted: Rates) -> list[float]:
    """The twin: a scheduler of torch's from the end of the warm-up on, times a ramp before it."""
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=wanted.peak)
    n_falling = wanted.steps - wanted.warmup_steps
    match wanted.schedule:
        case "milestones":
            falls = [epoch * wanted.steps_per_epoch for epoch in wanted.milestones]
            scheduler: Any = lr_scheduler.MultiStepLR(optimiser, falls, wanted.gamma)
        case "cosine":
            lowest = wanted.peak * wanted.final
            scheduler = lr_scheduler.CosineAnnealingLR(optimiser, n_falling, eta_min=lowest)
        case "linear":
            scheduler = lr_scheduler.LinearLR(optimiser, 1.0, max(1e-9, wanted.final), n_falling)
        case "constant":
            scheduler = lr_scheduler.ConstantLR(optimiser, 1.0)
    rates = []
    for step in range(wanted.steps):
        ramp = 1.0
        if step < wanted.warmup_steps:
            ramp = (step + 1) / wanted.warmup_steps
        rates.append(scheduler.get_last_lr()[0] * ramp)
        # Milestones are counted from the run's beginning, the others from the warm-up's end.
        if wanted.schedule == "milestones" or step >= wanted.warmup_steps:
            optimiser.step()
            scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["milestones", "cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 17])
def test_every_step_has_the_rate_that_torch_gives_it(
    schedule: LrSchedule, warmup_steps: int
) -> None:
    epochs = random.randint(5, 9)
    steps_per_epoch = random.randint(4, 30)
    rates = Rates(
        schedule=schedule,
        peak=PEAK,
        steps=epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_steps,
        milestones=(1, 3, 3, 4),
        gamma=random.uniform(0.1, 0.9),
        final=random.choice([0.0, 0.25, 1.0]),
    )
    found = [rates.at(step) for step in range(rates.steps)]
    assert found == pytest.approx(by_torch(rates), rel=1e-9, abs=1e-9)
    if warmup_steps > 1:
        assert found[0] == pytest.approx(PEAK / warmup_steps)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_falls_from_the_warm_ups_end_to_its_share_of_the_peak(schedule: str) -> None:
    config = make_config({
        "method": {"name": "vanilla"},
        "optim": {"lr": PEAK},
        "budget": {
            "epochs": 50, "warmup_epochs": 5, "lr_schedule": schedule, "final_lr": 0.01,
        },
    })  # fmt: skip
    rates = budget(config, 256 * 20).rates
    assert rates.warmup_steps == 100
    found = [rates.at(step) for step in range(rates.steps)]
    assert found[99] == found[100] == max(found) == PEAK
    assert all(a > b for a, b in pairwise(found[100:]))
    assert found[100 + 450] == pytest.approx(PEAK * (1 + 0.01) / 2)
    assert found[-1] == pytest.approx(PEAK * 0.01, rel=0.2)
    assert rates.at(rates.steps) == pytest.approx(PEAK * 0.01), "one step after the last one"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_rate_is_that_of_the_same_share_of_every_methods_training(schedule: str) -> None:
    """Warm-up and fall are divided by the cost, 1.2 and 7."""

    def run(method: str) -> Rates:
        section = {"epochs": 42, "warmup_epochs": 4.2, "lr_schedule": schedule}
        config = make_config({"method": {"name": method}, "budget": section})
        return budget(config, 320 * 100).rates

    vanilla = run("vanilla")
    assert vanilla.warmup_steps == 525  # 125 steps an epoch
    for method, steps_per_epoch, cost in (("fast_advprop", 100, 1.2), ("advprop", 125, 7)):
        other = run(method)
        assert other.steps_per_epoch == steps_per_epoch
        assert other.warmup_steps == round(4.2 / cost * steps_per_epoch)
        for share in (0.1, 0.25, 0.5, 0.9):
            here = other.at(round(share * other.steps))
            assert here == pytest.approx(vanilla.at(round(share * vanilla.steps)), abs=2e-3)
