"""Optimisers over flat buffers against plain ones, one parameter after the other, in float64."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn

from fap.config import Config
from fap.distributed import ONE_RANK
from fap.step.flat import Flat
from fap.step.lamb import Lamb
from fap.step.optimisers import Optimiser
from fap.step.parameters import Setting
from fap.step.step import Step
from tests.step.made_steps import changed, clone, feed, make
from tests.step.reference_step import Twin
from tests.step.test_static import NoHostSync, n_beside_the_network
from tests.step.twin_checks import TinyResNet, close, config_of, draw, models, rules_of

FAST = {"name": "fast_advprop"}
# A large eps: Adam makes as much of the rounding of a tiny gradient as of a large one.
OPTIMISERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "weight_decay": 0.02},
    "nesterov": {"name": "sgd", "nesterov": True, "momentum": 0.7},
    "adamw": {"name": "adamw", "betas": [0.8, 0.95], "eps": 1e-3},
    "lamb": {"name": "lamb", "betas": [0.8, 0.95], "eps": 1e-3, "weight_decay": 0.1},
}
every_optimiser = pytest.mark.parametrize("optim", OPTIMISERS.values(), ids=OPTIMISERS)


class Layered(TinyResNet):
    """Divided into layers as timm's models are."""

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^stem|bn", "blocks": r"^blocks\.(\d+)"}


LAYERS = {"stem": 0, "bn": 0, "blocks.0": 1, "blocks.1": 2, "fc": 3}


# ---------------------------------------------------------------------- the twins


class PlainLamb:
    """Algorithm 2 of arXiv 1904.00962, of one parameter after the other."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float):
        self.param_groups = groups
        self.betas = betas
        self.eps = eps
        self.t = 0
        self.m: dict[nn.Parameter, Tensor] = {}
        self.v: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        b1, b2 = self.betas
        for group in self.param_groups:
            for p in group["params"]:
                self.m[p] = b1 * self.m.get(p, torch.zeros_like(p)) + (1 - b1) * p.grad
                self.v[p] = b2 * self.v.get(p, torch.zeros_like(p)) + (1 - b2) * p.grad**2
                m = self.m[p] / (1 - b1**self.t)
                v = self.v[p] / (1 - b2**self.t)
                r = m / (v.sqrt() + self.eps) + group["weight_decay"] * p
                ratio = 1.0
                if group["weight_decay"] > 0 and p.norm() > 0 and r.norm() > 0:
                    ratio = (p.norm() / r.norm()).item()
                p -= group["lr"] * ratio * r


def plain_optimiser(config: Config, groups: list[dict[str, Any]]) -> Any:
    o = config.optim
    match o.name:
        case "sgd":
            assert o.momentum is not None
            return torch.optim.SGD(
                groups, lr=0.1, momentum=o.momentum, nesterov=bool(o.nesterov), foreach=False
            )
        case "adamw":
            assert o.betas is not None and o.eps is not None
            return torch.optim.AdamW(groups, lr=0.1, betas=o.betas, eps=o.eps, foreach=False)
        case _:
            assert o.betas is not None and o.eps is not None
            return PlainLamb(groups, o.betas, o.eps)


def expected_setting(config: Config, name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """Scale of the rate and decay, read from the config once more. (0, 0): frozen."""
    o = config.optim
    decay = o.weight_decay
    if o.decay_on == "weights" and (parameter.ndim < 2 or name.endswith("bias")):
        decay = 0.0
    scale = 1.0
    if o.layer_decay is not None:
        (layer,) = (n for part, n in LAYERS.items() if name.startswith(f"{part}."))
        scale = o.layer_decay ** (3 - layer)
    if name.startswith("fc."):
        scale *= o.head_lr_scale
    if any(name.startswith(frozen) for frozen in o.freeze):
        return 0.0, 0.0
    return scale, decay


def shorten(twin: Twin, clip_norm: float | None) -> None:
    if clip_norm is None:
        return
    gradients = [p.grad for _, _, p in twin._parameters() if p.grad is not None]
    norm = sum(gradient.square().sum() for gradient in gradients) ** 0.5
    for gradient in gradients:
        gradient *= min(1.0, clip_norm / norm)


def check(config: Config, net: type[nn.Module] = TinyResNet, steps: int = 2) -> None:
    """Weights of all parameters after each step."""
    converted, plain = models(net)
    step = Step(converted, config)
    twin = Twin(plain, rules_of(config))
    groups: list[dict[str, Any]] = []
    for _, name, parameter in twin._parameters():
        scale, decay = expected_setting(config, name, parameter)
        groups.append({"params": [parameter], "scale": scale, "weight_decay": decay})
    optimiser = plain_optimiser(config, groups)
    start = {name: value.clone() for name, value in converted.state_dict().items()}
    for i in range(steps):
        given, draws = draw(config)
        lr = 0.1 / (i + 1)
        step.feed(lr=lr, **given)
        step()
        twin.step(draws)
        for group in groups:  # what is frozen has no share in the gradient's norm
            if group["scale"] == 0:
                group["params"][0].grad = torch.zeros_like(group["params"][0])
        shorten(twin, config.optim.clip_norm)
        for group in optimiser.param_groups:
            group["lr"] = lr * group["scale"]
        optimiser.step()
        found = converted.state_dict()
        for part, name, parameter in twin._parameters():
            layer, _, leaf = name.rpartition(".")
            own = f"{layer}.aux.{leaf}" if part == "aux" else name
            close(found[own], parameter.data, f"{own} after step {i}")
            frozen = expected_setting(config, name, parameter)[0] == 0
            assert torch.equal(found[own], start[own]) == frozen, own
    assert step.metrics.take(ONE_RANK)["skipped"] == 0


# ---------------------------------------------------------------------- against them


@every_optimiser
def test_an_optimiser_is_its_plain_twin(optim: dict[str, Any]) -> None:
    check(config_of(FAST, groups=2, optim=optim))


MORE: dict[str, dict[str, Any]] = {
    "clip": {"clip_norm": 0.05},
    "decay on weights": {"decay_on": "weights", "weight_decay": 0.3},
    "layer decay": {"layer_decay": 0.5},
    "freeze": {"freeze": ["stem", "bn", "blocks.0"]},
    "all": {
        "clip_norm": 0.2,
        "decay_on": "weights",
        "layer_decay": 0.7,
        "freeze": ["stem", "blocks.0.1"],
    },
}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(more, id=name, marks=[pytest.mark.slow][name == "all" :])
        for name, more in MORE.items()
    ],
)
@every_optimiser
def test_settings_of_parameters(optim: dict[str, Any], more: dict[str, Any]) -> None:
    check(config_of(FAST, groups=2, optim=optim | more), Layered)


@every_optimiser
def test_vanilla_training_and_the_head_s_rate(optim: dict[str, Any]) -> None:
    check(config_of({"name": "vanilla", "p_adv": None}, optim=optim | {"head_lr_scale": 5.0}))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_equal_settings_are_one_tensor_for_the_kernel(name: str) -> None:
    step = make("fused", optim={"name": name})
    (group,) = step.update.optimiser.torch.param_groups
    assert [part is step.network.flat.param for part in group["params"]] == [True]
    divided = make("fused", optim={"name": name, "decay_on": "weights"})
    groups = divided.update.optimiser.torch.param_groups
    # Weights, and biases, lie apart in the shared part; norms follow. The biases' end meets theirs.
    assert [len(group["params"]) for group in groups] == [1, 1]
    covered = sum(len(part) for group in groups for part in group["params"])
    assert covered == len(divided.network.flat.param)


def test_lamb_is_timm_s() -> None:
    """On random parameters and gradients; timm's clips nothing here."""
    model = TinyResNet().double()
    other = copy.deepcopy(model)
    settings = {n: Setting(1.0, 0.1 if p.ndim > 1 else 0.0) for n, p in model.named_parameters()}
    config = config_of(FAST, optim={"name": "lamb", "eps": 1e-6, "weight_decay": 0.1}).optim
    flat = Flat(_converted(model), settings)
    ours = Optimiser(flat, torch.zeros(()), config)
    assert isinstance(ours.torch, Lamb)
    theirs = timm.optim.Lamb(
        [{"params": [p], "weight_decay": settings[n].decay} for n, p in other.named_parameters()],
        eps=1e-6,
        max_grad_norm=None,
    )
    named = flat.named(flat.grad)
    for _ in range(5):
        lr = random.uniform(0.01, 0.2)
        for name, parameter in other.named_parameters():
            parameter.grad = torch.randn_like(parameter) * random.uniform(0.01, 10)
            named[name].copy_(parameter.grad)
        ours.set_lr(lr)
        ours(torch.zeros(()), None)
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
    for name, parameter in other.named_parameters():
        close(flat.parameters[name].data, parameter.data, name)


def _converted(model: nn.Module) -> nn.Module:
    """With main norms alone, whose names are the plain model's."""
    from fap.nets.dual import convert

    return convert(model, aux=False)


# ---------------------------------------------------------------------- what a step leaves


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("amp", ["off", "fp16"])
@every_optimiser
def test_a_skipped_step_changes_no_bit(optim: dict[str, Any], amp: Any, when: int) -> None:
    more = {"decay_on": "weights", "clip_norm": 1.0, "ema": 0.9}
    step = make("fused", amp=amp, optim=optim | more)
    for seed in range(when):
        feed(step, seed)
        step()
    step.update.scale.fill_(float("inf"))
    before = clone(step)
    step()
    assert not changed(before, clone(step), "carry", "scale", "growth")
    step.update.scale.fill_(2.0**10)
    step()
    after = changed(before, clone(step))
    assert {"model.fc.weight", "model.fc.bias", "ema.fc.weight", "ema_updates"} <= after
    if optim["name"] != "sgd":
        assert "optimizer.step" in after


@every_optimiser
def test_a_restored_state_goes_on_bit_for_bit(optim: dict[str, Any]) -> None:
    more = {"decay_on": "weights", "ema": 0.9, "freeze": ["conv1"]}
    one = make("pipelined", optim=optim | more)
    two = make("pipelined", optim=optim | more, seed=1)
    for seed in (1, 2):
        feed(one, seed)
        one()
    two.load_state(clone(one))
    for step in (one, two):
        feed(step, 3)
        step()
    assert not changed(clone(one), clone(two))


def test_state_is_by_parameter_and_another_optimiser_s_is_refused_by_name() -> None:
    adamw = make("vanilla", optim={"name": "adamw"}).state()
    lamb = make("vanilla", optim={"name": "lamb"}).state()
    assert {"exp_avg.fc.bias", "exp_avg_sq.fc.bias", "optimizer.step"} <= adamw.keys()
    assert adamw.keys() == lamb.keys()
    assert not any(name.startswith("momentum.") for name in adamw)
    sgd = make("vanilla")
    assert "momentum.fc.bias" in sgd.state()
    with pytest.raises(ValueError, match=r"does not fit the run: exp_avg\."):
        sgd.load_state(adamw)


@pytest.mark.parametrize("variant", ["fused", "decoupled"])
@every_optimiser
def test_no_host_sync(optim: dict[str, Any], variant: str) -> None:
    more = {"decay_on": "weights", "clip_norm": 1.0, "ema": 0.9, "accumulate": 2}
    step = make(variant, amp="fp16", optim=optim | more | {"freeze": ["conv1"]})
    pointers = {name: tensor.data_ptr() for name, tensor in step.state().items()}
    for _ in range(2):
        with NoHostSync():
            step()
    assert pointers == {name: tensor.data_ptr() for name, tensor in step.state().items()}


@pytest.mark.slow
@every_optimiser
def test_no_operator_per_parameter(optim: dict[str, Any]) -> None:
    more = optim | {"decay_on": "weights", "ema": 0.9}
    shallow = n_beside_the_network("fused", "cifar_resnet8", "off", more)
    deep = n_beside_the_network("fused", "cifar_resnet20", "off", more)
    assert 0 < shallow == deep


def test_rates_follow_the_fed_one() -> None:
    step = make("vanilla", optim={"head_lr_scale": 10.0})
    feed(step, 0)
    groups = step.update.optimiser.torch.param_groups
    assert sorted(float(group["lr"]) for group in groups) == pytest.approx([0.1, 1.0])
