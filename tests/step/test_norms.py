"""The step of models with other norms than BatchNorm2d, and with one set, against its slow twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fap.nets.dual import convert
from fap.step.step import Step
from tests.step.made_steps import SCHEDULES
from tests.step.twin_checks import (
    OTHER_NORMS,
    BatchNorms,
    MixedNorms,
    TinyNet,
    TinyResNet,
    check,
    config_of,
    converted_from,
    draw,
    randomise_norms,
)

FAST = {"name": "fast_advprop"}
SEPARATE: dict[str, dict[str, Any]] = {
    "decoupled": {"name": "decoupled", "attack_steps": 2},
    "decoupled, batch statistics": {"name": "decoupled", "attack_bn": "batch"},
    "advprop": {"name": "advprop", "p_adv": None, "attack_steps": 2},
    "adversarial_training": {"name": "adversarial_training", "p_adv": None, "attack_steps": 2},
    "vanilla": {"name": "vanilla", "p_adv": None},
}
every_net = pytest.mark.parametrize("net", OTHER_NORMS, ids=lambda net: net.__name__)


@every_net
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(net: type[nn.Module], schedule: str) -> None:
    check(config_of(FAST | {"schedule": schedule}, groups=3), net, steps=3)


@every_net
@pytest.mark.parametrize("method", SEPARATE.values(), ids=SEPARATE)
def test_every_other_method(net: type[nn.Module], method: dict[str, Any]) -> None:
    check(config_of(method, groups=2), net, steps=2)


@pytest.mark.parametrize("net", [TinyNet, TinyResNet, BatchNorms, MixedNorms])
@pytest.mark.parametrize(
    "method",
    [*(FAST | {"schedule": schedule} for schedule in SCHEDULES), *list(SEPARATE.values())[:3]],
    ids=[*SCHEDULES, *list(SEPARATE)[:3]],
)
def test_one_set_of_norms(net: type[nn.Module], method: dict[str, Any]) -> None:
    """`method.aux: none`: every row reaches the same norms, whose statistics are one average."""
    check(config_of(method | {"aux": "none"}, groups=3), net, steps=3)


class NormFree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stem(x).relu().mean((2, 3)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_model_without_norms(schedule: str) -> None:
    check(config_of(FAST | {"schedule": schedule}, groups=3), NormFree, steps=3)


def test_a_model_without_norms_trains_vanilla() -> None:
    check(config_of({"name": "vanilla", "p_adv": None}), NormFree, steps=3)


class FiveDimensions(nn.Module):
    """Weights of five dimensions, which no channels_last is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.conv = nn.Conv3d(1, 2, 3, padding=1)
        self.bn = nn.BatchNorm3d(2)
        self.fc = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(self.stem(x)[:, None]))
        return self.fc(x.relu().mean((2, 3, 4)))


def test_batch_norms_of_three_dimensions() -> None:
    check(config_of(FAST, groups=3), FiveDimensions, steps=2)


def test_statistics_that_nobody_divides_are_averaged_and_restored() -> None:
    """Vanilla training with a batch norm of a foreign class: it sees a pass as one batch."""

    class Foreign(nn.BatchNorm2d):
        pass

    class Net(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.bn2 = Foreign(8)

    plain = Net().double()
    randomise_norms(plain)
    config = config_of({"name": "vanilla", "p_adv": None}, groups=2)
    model = convert(plain, aux=False, any_norm=True).to(memory_format=torch.channels_last)
    step = Step(model, config)
    inputs: list[Tensor] = []
    model.bn2.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))  # type: ignore[union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step.feed(lr=0.1, **draw(config)[0])
    step()
    (x,) = inputs
    assert len(x) == 16
    mean = 0.9 * before["bn2.running_mean"] + 0.1 * x.mean((0, 2, 3))
    torch.testing.assert_close(model.state_dict()["bn2.running_mean"], mean)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.fc.bias.data[0] = float("inf")  # type: ignore[union-attr,index,operator]
    step()
    after = model.state_dict()
    for name in ("bn1.running_var", "bn2.running_mean", "bn2.running_var"):
        assert torch.equal(after[name], before[name]), "of a step that is skipped"


def test_every_parameter_has_its_part_of_the_flat_buffers() -> None:
    plain = MixedNorms().double()
    flat = Step(converted_from(plain, 16), config_of(FAST)).network.flat
    for name in flat.parameters:
        part = flat.shared
        if name.startswith("on_"):
            part = flat.aux if ".aux." in name else flat.main
        place = flat.slices[name]
        assert part.start <= place.start < place.stop <= part.stop, name
