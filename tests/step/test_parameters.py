"""Which parameters are trained, how fast and with which decay, against timm's own groups."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from fap.nets.build import build
from fap.nets.dual import convert, norms
from fap.sections import OptimConfig
from fap.step.flat import Flat
from fap.step.parameters import FROZEN, Setting, settings_of
from tests.step.made_steps import clone, feed, make

TIMM = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet")


def optim(**fields: Any) -> OptimConfig:
    return OptimConfig.model_validate(fields)


def of_timm(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, Setting]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[p]: Setting(group.get("lr_scale", 1.0), group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


@pytest.mark.parametrize("name", TIMM)
def test_layers_and_decay_are_timm_s(name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    unmatched: Any = getattr(model, "no_weight_decay", set)
    for layer_decay in (0.65, 1.0):
        groups = param_groups_layer_decay(
            model, 0.05, no_weight_decay_list=unmatched(), layer_decay=layer_decay
        )
        config = optim(weight_decay=0.05, decay_on="weights", layer_decay=layer_decay)
        assert settings_of(model, config) == of_timm(model, groups)
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=unmatched())
    config = optim(weight_decay=0.05, decay_on="weights")
    assert settings_of(model, config) == of_timm(model, groups)


def test_timm_s_embedding_of_positions_has_no_decay() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    found = settings_of(model, optim(decay_on="weights", weight_decay=0.1))
    assert {found["pos_embed"].decay, found["cls_token"].decay} == {0.0}
    assert found["patch_embed.proj.weight"].decay == 0.1
    model = torchvision.models.VisionTransformer(32, 16, 1, 1, 8, 16, num_classes=3)
    found = settings_of(model, optim(decay_on="weights", weight_decay=0.1))
    assert {found["class_token"].decay, found["encoder.pos_embedding"].decay} == {0.0}
    assert found["conv_proj.weight"].decay == 0.1


def test_an_auxiliary_norm_follows_its_main_one() -> None:
    model = convert(timm.create_model("test_resnet", num_classes=3))
    config = optim(layer_decay=0.5, decay_on="weights", freeze=["layer1", "*.bn2.*"])
    found = settings_of(model, config)
    assert found.keys() == dict(model.named_parameters()).keys()
    aux = [name for name in found if ".aux." in name]
    assert len(aux) == 2 * len(norms(model))
    assert all(found[name] == found[name.replace(".aux.", ".")] for name in aux)
    plain = settings_of(timm.create_model("test_resnet", num_classes=3), config)
    assert all(found[name] == setting for name, setting in plain.items())


@pytest.mark.parametrize("name", ["levit_128s", "iformer_s"])
def test_a_head_that_holds_norms(name: str) -> None:
    """Which have auxiliary twins, that are no parameters of the plain head."""
    model = convert(timm.create_model(name, num_classes=3))
    found = settings_of(model, optim(head_lr_scale=4.0))
    assert found.keys() == dict(model.named_parameters()).keys()
    aux = [name for name, setting in found.items() if ".aux." in name and setting.lr_scale == 4]
    assert aux
    assert all(found[name.replace(".aux.", ".")].lr_scale == 4 for name in aux)


def test_what_is_frozen() -> None:
    model = build("cifar_resnet8", 10, size=8)
    found = settings_of(model, optim(freeze=["conv1", "blocks.0", "*.bias"]))
    frozen = {name for name, setting in found.items() if setting == FROZEN}
    assert {"conv1.weight", "blocks.0.conv1.weight", "blocks.0.bn1.aux.weight"} <= frozen
    assert {"fc.bias", "blocks.2.bn2.aux.bias"} <= frozen
    assert not {"fc.weight", "blocks.1.conv1.weight", "bn1.weight"} & frozen


def test_mistakes() -> None:
    model = build("cifar_resnet8", 10, size=8)
    for patterns, message in (
        (["block"], r"optim.freeze = 'block': no .* its parts are blocks, bn1, conv1, fc$"),
        (["conv1", "*.gamma"], r"optim.freeze = '\*.gamma'"),
        (["*"], "these are all parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            settings_of(model, optim(freeze=patterns))
    with pytest.raises(ValueError, match=r"optim.layer_decay = 0.5: CifarResNet is not divided"):
        settings_of(model, optim(layer_decay=0.5))
    headless = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(ValueError, match=r"optim.head_lr_scale = 2.0: no head of ResNet"):
        settings_of(headless, optim(head_lr_scale=2.0))


# ---------------------------------------------------------------------- in the buffers


def test_equal_settings_lie_together() -> None:
    """Few stretches, which cover the buffer, in which every parameter has its own setting."""
    model = convert(timm.create_model("test_resnet", num_classes=3))
    settings = settings_of(model, optim(layer_decay=0.5, decay_on="weights", freeze=["conv1"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flat = Flat(model.to(memory_format=torch.channels_last), settings)
    runs = [(place, setting) for setting, places in flat.stretches.items() for place in places]
    for name, place in flat.slices.items():
        own = [s for run, s in runs if run.start <= place.start and place.stop <= run.stop]
        assert own == ([settings[name]] if settings[name].trained else [])
    # Shared, main and auxiliary parameters have a stretch of each of their settings.
    assert len(runs) <= 3 * len(flat.stretches)
    n_frozen = sum(flat.parameters[name].numel() for name, s in settings.items() if not s.trained)
    n_trained = sum(run.stop - run.start for run, _ in runs)
    assert n_trained + n_frozen <= len(flat.param)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("variant", ["fused", "decoupled"])
def test_what_is_frozen_costs_no_gradient_and_stays(variant: str, amp: Any) -> None:
    step = make(variant, amp=amp, optim={"freeze": ["conv1", "bn1", "blocks.0"]})
    frozen = {name for name, p in step.network.model.named_parameters() if not p.requires_grad}
    assert {"conv1.weight", "bn1.aux.bias", "blocks.0.conv2.weight"} <= frozen
    assert len(step.network.leaves) == len(step.network.flat.parameters) - len(frozen)
    before = clone(step)
    for seed in (1, 2):
        feed(step, seed)
        step()
    after = step.state()
    for name in frozen:
        assert torch.equal(after[f"model.{name}"], before[f"model.{name}"])
        assert not after[f"momentum.{name}"].any()
    # Norms go on to normalise by the batch, so the statistics of evaluation must follow.
    name = "model.bn1.running_mean"
    assert not torch.equal(after[name], before[name])
    assert not torch.equal(after["model.fc.weight"], before["model.fc.weight"])
