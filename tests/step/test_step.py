"""`fap.step.step.Step` against its slow twin in float64, on inputs drawn anew in every run (SEED=n
repeats one).
"""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fap.config import Config, load_config, make_config
from fap.nets.norm import convert, norms
from fap.nets.stem import install_stem, stem_of
from fap.step.step import Step, attack, dropout_seed
from tests.step.reference_step import Draws, Result, Rules, Twin, forward_alone

SIZE, CLASSES, GROUP = 16, 5, 8
DIRECTION_KEY = 0x5BD1E995  # what `Step` adds to the noise key for the `noise` control


class TinyNet(nn.Module):
    """No stem: `Step` takes the input gradient of the whole pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # a first operation that is no convolution
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = (
            nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8, eps=1e-3),
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x * self.scale)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


class TinyResNet(nn.Module):
    """Stem, then two residual blocks of width 8; BN groups see 4 x 4 pixels at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8),
                           nn.Conv2d(8, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8)])
            for _ in range(2)
        )  # fmt: skip
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        for conv, bn, short, short_bn in self.blocks:
            x = (bn(conv(x)) + short_bn(short(x))).relu()
        return self.fc(x.mean((2, 3)))


pytestmark = pytest.mark.usefixtures("seed")


def config_of(method: dict[str, Any], groups: int = 4, **data: Any) -> Config:
    smoothing = data.pop("label_smoothing", 0.0)
    return make_config(
        {
            "model": {"num_classes": CLASSES},
            "method": {"group_rows": GROUP, "p_adv": "1/3"} | method,
            "data": {"size": SIZE} | data,
            "optim": {"clean_batch": GROUP * groups, "label_smoothing": smoothing},
        }
    )


def rules_of(config: Config) -> Rules:
    """The twin's reading of a config."""
    m = config.method
    n_adv = 0 if m.name == "vanilla" else config.optim.clean_batch // GROUP * m.adv_group_rows
    common: dict[str, Any] = {
        "method": m.name, "pipelined": m.schedule == "pipelined",
        "clean_group_rows": GROUP, "adv_group_rows": m.adv_group_rows, "n_adv": n_adv,
        "label_smoothing": config.optim.label_smoothing, "mean": config.data.mean, "std": config.data.std,
    }  # fmt: skip
    if m.name == "vanilla":
        return Rules(**common, weights=(1.0, 0.0, 0.0), sync=False)
    assert (
        m.weight_clean
        and m.weight_adv
        and m.eps_255
        and m.step_255
        and m.attack_steps
        and m.sync is not None
    )
    return Rules(
        **common, weights=(m.weight_clean, m.weight_noise or 0.0, m.weight_adv), sync=m.sync, combine=m.combine or "sum",
        eps_255=m.eps_255, step_255=m.step_255, attack_steps=m.attack_steps, attack_bn=m.attack_bn or "batch",
    )  # fmt: skip


def models(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """(converted, plain): equal weights, main and auxiliary norms equal at the start but no fresh
    initialisation.
    """
    plain = kind().double()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            for value, low, high in (
                (m.weight, 0.5, 1.5),
                (m.bias, -0.5, 0.5),
                (m.running_mean, -1, 1),
                (m.running_var, 0.5, 2),
            ):
                nn.init.uniform_(value, low, high)
    converted = convert(copy.deepcopy(plain)).float()
    install_stem(converted, SIZE)
    converted = converted.double().to(memory_format=torch.channels_last)
    converted.load_state_dict(
        {k: plain.state_dict()[k.replace(".aux.", ".")] for k in converted.state_dict()}
    )
    return converted, plain


def draw(config: Config) -> tuple[dict[str, Any], Draws]:
    """One step's random input, as `Step.feed` and as the twin take it."""
    m, n_clean = config.method, config.optim.clean_batch
    groups = n_clean // GROUP
    n_adv, rows = groups * m.adv_group_rows, n_clean + config.loader_adv_rows
    images = torch.randint(0, 256, (rows, 3, SIZE, SIZE), dtype=torch.uint8)
    images[torch.rand(images.shape) < 0.1] = 255  # the ends of the pixel range, where clipping acts
    images[torch.rand(images.shape) < 0.1] = 0
    feed: dict[str, Any] = {"images": images, "labels": torch.randint(0, CLASSES, (rows,))}
    twin: dict[str, Any] = dict(feed)
    if n_adv:
        key = torch.randint(-(2**31), 2**31, (groups,)).int()
        order = torch.randperm(n_adv)
        feed |= {"noise_key": key, "shuffle": order}
        shape = (n_adv, 3, SIZE, SIZE)
        start = attack.uniform(key, shape, torch.float64) * m.eps_255
        twin |= {
            "delta0": start if m.random_start else torch.zeros(shape),
            "shuffle": None if m.shuffle == "off" else order,
            "direction": attack.uniform(key ^ DIRECTION_KEY, shape),
        }
        if m.targeted:
            labels = feed["labels"][:n_adv] if m.name == "advprop" else feed["labels"][n_clean:]
            twin["target"] = attack.other_label(key, labels, CLASSES)
    if config.data.mix:
        top, left, bottom, right = 3, 5, 3 + random.randrange(1, 12), 5 + random.randrange(1, 10)
        lam = torch.rand(())
        if config.data.mix == "cutmix":
            lam = 1 - torch.tensor((bottom - top) * (right - left)) / SIZE**2
        partner = torch.cat([g * GROUP + torch.randperm(GROUP) for g in range(groups)])
        feed |= {
            "mix_lam": lam,
            "mix_box": torch.tensor([top, left, bottom, right]),
            "mix_partner": partner,
        }
        twin |= {
            "mix": config.data.mix,
            "lam": lam.item(),
            "box": (top, left, bottom, right),
            "partner": partner,
        }
    return feed, Draws(**twin)


def close(fast: Tensor, slow: Tensor, what: str) -> None:
    error, scale = (fast - slow).abs().max().item(), slow.abs().max().item()
    assert error <= 1e-9 * scale + 1e-13, (
        f"{what}: differs by {error:.3g}, largest value {scale:.3g}"
    )


def gradients(step: Step) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in step.flat.named(step.flat.grad).items()}


def in_step_names(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Names of the twin's two models -> names of the converted one."""
    out = parts.get("shared", {}) | parts["main"]
    return out | {"{}.aux.{}".format(*k.rsplit(".", 1)): v for k, v in parts["aux"].items()}


def compare_step(step: Step, twin: Twin, result: Result, order: Tensor | None) -> None:
    fast, slow = gradients(step), in_step_names(result.gradients)
    if twin.rules.method == "vanilla":
        assert all(not fast[k].any() for k in fast if ".aux." in k)
    else:
        assert fast.keys() == slow.keys()
    for k, v in slow.items():
        close(fast[k], v, f"gradient of {k}")
    state = step.model.state_dict()
    for k, v in in_step_names(twin.bn_state()).items():
        close(state[k], v, k)
    if result.adversarial is not None:
        made = result.adversarial if order is None else result.adversarial[order]
        assert torch.equal(step.adv_255, made), "adversarial images"
    metrics = step.take_metrics()
    for kind, losses in result.losses.items():
        close(
            torch.tensor(metrics[f"loss_{kind}"], dtype=torch.float64),
            losses.double().sum(),
            f"loss of the {kind} rows",
        )
        assert metrics[f"rows_{kind}"] == len(losses)
    assert metrics["steps"] == 1
    assert metrics["skipped"] == 0


def check(config: Config, kind: type[nn.Module] = TinyResNet, steps: int = 5) -> None:
    """Everything after each of `steps` steps: gradients, adversarial images, statistics, losses,
    weights.
    """
    converted, plain = models(kind)
    assert (stem_of(converted) is not None) == (kind is TinyResNet)
    step, twin = Step(converted, config), Twin(plain, rules_of(config))
    for i in range(steps):
        feed, draws = draw(config)
        lr = 0.1 / (i + 1)
        step.feed(lr=lr, **feed)
        step()
        result = twin.step(draws)
        pipelined = config.method.schedule == "pipelined"
        compare_step(step, twin, result, None if pipelined else draws.shuffle)
        twin.optimise(lr)
        weights = dict(converted.named_parameters())
        for name, value in plain.named_parameters():
            close(weights[name].data, value.data, f"{name} after step {i}")
        if config.method.name != "vanilla":
            for name, value in twin.aux.named_parameters():
                layer, _, leaf = name.rpartition(".")
                own = weights.get(f"{layer}.aux.{leaf}", weights[name])
                close(own.data, value.data, f"aux {name} after step {i}")


FAST = {"name": "fast_advprop"}
SCHEDULES = ("sequential", "fused", "pipelined", "parallel")


@pytest.mark.parametrize("kind", [TinyNet, TinyResNet])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("shuffle", ["off", "ranks"])
def test_fast_advprop(kind: type[nn.Module], schedule: str, groups: int, shuffle: str) -> None:
    check(config_of(FAST | {"schedule": schedule, "shuffle": shuffle}, groups), kind)


SEPARATE: list[dict[str, Any]] = [
    {},
    {"attack_steps": 5, "eps_255": 4.0},
    {"attack_steps": 1, "eps_255": 1.0, "random_start": False},
    {"attack_steps": 3, "eps_255": 4.0, "shuffle": "ranks", "sync": True, "weight_adv": 0.5},
]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("attack_bn", ["running", "batch"])
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("name", ["advprop", "decoupled"])
@pytest.mark.parametrize(
    "more", SEPARATE, ids=lambda m: "-".join(map(str, m.values())) or "defaults"
)
def test_attack_without_reuse(
    name: str, targeted: bool, attack_bn: str, more: dict[str, Any], groups: int
) -> None:
    method = {"name": name, "targeted": targeted, "attack_bn": attack_bn} | more
    if name == "advprop":
        method["p_adv"] = None
    check(config_of(method, groups), steps=2)


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
            made[targeted, attack_bn] = step.adv_255.clone()
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
        before = {k: v.clone() for k, v in step.model.state_dict().items()}
        made = Step._attack(step, *args)
        seen.append(
            [k for k, v in step.model.state_dict().items() if not torch.equal(v, before[k])]
        )
        return made

    monkeypatch.setattr(step, "_attack", attack_and_look)
    step.feed(lr=0.1, **draw(config)[0])
    step()
    assert seen == [[]]
    assert step.take_metrics()["steps"] == 1


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


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", ["vanilla", "decoupled", *SCHEDULES])
def test_data_options(method: str, option: dict[str, Any]) -> None:
    given: dict[str, Any] = FAST | {"schedule": method} if method in SCHEDULES else {"name": method}
    if method == "vanilla":
        given["p_adv"] = None
    check(config_of(given, groups=3, **option), steps=3)


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
            if "p_adv" in switch:  # fewer adversarial rows: the first ones of the same batch
                n = config.loader_adv_rows
                feed = {
                    k: v[: step.n_clean + n] if k in ("images", "labels") else v
                    for k, v in feed.items()
                }
                feed["shuffle"] = feed["shuffle"][feed["shuffle"] < n]
            step.feed(lr=0.1, **feed)
            step()
        after.append(step.flat.param.data.clone())
    assert (after[0] - after[1]).abs().max() > 1e-6


def test_any_combination() -> None:
    """What no list above names: switches drawn at random."""
    pick = random.choice
    for _ in range(6):
        method = {
            "name": pick(["fast_advprop", "noise"]), "schedule": pick(SCHEDULES), "sync": pick([True, False]),
            "p_adv": pick(["1/5", "1/3", "1/2"]), "weight_noise": pick([0.25, 0.5, 1.0]), "weight_adv": pick([0.25, 0.5, 1.0]),
            "random_start": pick([True, False]), "shuffle": pick(["ranks", "groups", "off"]), "eps_255": pick([0.5, 1.0, 4.0]),
        }  # fmt: skip
        option = {"mix": pick([None, "mixup", "cutmix"]), "label_smoothing": pick([0.0, 0.1])}
        print(method, option)
        check(config_of(method, pick([1, 2, 5]), **option), pick([TinyNet, TinyResNet]), steps=2)


def test_first_step_of_pipelined_trains_noise_and_later_ones_the_carry() -> None:
    config = config_of(FAST | {"schedule": "pipelined", "shuffle": "off"})
    converted, _ = models(TinyResNet)
    step = Step(converted, config)
    feed, draws = draw(config)
    step.feed(lr=0.0, **feed)
    step()
    metrics = step.take_metrics()
    assert metrics["loss_adv"] == pytest.approx(metrics["loss_noise"], rel=1e-12)
    assert draws.delta0 is not None
    x = feed["images"][step.n_clean :].double()
    assert (step.adv_255 - x).abs().max() <= 1
    assert not torch.equal(step.adv_255, x + draws.delta0)
    step.feed(lr=0.0, **draw(config)[0])
    step()
    metrics = step.take_metrics()
    assert metrics["loss_adv"] != pytest.approx(metrics["loss_noise"], rel=1e-6)


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
    x, labels = feed["images"][step.n_clean :].double(), feed["labels"][step.n_clean :]
    assert (step.adv_255 - x).abs().max() <= 4
    assert step.adv_255.min() >= 0
    assert step.adv_255.max() <= 255

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
        assert loss(step.adv_255, draws.target) < loss(x + draws.delta0, draws.target)
    else:
        assert loss(step.adv_255, labels) > loss(x + draws.delta0, labels)


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
    fc_bias = step.model.fc.bias  # type: ignore[union-attr]
    with torch.no_grad():
        fc_bias[0] = float("inf")
    before = {
        k: v.clone() for k, v in step.state().items() if k.startswith(("model.", "momentum."))
    }
    step()
    after = step.state()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    metrics = step.take_metrics()
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
    assert metrics["nonfinite_clean"] > 0
    with torch.no_grad():
        fc_bias[0] = 0.0
    step()
    metrics = step.take_metrics()
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


def test_dropout_seeds_are_fixed_numbers() -> None:
    """Frozen: a resumed run repeats a step's dropout in whatever process, and on whatever machine."""
    assert dropout_seed(0, 0, 0) == 2635072618980576772
    assert dropout_seed(3, 1000, 2) == 10045376428444654063


def test_dropout_seeds_differ_in_each_argument_and_spread_their_bits() -> None:
    runs = [
        (seed, step, rank)
        for seed in (0, 1, 2**32, 2**40)
        for step in range(500)
        for rank in range(4)
    ]
    seeds = [dropout_seed(*run) for run in runs]
    low = [s % 2**32 for s in seeds]  # all that the CPU's generator takes
    assert len(set(seeds)) == len(seeds)
    assert len(low) - len(set(low)) <= 2  # of 8,000 draws out of 2**32 even one pair is rare
    bits = np.array([[s >> i & 1 for i in range(64)] for s in seeds])
    assert abs(bits.mean(0) - 0.5).max() < 0.04  # 7 standard deviations
    flips = (bits[4:2000] != bits[:1996]).mean(0)  # from one step to the next
    assert abs(flips - 0.5).max() < 0.08


@pytest.mark.slow
def test_dropout_seeds_are_those_of_any_process() -> None:
    code = (
        "from fap.step.step import dropout_seed; print(dropout_seed(3, 1000, 2),"
        " dropout_seed(2**40, 7, 0))"
    )
    said = set()
    for hash_seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        said.add(done.stdout)
    assert said == {f"{dropout_seed(3, 1000, 2)} {dropout_seed(2**40, 7, 0)}\n"}


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
    bounds = {part: getattr(step.flat, part) for part in ("shared", "main", "aux")}
    where = {
        k: next(part for part, b in bounds.items() if b.start <= own.start and own.stop <= b.stop)
        for k, own in step.flat.slices.items()
    }
    bn = {k for k, m in step.model.named_modules() if m in norms(step.model)}
    assert len(bn) == 5
    for k, part in where.items():
        layer = k.rpartition(".")[0]
        assert part == ("aux" if layer.endswith(".aux") else "main" if layer in bn else "shared"), k
