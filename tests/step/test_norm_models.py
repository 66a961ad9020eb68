"""Small models of timm with every kind of norms: in groups, in a step of every method, exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fap.config import Config, make_config
from fap.distributed import ONE_RANK
from fap.nets.build import plain, prepare
from fap.nets.dual import export, norms, set_groups
from fap.nets.norm import Group
from fap.nets.pretrained import load_plain
from fap.step.step import Step
from tests.nets.conftest import randomise_norms
from tests.step.made_steps import CLASSES, VARIANTS, feed, fields_of

SMALL = 32
FEW = ("vanilla", "fused", "decoupled")  # of larger images
# Name, size, classes of the norms.
QUICK = [
    ("timm/test_convnext", SMALL, {"LayerNorm2d", "LayerNorm"}),
    ("timm/test_efficientnet_gn", SMALL, {"GroupNormAct"}),
    ("timm/test_efficientnet_evos", SMALL, {"EvoNorm2dS0"}),
    ("timm/test_nfnet", SMALL, set[str]()),
]
SLOW = [
    ("timm/test_efficientnet_ln", SMALL, {"LayerNormAct2d"}),
    ("timm/test_vit", 64, {"LayerNorm"}),
    ("timm/test_vit4", 64, {"RmsNorm"}),
    ("timm/test_vit_relpos", 64, {"LayerNorm"}),
    ("timm/test_coatnet", 64, {"BatchNormAct2d", "LayerNorm2d"}),
    ("timm/test_maxvit", 64, {"BatchNormAct2d", "LayerNorm", "LayerNorm2d"}),
    ("timm/repvit_m0_9", 64, {"BatchNorm2d", "BatchNorm1d"}),
    ("timm/mobilevit_xxs", 64, {"BatchNormAct2d", "LayerNorm"}),
    ("timm/levit_128s", 64, {"BatchNorm2d", "BatchNorm1d"}),
    ("swin_t", 64, {"LayerNorm"}),
]
MODELS = [*QUICK, *(pytest.param(*model, marks=pytest.mark.slow) for model in SLOW)]
COSTLY = {"swin_t", "timm/repvit_m0_9", "timm/levit_128s"}  # a quarter of a minute each


def _marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow, *([pytest.mark.soak] if name in COSTLY else [])]


every_model = pytest.mark.parametrize(("name", "size", "classes"), MODELS)


def without_chance(model: nn.Module) -> nn.Module:
    """No dropout, in whatever form: two ways to compute must give the same."""
    for module in model.modules():
        if "drop" in type(module).__name__.lower() or "stochastic" in type(module).__name__.lower():
            for field in ("p", "drop_prob"):
                if hasattr(module, field):
                    setattr(module, field, 0.0)
    return model


def config_of(name: str, size: int, method: dict[str, Any]) -> Config:
    return make_config(
        {
            "model": {"name": name, "num_classes": CLASSES},
            "method": {"group_rows": 4} | method,
            "data": {"size": size, "resize": size, "crop": "pad"},
            "optim": {"clean_batch": 8, "lr": 0.01},
        }
    )


def aux_weights(model: nn.Module) -> dict[str, Tensor]:
    """As plain weights: those of the auxiliary norms in place of the main ones'."""
    state = model.state_dict()
    found = export(state)
    for norm in norms(model):
        assert norm.aux is not None
        found |= {f"{norm.path}.{k}": v for k, v in norm.aux.state_dict().items()}
    return found


@every_model
def test_groups_are_forwards_of_plain_models(name: str, size: int, classes: set[str]) -> None:
    torch.manual_seed(0)
    model = without_chance(prepare(plain(name, CLASSES, size), size=size)).double().train()
    assert {norm.plain_name for norm in norms(model)} == classes
    randomise_norms(model)
    x = torch.randn(12, 3, size, size).double()
    set_groups(model, [Group("main", 4, 0, 1), Group("aux", 4, 0, 2), Group("aux", 4, 1, 2)])
    weights = [export(model.state_dict()), aux_weights(model)]
    ours = model(x)
    theirs = []
    for rows, state in zip(x.split(4), [*weights, weights[1]], strict=True):
        other = without_chance(plain(name, CLASSES, size)).double().train()
        other.load_state_dict(state, strict=True)
        theirs.append(other(rows))
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-6, atol=1e-8)
    if classes:
        assert not torch.allclose(theirs[0], other(x[:4])), "main and auxiliary weights differ"


@every_model
def test_one_step_of_every_method(name: str, size: int, classes: set[str]) -> None:
    torch.manual_seed(0)
    first = plain(name, CLASSES, size)
    randomise_norms(first)  # a weight that begins as zero would keep gradients from others
    start = first.state_dict()
    for variant in VARIANTS if size == SMALL else FEW:
        method = fields_of(variant)
        if "p_adv" in method:
            method["p_adv"] = "1/3"
        config = config_of(name, size, method)
        model = prepare(plain(name, CLASSES, size), aux=config.method.has_aux, size=size)
        load_plain(model, start)
        step = Step(model, config)
        feed(step, 0)
        step()
        metrics = step.metrics.take(ONE_RANK)
        assert (metrics["steps"], metrics["skipped"]) == (1, 0), variant
        gradients = step.network.flat.named(step.network.flat.grad)
        for norm in norms(model):
            assert (norm.aux is not None) == config.method.has_aux
            if norm.aux is not None:  # both are trained, each by other rows
                main = gradients[f"{norm.path}.weight"]
                aux = gradients[f"{norm.path}.aux.weight"]
                assert main.any() and aux.any() and not torch.equal(main, aux), norm.path
        trained = export(model.state_dict(), steps=1)
        plain(name, CLASSES, size).load_state_dict(trained, strict=True)
        assert any(not torch.equal(trained[key], value) for key, value in start.items())


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [*QUICK, *(pytest.param(*model, marks=_marks(model[0])) for model in SLOW)],
)
def test_schedules_agree(name: str, size: int, classes: set[str]) -> None:
    """`fused` against the authors' order, in float64: gradients, statistics, crafted images."""
    del classes
    torch.manual_seed(0)
    steps: list[Step] = []
    start: dict[str, Tensor] | None = None
    for schedule in ("sequential", "fused"):
        config = config_of(name, size, {"schedule": schedule, "p_adv": "1/3"})
        model = without_chance(prepare(plain(name, CLASSES, size), size=size)).double()
        start = start or model.state_dict()
        model.load_state_dict(start)
        steps.append(Step(model, config))
        feed(steps[-1], 1)
        steps[-1]()
    sequential, fused = (step.network.flat for step in steps)
    assert sequential.grad.norm() > 0
    torch.testing.assert_close(fused.grad, sequential.grad, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(fused.stats, sequential.stats, rtol=1e-7, atol=1e-10)
    images = [step.adv.rows.images_255 for step in steps]
    assert torch.equal(*images)
