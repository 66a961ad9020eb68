"""Compares `fap.step.step.Step` with its slow twin: models, configs, random input, equality."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from timm.layers import Conv2dSame, GroupNormAct, LayerNorm2d, ScaledStdConv2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fap.config import Config, make_config
from fap.distributed import ONE_RANK
from fap.draws import uniform
from fap.nets.build import channels_last
from fap.nets.dual import convert, norm_state
from fap.nets.stem import install_stem, stem_of
from fap.step.attack import DIRECTION
from fap.step.step import Step
from fap.tasks import make_task
from pipelines.sizes import Size
from tests.step.reference_step import NORMS, Blend, Draws, Result, Rules, Twin

SIZE = 16
CLASSES = 5
GROUP = 8  # rows of a clean group


class TinyNet(nn.Module):
    """No stem: `Step` takes the input gradient of the whole pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # a first operation that is no convolution
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8, eps=1e-3)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x * self.scale)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


class TinyResNet(nn.Module):
    """Stem, then two residual blocks of width 8; BN groups see 4 x 4 pixels at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(self._block() for _ in range(2))
        self.fc = nn.Linear(8, CLASSES)

    @staticmethod
    def _block() -> nn.ModuleList:
        conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        shortcut = nn.Conv2d(8, 8, 1, stride=2, bias=False)
        return nn.ModuleList([conv, nn.BatchNorm2d(8), shortcut, nn.BatchNorm2d(8)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        for conv, bn, short, short_bn in self.blocks:
            x = (bn(conv(x)) + short_bn(short(x))).relu()
        return self.fc(x.mean((2, 3)))


class TinyTokens(nn.Module):
    """A stem of patches, then two layers with a norm before each, on tokens and on images.

    A subclass says which norms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4, bias=False)
        self.on_image, self.on_tokens, self.on_vectors, self.on_rows = self.make_norms()
        self.of_channels = nn.Linear(8, 8)
        self.of_tokens = nn.Linear(16, 16)
        self.fc = nn.Linear(8, CLASSES)

    @staticmethod
    def make_norms() -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """Of (B, 8, 4, 4), (B, 16, 8), (B * 16, 8) and (B, 8)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.on_image(self.stem(x)).flatten(2).transpose(1, 2)  # (B, 16, 8): tokens
        x = x + self.of_channels(self.on_tokens(x)).relu()
        folded = self.on_vectors(x.flatten(0, 1)).view_as(x)  # as levit does
        x = x + self.of_tokens(folded.transpose(1, 2)).relu().transpose(1, 2)
        return self.fc(self.on_rows(x.mean(1)))


class LayerNorms(TinyTokens):
    @staticmethod
    def make_norms() -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        return LayerNorm2d(8), nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)


class GroupNorms(TinyTokens):
    @staticmethod
    def make_norms() -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        return GroupNormAct(8, 2), nn.GroupNorm(4, 16), nn.GroupNorm(2, 8), nn.GroupNorm(1, 8)


class RMSNorms(TinyTokens):
    @staticmethod
    def make_norms() -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        return nn.RMSNorm((8, 4, 4)), nn.RMSNorm(8), nn.RMSNorm(8), nn.RMSNorm(8)


class BatchNorms(TinyTokens):
    """Of one dimension: (B, C, L), (B * N, C), (B, C)."""

    @staticmethod
    def make_norms() -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        return nn.BatchNorm2d(8), nn.BatchNorm1d(16), nn.BatchNorm1d(8), nn.BatchNorm1d(8)


class MixedNorms(TinyTokens):
    @staticmethod
    def make_norms() -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        on_image = nn.InstanceNorm2d(8, affine=True)
        return on_image, nn.RMSNorm(8), nn.BatchNorm1d(8), nn.LayerNorm(8)


OTHER_NORMS = (LayerNorms, GroupNorms, RMSNorms, BatchNorms, MixedNorms)


class PaddedNet(TinyResNet):
    """A stem whose sides decide how much is padded, as in TensorFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv2dSame(3, 8, 3, stride=2, bias=False)


class StandardisedNet(TinyResNet):
    """A stem that is no plain convolution, so it computes the attacked rows by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ScaledStdConv2d(3, 8, 3, padding=1)


class BranchedNet(TinyResNet):
    """Two convolutions read the image, one of them its smaller copy: a stem that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Branches()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 1, stride=2, bias=False)
        self.coarse = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fine(x) + self.coarse(nn.functional.avg_pool2d(x, 2))


def config_of(method: dict[str, Any], groups: int = 4, **data: Any) -> Config:
    """`groups` groups of clean rows; a third of the rows adversarial unless `method` says else."""
    of_losses = {
        name: data.pop(name) for name in ("label_smoothing", "class_weights") if name in data
    }
    optim = data.pop("optim", {})
    return make_config(
        {
            "model": {"num_classes": CLASSES},
            "method": {"group_rows": GROUP, "p_adv": "1/3"} | method,
            "data": {"size": SIZE} | data,
            "optim": {"clean_batch": GROUP * groups} | of_losses | optim,
        }
    )


def rules_of(config: Config) -> Rules:
    """The twin's reading of a config."""
    m = config.method
    rules: dict[str, Any] = {
        "method": m.name,
        "pipelined": m.schedule == "pipelined",
        "clean_group_rows": GROUP,
        "adv_group_rows": m.adv_group_rows,
        "n_adv": config.optim.clean_batch // GROUP * m.adv_group_rows,
        "label_smoothing": config.optim.label_smoothing,
        "class_weights": config.optim.class_weights,
        "mean": config.data.mean,
        "std": config.data.std,
        "weights": (m.weight_clean or 1.0, m.weight_noise or 0.0, m.weight_adv or 1.0),
        "sync": bool(m.sync),
        "combine": m.combine or "sum",
        "one_set": m.aux == "none",
    }
    if m.name != "vanilla":
        rules |= {
            "eps_255": m.eps_255,
            "step_255": m.step_255,
            "attack_steps": m.attack_steps,
            "attack_bn": m.attack_bn or "batch",
            "attack_loss": m.attack_loss or "total",
        }
    return Rules(**rules)


def models(net: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """(converted, plain): equal weights, main and auxiliary norms equal at the start.

    No fresh initialisation: the norms' parameters and statistics are random.
    """
    plain = net().double()
    randomise_norms(plain)
    return converted_from(plain, SIZE), plain


def randomise_norms(plain: nn.Module) -> None:
    """Their parameters and statistics, as if the model had been trained."""
    for module in plain.modules():
        if isinstance(module, NORMS):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)


def converted_from(plain: nn.Module, size: Size) -> nn.Module:
    """What `Step` trains, with equal weights; the auxiliary norms are copies of the main ones."""
    converted = convert(copy.deepcopy(plain)).float()
    norm_state(converted).multiples = True  # as `fap.nets.build.prepare` does after its proof
    install_stem(converted, size)
    converted = channels_last(converted.double())
    state = plain.state_dict()
    converted.load_state_dict(
        {name: state[name.replace(".aux.", ".")] for name in converted.state_dict()}
    )
    return converted


def draw(config: Config) -> tuple[dict[str, Any], Draws]:
    """One step's random input, as `Step.feed` and as the twin take it."""
    m = config.method
    n_clean = config.optim.clean_batch
    n_groups = n_clean // GROUP
    n_adv = n_groups * m.adv_group_rows
    n_loaded = n_clean + config.loader_adv_rows
    images = torch.randint(0, 256, (n_loaded, 3, SIZE, SIZE), dtype=torch.uint8)
    images[torch.rand(images.shape) < 0.1] = 255  # the ends of the pixel range, where clipping acts
    images[torch.rand(images.shape) < 0.1] = 0
    labels = torch.randint(0, CLASSES, (n_loaded,))
    feed: dict[str, Any] = {"images": images, "targets": labels}
    twin: dict[str, Any] = {"images": images, "labels": labels}
    if n_adv:
        key = torch.randint(-(2**31), 2**31, (n_groups,)).int()
        order = torch.randperm(n_adv)
        feed |= {"noise_key": key, "shuffle": order}
        shape = (n_adv, 3, SIZE, SIZE)
        twin["delta0"] = torch.zeros(shape)
        if m.random_start:
            twin["delta0"] = uniform(key, shape, torch.float64) * m.eps_255
        twin["direction"] = uniform(key ^ DIRECTION, shape)
        if m.shuffle not in (None, "off"):
            twin["shuffle"] = order
        if m.targeted:
            attacked = labels if m.entry.attacked == "copies" else labels[n_clean:]
            twin["target"] = make_task(config).wrong_targets(key, attacked)
    if config.data.mix is not None:
        more_feed, blends = draw_mix(config, n_loaded)
        feed |= more_feed
        twin["blends"] = blends
        if m.targeted and config.data.mixes_adv:
            others = labels[more_feed["mix_partner"]]
            attacked = others if m.entry.attacked == "copies" else others[n_clean:]
            twin["other_target"] = make_task(config).wrong_targets(key, attacked)
    return feed, Draws(**twin)


def draw_mix(config: Config, n_loaded: int) -> tuple[dict[str, Any], list[Blend | None]]:
    """Partners stay inside their group; what is not mixed is its own."""
    n_clean = config.optim.clean_batch
    data = config.data
    lam = torch.ones(n_loaded)
    box = torch.zeros(n_loaded, 4, dtype=torch.int64)
    partner = torch.arange(n_loaded)
    blends: list[Blend | None] = []
    drawn = draw_share(data.mix)
    for row in range(n_loaded):
        is_clean = row < n_clean
        first = row // GROUP * GROUP
        n_rows = GROUP
        if not is_clean:
            n_rows = config.method.adv_group_rows
            first = n_clean + (row - n_clean) // n_rows * n_rows
        if not (data.mixes_clean if is_clean else data.mixes_adv):
            blends.append(None)
            continue
        if data.mix_per == "row":
            drawn = draw_share(data.mix)
        how, share, corners = drawn
        # Not a permutation, as the plan's are: what is mixed with whom does not matter to a step.
        partner[row] = first + random.randrange(n_rows)
        lam[row] = share
        box[row] = torch.tensor(corners)
        blends.append(Blend(how, int(partner[row]), lam[row].item(), corners))
    if data.mix_per == "batch":
        _, share, corners = drawn
        lam = torch.tensor(share)
        box = torch.tensor(corners)
    return {"mix_lam": lam, "mix_box": box, "mix_partner": partner}, blends


def draw_share(mix: str | None) -> tuple[Any, float, tuple[int, int, int, int]]:
    """Which of the two, the share of the own image, the box that is pasted (none for Mixup)."""
    how = mix
    if mix == "either":
        how = random.choice(["mixup", "cutmix"])
    if how == "mixup":
        return how, random.random(), (0, 0, 0, 0)
    top = random.randrange(6)
    left = random.randrange(6)
    bottom = top + random.randrange(10)  # an empty box too
    right = left + random.randrange(1, 10)
    return how, 1 - (bottom - top) * (right - left) / SIZE**2, (top, left, bottom, right)


def close(fast: Tensor, slow: Tensor, what: str) -> None:
    error = (fast - slow).abs().max().item()
    largest = slow.abs().max().item()
    assert error <= 1e-9 * largest + 1e-13, (
        f"{what}: differs by {error:.3g}, largest value {largest:.3g}"
    )


def in_step_names(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Names of the twin's two models -> names of the converted one."""
    found = parts.get("shared", {}) | parts["main"]
    for name, value in parts["aux"].items():
        layer, _, leaf = name.rpartition(".")
        found[f"{layer}.aux.{leaf}"] = value
    return found


def compare_step(step: Step, twin: Twin, result: Result, order: Tensor | None) -> None:
    """Gradients, running statistics, adversarial images and metrics of one step."""
    flat = step.network.flat
    fast = flat.named(flat.grad)
    slow = in_step_names(result.gradients)
    if twin.has_aux:
        assert fast.keys() == slow.keys()
    else:
        assert not any(fast[name].any() for name in fast if ".aux." in name)
    for name, value in slow.items():
        close(fast[name], value, f"gradient of {name}")
    state = step.network.model.state_dict()
    for name, value in in_step_names(twin.bn_state()).items():
        close(state[name], value, name)
    if result.adversarial is not None:
        made = result.adversarial if order is None else result.adversarial[order]
        assert torch.equal(step.adv.rows.images_255, made), "adversarial images"
    metrics = step.metrics.take(ONE_RANK)
    for kind, losses in result.losses.items():
        found = torch.tensor(metrics[f"loss_{kind}"], dtype=torch.float64)
        close(found, losses.double().sum(), f"loss of the {kind} rows")
        assert metrics[f"rows_{kind}"] == len(losses)
    assert metrics["steps"] == 1
    assert metrics["skipped"] == 0


def check(config: Config, net: type[nn.Module] = TinyResNet, steps: int = 5) -> None:
    """Everything after each of `steps` steps, weights included."""
    converted, plain = models(net)
    assert (stem_of(converted) is not None) == (net is not TinyNet)
    step = Step(converted, config)
    twin = Twin(plain, rules_of(config))
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
        if not twin.has_aux:
            continue
        for name, value in twin.aux.named_parameters():
            layer, _, leaf = name.rpartition(".")
            own = weights.get(f"{layer}.aux.{leaf}", weights[name])
            close(own.data, value.data, f"aux {name} after step {i}")
