"""The slow twin of `fap/step/step.py`: the same training step in the plainest PyTorch.

float64 on a CPU, no buffers, no fusing. Written from the paper (Algorithm 1, section 3.2.2) and
the project's semantics alone; it imports nothing of `fap`. Two ordinary models share every
parameter that is not a norm's. Each batch-norm group goes through its model alone, in training
mode, one forward and one backward per group. Everything random is an input.

Images are in grey levels of 0..255 throughout; they are normalised right before a forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

BN_MOMENTUM = 0.1
SGD_MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4

Kind = Literal["clean", "noise", "adv"]
Statistics = dict[str, tuple[Tensor, Tensor]]
"""Batch-norm layer -> mean and unbiased variance of a group."""


@dataclass(frozen=True)
class Rules:
    """What stays the same for a run."""

    method: Literal[
        "vanilla",
        "fast_advprop",
        "noise",
        "decoupled",
        "advprop",
        "adversarial_training",
        "fgsm_noise",
    ]
    clean_group_rows: int
    adv_group_rows: int = 0
    n_adv: int = 0
    pipelined: bool = False  # fast_advprop, noise: adversarial rows are trained a step later
    weights: tuple[float, float, float] = (1.0, 0.5, 0.5)  # of clean, noise, adversarial rows
    sync: bool = True
    one_set: bool = False  # of norms, for all rows
    combine: Literal["sum", "mean"] = "sum"
    eps_255: float = 1.0
    step_255: float = 1.0
    attack_steps: int = 1
    attack_bn: Literal["batch", "running"] = "batch"
    attack_loss: Literal["total", "cls", "box", "max"] = "total"
    label_smoothing: float = 0.0
    class_weights: Sequence[float] | None = None  # what a row's loss counts, by its label
    losses: Callable[[Tensor, Tensor, str], Tensor] | None = None
    """(outputs, targets, part of the loss) -> (rows,); None: cross-entropy on labels."""
    clip_norm: float | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Blend:
    """How one row is mixed."""

    how: Literal["mixup", "cutmix"]
    partner: int  # the row that it is mixed with
    lam: float  # weight of its own label
    box: tuple[int, int, int, int]  # top, left, bottom, right: what CutMix takes from the partner


@dataclass(frozen=True)
class Draws:
    """One step's input. The clean rows come first, then those to be attacked.

    Methods that attack copies of the clean rows (COPIES) get clean ones only.
    """

    images: Tensor  # uint8 (B, 3, H, W)
    labels: Tensor  # int64 (B,), or (B, ...) of another task
    pictures: Tensor | None = None  # bool (n_adv, 1, H, W): what may be attacked; None: all
    delta0: Tensor | None = None  # (n_adv, 3, H, W) grey levels, uniform in +-eps
    shuffle: Tensor | None = None  # int64 (n_adv,): new rows = rows[shuffle]; None: as they are
    target: Tensor | None = None  # int64 (n_adv,): labels that a targeted attack aims at
    direction: Tensor | None = None  # (n_adv, 3, H, W): random steps go along its sign
    other_target: Tensor | None = None  # as `target`: in place of the labels that are mixed in
    blends: Sequence[Blend | None] | None = None  # of each row; None: it is shown as it is


@dataclass(frozen=True)
class Result:
    """What a step found, before the optimiser spends it."""

    gradients: dict[str, dict[str, Tensor]]
    """Under "shared", "main" and "aux", by the parameter's name."""
    adversarial: Tensor | None
    """(n_adv, 3, H, W) grey levels, as crafted in this step, before any shuffle."""
    losses: dict[Kind, Tensor]
    """Of each row, in the order in which the rows were forwarded."""


@dataclass(frozen=True)
class Rows:
    """Rows of one kind, with what the network should say of them."""

    kind: Kind
    images: Tensor  # float64 (n, 3, H, W) grey levels
    labels: Tensor  # int64 (n,)
    other_labels: Tensor | None = None  # int64 (n,): of the images that are mixed in
    lam: Tensor | None = None  # float64 (n,): share of `labels`

    def __len__(self) -> int:
        return len(self.images)

    def at(self, rows: slice | Tensor) -> Rows:
        """Some of them."""
        images = self.images[rows]
        labels = self.labels[rows]
        if self.other_labels is None or self.lam is None:
            return Rows(self.kind, images, labels)
        return Rows(self.kind, images, labels, self.other_labels[rows], self.lam[rows])

    def turned_into(self, kind: Kind, images: Tensor) -> Rows:
        """Other images that should come to the same."""
        return replace(self, kind=kind, images=images)


COPIES = ("advprop", "adversarial_training")
RANDOM = ("noise", "fgsm_noise")
SINGLE_NORM = ("vanilla", "adversarial_training")


# ---------------------------------------------------------------------- the step


class Twin:
    """A model in training. `step`, then `optimise`, make one step of `fap.step.step.Step`."""

    def __init__(
        self,
        model: nn.Module,  # float64, with plain norms, which become the main ones
        rules: Rules,
    ) -> None:
        self.rules = rules
        self.main, self.aux = two_models(model)
        if rules.one_set:
            self.aux = self.main
        self.has_aux = rules.method not in SINGLE_NORM and not rules.one_set
        self.seen: list[Statistics] = []
        """`one_set`: of all groups of this step."""
        self.carry: Rows | None = None
        """`pipelined`: what the step before has crafted."""
        self.velocity: dict[nn.Parameter, Tensor] = {}

    def step(self, draws: Draws) -> Result:
        """Gradients and running statistics of one step; the weights stay until `optimise`."""
        self.main.zero_grad(set_to_none=True)
        self.aux.zero_grad(set_to_none=True)
        self.losses: dict[Kind, Tensor] = {}
        self.seen = []
        adversarial: Tensor | None = None
        match self.rules.method:
            case "vanilla":
                self._vanilla(draws)
            case "fast_advprop" | "noise":
                if self.rules.pipelined:
                    adversarial = self._fast_advprop_pipelined(draws)
                else:
                    adversarial = self._fast_advprop(draws)
            case "advprop" | "decoupled" | "fgsm_noise":
                adversarial = self._advprop(draws)
            case "adversarial_training":
                adversarial = self._adversarial_training(draws)
        if self.rules.one_set:
            move_running_statistics(self.main, self.seen)
        return Result(self._synchronised(), adversarial, self.losses)

    # ------------------------------------------------------------------ the methods

    def _vanilla(self, draws: Draws) -> None:
        clean = clean_rows(self.rules, draws)
        self.weights = weights_of(self.rules, n_clean=len(clean))
        self._train(self.main, [clean], self.rules.clean_group_rows)

    def _fast_advprop(self, draws: Draws) -> Tensor:
        """Algorithm 1: one backward of the noise rows trains, and gives the attack its sign."""
        clean = clean_rows(self.rules, draws)
        source = attacked_rows(self.rules, draws)
        self.weights = weights_of(self.rules, len(clean), n_noise=len(source), n_adv=len(source))
        noise = source.turned_into("noise", started(source.images, draws))

        self._train(self.main, [clean], self.rules.clean_group_rows)
        (gradient,) = self._train(self.aux, [noise], self.rules.adv_group_rows)
        direction = direction_of(self.rules, gradient, draws)
        adversarial = ascend(self.rules, noise.images, source.images, direction, draws)
        adv = source.turned_into("adv", adversarial)
        self._train(self.aux, [shuffled(adv, draws)], self.rules.adv_group_rows)
        return adversarial

    def _fast_advprop_pipelined(self, draws: Draws) -> Tensor:
        """The same, but the adversarial rows wait for the next step.

        There they share their groups with its noise rows. The first step has nothing to train yet:
        its own noise rows stand in.
        """
        clean = clean_rows(self.rules, draws)
        source = attacked_rows(self.rules, draws)
        self.weights = weights_of(self.rules, len(clean), n_noise=len(source), n_adv=len(source))
        noise = source.turned_into("noise", started(source.images, draws))
        carried = self.carry or noise.turned_into("adv", noise.images)

        self._train(self.main, [clean], self.rules.clean_group_rows)
        parts = [noise, shuffled(carried, draws)]
        gradient, _ = self._train(self.aux, parts, self.rules.adv_group_rows)
        direction = direction_of(self.rules, gradient, draws)
        adversarial = ascend(self.rules, noise.images, source.images, direction, draws)
        self.carry = source.turned_into("adv", adversarial)
        return adversarial

    def _advprop(self, draws: Draws) -> Tensor:
        """AdvProp, decoupled training, FGSM noise: an attack of its own, then training."""
        clean = clean_rows(self.rules, draws)
        source = attacked_rows(self.rules, draws)
        self.weights = weights_of(self.rules, len(clean), n_adv=len(source))
        if self.rules.method in RANDOM:
            direction = direction_of(self.rules, None, draws)
            start = started(source.images, draws)
            adversarial = ascend(self.rules, start, source.images, direction, draws)
        else:
            adversarial = pgd(self.rules, self.aux, source, draws)

        self._train(self.main, [clean], self.rules.clean_group_rows)
        adv = source.turned_into("adv", adversarial)
        self._train(self.aux, [shuffled(adv, draws)], self.rules.adv_group_rows)
        return adversarial

    def _adversarial_training(self, draws: Draws) -> Tensor:
        """Madry et al.: nothing but adversarial rows, through the only norms there are."""
        source = attacked_rows(self.rules, draws)
        self.weights = weights_of(self.rules, n_adv=len(source))
        adversarial = pgd(self.rules, self.main, source, draws)
        adv = source.turned_into("adv", adversarial)
        self._train(self.main, [adv], self.rules.adv_group_rows)
        return adversarial

    # ------------------------------------------------------------------ what they share

    def _train(self, model: nn.Module, parts: Sequence[Rows], group_rows: int) -> list[Tensor]:
        """Forward and backward of each batch-norm group alone: so many rows of every part.

        Returns each part's input gradient in grey levels, of the sum over its rows of factor x
        loss. The running statistics move once, by the mean over the groups; those of `one_set` at
        the end of the step, by the mean over all of its groups.
        """
        inputs = [part.images.clone().requires_grad_() for part in parts]
        losses: dict[Kind, list[Tensor]] = {part.kind: [] for part in parts}
        seen: list[Statistics] = []
        for start in range(0, len(parts[0]), group_rows):
            rows = slice(start, start + group_rows)
            grey = torch.cat([images[rows] for images in inputs])
            logits, statistics = forward_alone(model, normalise(self.rules, grey))
            seen.append(statistics)
            loss = logits.new_zeros(())
            for part, own_logits in zip(parts, logits.split(group_rows), strict=True):
                of_rows = losses_of(self.rules, part.at(rows), own_logits)
                losses[part.kind].append(of_rows.detach())
                loss = loss + self.weights.factor[part.kind] * of_rows.sum()
            loss.backward()
        for kind, of_groups in losses.items():
            self.losses[kind] = torch.cat(of_groups)
        if self.rules.one_set:
            self.seen += seen
        else:
            move_running_statistics(model, seen)
        return [images.grad for images in inputs if images.grad is not None]

    def _synchronised(self) -> dict[str, dict[str, Tensor]]:
        """Multiply the gradients by their part's speed; returns copies."""
        found: dict[str, dict[str, Tensor]] = {"shared": {}, "main": {}, "aux": {}}
        for part, name, parameter in self._parameters():
            assert parameter.grad is not None
            parameter.grad *= self.weights.speed[part]
            found[part][name] = parameter.grad.clone()
        return found

    def _parameters(self) -> list[tuple[str, str, nn.Parameter]]:
        """Part, name and parameter of all that is trained."""
        found = []
        for name, parameter in self.main.named_parameters():
            part = "main" if is_norm_parameter(self.main, name) else "shared"
            found.append((part, name, parameter))
        if self.has_aux:
            for name, parameter in self.aux.named_parameters():
                if is_norm_parameter(self.aux, name):
                    found.append(("aux", name, parameter))
        return found

    @torch.no_grad()
    def optimise(self, lr: float) -> None:
        """SGD with momentum and weight decay on every parameter, the norms' included.

        A gradient of all parameters that is longer than `clip_norm` is shortened to it before.
        """
        if self.rules.clip_norm is not None:
            gradients = [parameter.grad for _, _, parameter in self._parameters()]
            norm = sum(gradient.square().sum() for gradient in gradients) ** 0.5
            for gradient in gradients:
                gradient *= min(1.0, self.rules.clip_norm / norm.item())
        for _, _, parameter in self._parameters():
            assert parameter.grad is not None
            gradient = parameter.grad + WEIGHT_DECAY * parameter
            before = self.velocity.get(parameter, torch.zeros_like(parameter))
            self.velocity[parameter] = SGD_MOMENTUM * before + gradient
            parameter.sub_(lr * self.velocity[parameter])

    def bn_state(self) -> dict[str, dict[str, Tensor]]:
        """Running means and variances, under "main" and "aux", by layer and name."""
        found: dict[str, dict[str, Tensor]] = {"main": {}, "aux": {}}
        for which, model in (("main", self.main), ("aux", self.aux)):
            if which == "aux" and self.aux is self.main:
                continue
            for layer, bn in bn_layers(model).items():
                found[which][f"{layer}.running_mean"] = bn.running_mean.clone()
                found[which][f"{layer}.running_var"] = bn.running_var.clone()
        return found


# ---------------------------------------------------------------------- rows


def clean_rows(rules: Rules, draws: Draws) -> Rows:
    return loaded_rows(draws, 0, n_clean_of(rules, draws), "clean")


def attacked_rows(rules: Rules, draws: Draws) -> Rows:
    """What is attacked: rows of its own, or every clean row."""
    first = n_clean_of(rules, draws)
    if rules.method in COPIES:
        first = 0
    return loaded_rows(draws, first, len(draws.images), "adv")


def n_clean_of(rules: Rules, draws: Draws) -> int:
    if rules.method in COPIES:
        return len(draws.images)
    return len(draws.images) - rules.n_adv


def loaded_rows(draws: Draws, first: int, stop: int, kind: Kind) -> Rows:
    """Some of the rows of a step, each mixed if the step mixes it."""
    images = draws.images[first:stop].double()
    labels = draws.labels[first:stop]
    if draws.blends is None:
        return Rows(kind, images, labels)
    mixed = []
    others = []
    lam = []
    for row in range(first, stop):
        blend = draws.blends[row]
        image = draws.images[row].double()
        if blend is None:
            return Rows(kind, images, labels)
        mixed.append(blended(image, draws.images[blend.partner].double(), blend))
        others.append(draws.labels[blend.partner])
        lam.append(blend.lam)
    return Rows(kind, torch.stack(mixed), labels, torch.stack(others), torch.tensor(lam).double())


def blended(own: Tensor, other: Tensor, blend: Blend) -> Tensor:  # (3, H, W) each
    if blend.how == "mixup":
        return blend.lam * own + (1 - blend.lam) * other
    top, left, bottom, right = blend.box
    pasted = own.clone()
    pasted[:, top:bottom, left:right] = other[:, top:bottom, left:right]
    return pasted


def shuffled(rows: Rows, draws: Draws) -> Rows:
    """Adversarial rows in the order in which they are trained (shuffling BN)."""
    if draws.shuffle is None:
        return rows
    return rows.at(draws.shuffle)


# ---------------------------------------------------------------------- weights (section 3.2.2)


@dataclass(frozen=True)
class Weights:
    """What a row's loss counts, and what the gradients are multiplied by after all passes."""

    factor: dict[Kind, float]
    speed: dict[str, float]  # of the "shared", "main" and "aux" parameters


def weights_of(rules: Rules, n_clean: int = 0, n_noise: int = 0, n_adv: int = 0) -> Weights:
    """The loss of a step is the sum of w l / W over its rows, with W the sum of w.

    That is 80 for 64 clean rows at 1, 16 noise and 16 adversarial ones at 1/2. The shared
    parameters get gradients from all of W, the norms from some of it. Update-speed synchronisation
    (`sync`) makes up for it.
    """
    n_rows: dict[Kind, int] = {"clean": n_clean, "noise": n_noise, "adv": n_adv}
    weight: dict[Kind, float] = dict(zip(n_rows, rules.weights, strict=True))
    reached = {kind: weight[kind] * n_rows[kind] for kind in n_rows}
    total = sum(reached.values())
    factor: dict[Kind, float] = {}
    for kind, n in n_rows.items():
        if rules.combine == "sum":
            factor[kind] = weight[kind] / total
        elif n:
            # Algorithm 1 to the letter: the sum of means, g_clean + beta g_noise + beta g_adv.
            factor[kind] = weight[kind] / n
    speed = {"shared": 1.0, "main": 1.0, "aux": 1.0}
    if rules.sync:
        assert rules.combine == "sum"
        speed["main"] = total / reached["clean"]
        if rules.one_set:
            speed["main"] = 1.0
        elif n_noise + n_adv:
            speed["aux"] = total / (reached["noise"] + reached["adv"])
    return Weights(factor, speed)


# ---------------------------------------------------------------------- losses


def normalise(rules: Rules, grey: Tensor) -> Tensor:
    mean = torch.tensor(rules.mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(rules.std, dtype=torch.float64).view(3, 1, 1)
    return (grey / 255 - mean) / std


def losses_of(rules: Rules, rows: Rows, outputs: Tensor, part: str = "total") -> Tensor:
    """(rows,). Mixed ones count both labels: lam of one, 1 - lam of the other."""
    losses = losses_to(rules, outputs, rows.labels, part)
    if rows.other_labels is None:
        return losses
    other_losses = losses_to(rules, outputs, rows.other_labels, part)
    return rows.lam * losses + (1 - rows.lam) * other_losses


def losses_to(rules: Rules, outputs: Tensor, targets: Tensor, part: str = "total") -> Tensor:
    """Of each row, (rows,): the task's loss, or a part of it."""
    if rules.losses is not None:
        return rules.losses(outputs, targets, part)
    return cross_entropy(rules, outputs, targets)


def cross_entropy(rules: Rules, logits: Tensor, labels: Tensor) -> Tensor:
    """(1 - s) x that of the label + s x its mean over the classes, s the smoothing; (rows,).

    All of it times the weight of the label.
    """
    log_p = logits.log_softmax(1)
    of_label = log_p[torch.arange(len(labels)), labels]
    losses = -(1 - rules.label_smoothing) * of_label - rules.label_smoothing * log_p.mean(1)
    if rules.class_weights is None:
        return losses
    weights = [rules.class_weights[label] for label in labels.tolist()]
    return torch.tensor(weights, dtype=torch.float64) * losses


# ---------------------------------------------------------------------- the attack


def started(x: Tensor, draws: Draws) -> Tensor:
    """The images at the start of the attack; what is no picture stays as it is."""
    assert draws.delta0 is not None
    delta = draws.delta0.double()
    if draws.pictures is not None:
        delta = delta * draws.pictures
    return x + delta


def direction_of(rules: Rules, gradient: Tensor | None, draws: Draws) -> Tensor:
    """The gradient's sign, or a random one."""
    if rules.method in RANDOM:
        gradient = draws.direction
    assert gradient is not None
    return sign(gradient)


def sign(gradient: Tensor) -> Tensor:
    """Of what is not finite: 0."""
    return torch.where(gradient.isfinite(), gradient.sign(), 0.0)


def ascend(rules: Rules, current: Tensor, x: Tensor, direction: Tensor, draws: Draws) -> Tensor:
    """One step, projected into the ball of radius eps around x and into 0..255."""
    if draws.pictures is not None:
        direction = direction * draws.pictures
    step_255 = max(rules.step_255, rules.eps_255 / rules.attack_steps)
    moved = current + step_255 * direction
    near = torch.minimum(torch.maximum(moved, x - rules.eps_255), x + rules.eps_255)
    return near.clamp(0, 255)


def pgd(rules: Rules, model: nn.Module, source: Rows, draws: Draws) -> Tensor:
    """The images of an attack of its own.

    No parameter gets a gradient, no running statistics move. `attack_loss: max` (Det-AdvProp) makes
    an image from each part of the loss, and keeps the one whose total loss is larger.
    """
    if rules.attack_loss != "max":
        return pgd_on(rules, model, source, draws, rules.attack_loss)
    candidates = [pgd_on(rules, model, source, draws, part) for part in ("cls", "box")]
    with torch.no_grad():
        losses = [
            losses_at(rules, model, source.turned_into("adv", images), "total")
            for images in candidates
        ]
    rows = []
    for i in range(len(source)):
        worse = int(losses[1][i] > losses[0][i])
        rows.append(candidates[worse][i])
    return torch.stack(rows)


def pgd_on(rules: Rules, model: nn.Module, source: Rows, draws: Draws, part: str) -> Tensor:
    """K projected sign steps away from the labels, or towards targets in their place."""
    current = started(source.images, draws)
    aim = source
    away = 1
    if draws.target is not None:
        aim = replace(source, labels=draws.target)
        away = -1
        if source.other_labels is not None:
            aim = replace(aim, other_labels=draws.other_target)
    for _ in range(rules.attack_steps):
        leaf = current.clone().requires_grad_()
        loss = losses_at(rules, model, aim.turned_into("adv", leaf), part).sum()
        direction = away * sign(torch.autograd.grad(loss, leaf)[0])
        current = ascend(rules, current, source.images, direction, draws)
    return current


def losses_at(rules: Rules, model: nn.Module, rows: Rows, part: str) -> Tensor:
    """Of each row, each group alone; (rows,)."""
    losses = []
    n = rules.adv_group_rows
    for start in range(0, len(rows), n):
        group = rows.at(slice(start, start + n))
        if rules.attack_bn == "batch":
            outputs, _ = forward_alone(model, normalise(rules, group.images))
        else:
            outputs = model.eval()(normalise(rules, group.images))
        losses.append(losses_of(rules, group, outputs, part))
    return torch.cat(losses)


# ---------------------------------------------------------------------- models and norms


def two_models(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """`model`, and a copy with norms of its own whose other parameters are `model`'s."""
    aux = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if not is_norm_parameter(model, name):
            owner, _, leaf = name.rpartition(".")
            setattr(aux.get_submodule(owner), leaf, parameter)
    for bn in [*bn_layers(model).values(), *bn_layers(aux).values()]:
        bn.momentum = 0.0  # forwards leave the running statistics alone: the step moves them
    return model, aux


NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _InstanceNorm)


def bn_layers(model: nn.Module) -> dict[str, Any]:
    """The batch norms of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def is_norm_parameter(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), NORMS)


def forward_alone(model: nn.Module, x: Tensor) -> tuple[Tensor, Statistics]:
    """Logits of one group in training mode, and the statistics that each norm has found."""
    seen: Statistics = {}

    def look_at(name: str, bn: _BatchNorm) -> Any:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0].detach().transpose(0, 1).flatten(1)  # (C, all that a channel has)
            seen[name] = (values.mean(1), values.var(1, unbiased=True))

        return bn.register_forward_pre_hook(look)

    hooks = [look_at(name, bn) for name, bn in bn_layers(model).items()]
    logits = model.train()(x)
    for hook in hooks:
        hook.remove()
    return logits, seen


def move_running_statistics(model: nn.Module, seen: Sequence[Statistics]) -> None:
    """One exponential average of the mean over the groups."""
    for name, bn in bn_layers(model).items():
        mean = torch.stack([statistics[name][0] for statistics in seen]).mean(0)
        var = torch.stack([statistics[name][1] for statistics in seen]).mean(0)
        bn.running_mean = (1 - BN_MOMENTUM) * bn.running_mean + BN_MOMENTUM * mean
        bn.running_var = (1 - BN_MOMENTUM) * bn.running_var + BN_MOMENTUM * var
