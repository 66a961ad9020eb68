"""What a step leaves behind: its state, skipped steps, the carry, the flat buffers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fap.distributed import ONE_RANK
from fap.nets.dual import norms
from fap.step.step import Step
from tests.step.twin_checks import TinyNet, TinyResNet, config_of, draw, models

FAST = {"name": "fast_advprop"}
SCHEDULES = ("sequential", "fused", "pipelined", "parallel")


def test_first_step_of_pipelined_trains_noise_and_later_ones_the_carry() -> None:
    config = config_of(FAST | {"schedule": "pipelined", "shuffle": "off"})
    converted, _ = models(TinyResNet)
    step = Step(converted, config)
    feed, draws = draw(config)
    step.feed(lr=0.0, **feed)
    step()
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["loss_adv"] == pytest.approx(metrics["loss_noise"], rel=1e-12)
    assert draws.delta0 is not None
    x = feed["images"][step.inputs.n_clean :].double()
    assert (step.adv.rows.images_255 - x).abs().max() <= 1
    assert not torch.equal(step.adv.rows.images_255, x + draws.delta0)
    step.feed(lr=0.0, **draw(config)[0])
    step()
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["loss_adv"] != pytest.approx(metrics["loss_noise"], rel=1e-6)


@pytest.mark.parametrize(
    "method", [FAST | {"schedule": s} for s in SCHEDULES] + [{"name": "decoupled"}], ids=str
)
def test_a_non_finite_gradient_leaves_weights_momentum_and_statistics_alone(
    method: dict[str, Any],
) -> None:
    config = config_of(method)
    step = Step(models(TinyResNet)[0], config)
    feed, _ = draw(config)
    step.feed(lr=0.1, **feed)
    step()
    fc_bias = step.network.model.fc.bias  # type: ignore[union-attr]
    with torch.no_grad():
        fc_bias[0] = float("inf")
    before = {
        k: v.clone() for k, v in step.state().items() if k.startswith(("model.", "momentum."))
    }
    step()
    after = step.state()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
    assert metrics["nonfinite_clean"] > 0
    with torch.no_grad():
        fc_bias[0] = 0.0
    step()
    metrics = step.metrics.take(ONE_RANK)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 0
    assert not torch.equal(before["momentum.fc.bias"], step.state()["momentum.fc.bias"])


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    config = config_of(FAST | {"schedule": "pipelined"})
    converted, _ = models(TinyResNet)
    one, two = Step(copy.deepcopy(converted), config), Step(converted, config)
    feeds = [draw(config)[0] for _ in range(4)]
    for feed in feeds[:2]:
        one.feed(lr=0.1, **feed)
        one()
    two.load_state({k: v.clone() for k, v in one.state().items()})
    for feed in feeds[2:]:
        for step in (one, two):
            step.feed(lr=0.1, **feed)
            step()
    assert all(torch.equal(v, two.state()[k]) for k, v in one.state().items())


def test_clean_batch_must_fill_the_groups() -> None:
    with pytest.raises(ValueError, match="clean_batch = 12"):
        Step(
            models(TinyNet)[0],
            config_of(FAST).model_copy(
                update={"optim": config_of(FAST).optim.model_copy(update={"clean_batch": 12})}
            ),
        )


def test_every_parameter_is_in_one_part_of_the_flat_gradient() -> None:
    step = Step(models(TinyResNet)[0], config_of(FAST))
    bounds = {part: getattr(step.network.flat, part) for part in ("shared", "main", "aux")}
    where = {
        k: next(part for part, b in bounds.items() if b.start <= own.start and own.stop <= b.stop)
        for k, own in step.network.flat.slices.items()
    }
    bn = {k for k, m in step.network.model.named_modules() if m in norms(step.network.model)}
    assert len(bn) == 5
    for k, part in where.items():
        layer = k.rpartition(".")[0]
        assert part == ("aux" if layer.endswith(".aux") else "main" if layer in bn else "shared"), k
