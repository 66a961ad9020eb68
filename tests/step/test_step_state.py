"""What a step leaves behind: its state, skipped steps, the carry, the flat buffers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fap.distributed import ONE_RANK
from fap.nets.dual import norms
from fap.step.half import Amp
from fap.step.step import Step
from tests.step.made_steps import SCHEDULES, VARIANTS, changed, clone, feed, last_bias, make, poison
from tests.step.twin_checks import TinyNet, TinyResNet, config_of, draw, models

FAST = {"name": "fast_advprop"}


# ---------------------------------------------------------------------- the state


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    config = config_of(FAST | {"schedule": "pipelined"})
    converted, _ = models(TinyResNet)
    one = Step(copy.deepcopy(converted), config)
    two = Step(converted, config)
    feeds = [draw(config)[0] for _ in range(4)]
    for given in feeds[:2]:
        one.feed(lr=0.1, **given)
        one()
    two.load_state(clone(one))
    for given in feeds[2:]:
        for step in (one, two):
            step.feed(lr=0.1, **given)
            step()
    restored = two.state()
    assert all(torch.equal(value, restored[name]) for name, value in one.state().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "amp"), [*((variant, "off") for variant in VARIANTS), ("pipelined", "bf16")]
)
def test_state_round_trip_is_exact(variant: str, amp: Amp) -> None:
    step = make(variant, amp=amp)
    step()
    saved = clone(step)
    feed(step, 1)
    step()
    expected = clone(step)
    other = make(variant, amp=amp, seed=7)
    other()
    other.load_state(saved)
    assert not changed(saved, clone(other))
    feed(other, 1)
    other()
    assert not changed(expected, clone(other))


def test_state_of_another_method_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="does not fit the run"):
        make("fused").load_state(make("vanilla").state())


def test_first_step_of_pipelined_trains_noise_and_later_ones_the_carry() -> None:
    config = config_of(FAST | {"schedule": "pipelined", "shuffle": "off"})
    converted, _ = models(TinyResNet)
    step = Step(converted, config)
    given, draws = draw(config)
    step.feed(lr=0.0, **given)
    step()
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["loss_adv"] == pytest.approx(metrics["loss_noise"], rel=1e-12)
    assert draws.delta0 is not None
    x = given["images"][step.inputs.n_clean :].double()
    assert (step.adv.rows.images_255 - x).abs().max() <= 1
    assert not torch.equal(step.adv.rows.images_255, x + draws.delta0)
    step.feed(lr=0.0, **draw(config)[0])
    step()
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["loss_adv"] != pytest.approx(metrics["loss_noise"], rel=1e-6)


# ---------------------------------------------------------------------- skipped steps


@pytest.mark.parametrize(
    "method",
    [*(FAST | {"schedule": schedule} for schedule in SCHEDULES), {"name": "decoupled"}],
    ids=str,
)
def test_a_non_finite_gradient_leaves_weights_momentum_and_statistics_alone(
    method: dict[str, Any],
) -> None:
    config = config_of(method)
    step = Step(models(TinyResNet)[0], config)
    given, _ = draw(config)
    step.feed(lr=0.1, **given)
    step()
    poison(step)
    before = {
        name: value
        for name, value in clone(step).items()
        if name.startswith(("model.", "momentum."))
    }
    step()
    after = step.state()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
    assert metrics["nonfinite_clean"] > 0
    last_bias(step)[0] = 0
    step()
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 0
    assert not torch.equal(before["momentum.fc.bias"], step.state()["momentum.fc.bias"])


@pytest.mark.slow
@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_non_finite_step_changes_no_bit(variant: str, when: int) -> None:
    step = make(variant)
    for seed in range(when):
        feed(step, seed)
        step()
    poison(step)
    step.metrics.take(ONE_RANK)
    before = clone(step)
    step()
    assert not changed(before, clone(step), "carry")
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
    for kind in step.method.entry.norms:
        assert metrics[f"nonfinite_{kind}"] == metrics[f"rows_{kind}"] > 0
    if "clean" in step.method.entry.norms:
        assert metrics["nonfinite_clean"] == step.inputs.n_clean
    assert torch.isfinite(step.adv.rows.images_255).all()

    last_bias(step)[0] = 0
    step()
    metrics = step.metrics.take(ONE_RANK)
    assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (0, 0)
    assert "model.fc.weight" in changed(before, clone(step))
    assert all(torch.isfinite(value).all() for value in step.state().values())


@pytest.mark.parametrize("when", [0, 2])
def test_fp16_overflow_halves_the_scale_and_changes_nothing_else(when: int) -> None:
    step = make("fused", amp="fp16")
    for _ in range(when):
        step()
    step.update.scale.fill_(2.0**60)
    before = clone(step)
    step()
    assert changed(before, clone(step), "carry", "growth") == {"scale"}
    assert (step.update.scale, step.update.growth) == (2.0**59, 0)
    step.update.scale.fill_(2.0**10)
    step()
    assert "model.fc.weight" in changed(before, clone(step))


# ---------------------------------------------------------------------- rows and buffers


def test_clean_batch_must_fill_the_groups() -> None:
    config = config_of(FAST)
    optim = config.optim.model_copy(update={"clean_batch": 12})
    with pytest.raises(ValueError, match="clean_batch = 12"):
        Step(models(TinyNet)[0], config.model_copy(update={"optim": optim}))


def test_every_parameter_is_in_one_part_of_the_flat_gradient() -> None:
    step = Step(models(TinyResNet)[0], config_of(FAST))
    flat = step.network.flat
    bounds = {"shared": flat.shared, "main": flat.main, "aux": flat.aux}
    found_norms = norms(step.network.model)
    layers = {name for name, m in step.network.model.named_modules() if m in found_norms}
    assert len(layers) == 5
    for name, own in flat.slices.items():
        parts = [
            part
            for part, bound in bounds.items()
            if bound.start <= own.start and own.stop <= bound.stop
        ]
        layer = name.rpartition(".")[0]
        expected = "shared"
        if layer.endswith(".aux"):
            expected = "aux"
        elif layer in layers:
            expected = "main"
        assert parts == [expected], name
