"""The slow twin of `fap/step/step.py`: the same training step in the plainest PyTorch, float64 on a CPU.

Written from the paper (Algorithm 1, section 3.2.2) and the project's semantics alone; it imports
nothing of `fap`. Two ordinary models share every parameter that is not batch norm's; each
batch-norm group goes through the network alone, in train mode, one forward and one backward per
group. Everything random is an input.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

BN_MOMENTUM, SGD_MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4


@dataclass(frozen=True)
class Draws:
    """One step's input. Rows [0, n_clean) are clean, the rest adversarial.

    Where adversarial rows are copies (COPIES) there are clean ones only.
    """

    images: Tensor  # uint8 (B, 3, H, W)
    labels: Tensor  # int64 (B,)
    delta0: Tensor | None = None  # (n_adv, 3, H, W) grey levels, uniform in +-eps
    shuffle: Tensor | None = None  # int64 (n_adv,): new_rows = rows[shuffle]; None = as they are
    target: Tensor | None = None  # int64 (n_adv,): labels that a targeted attack aims at
    direction: Tensor | None = None  # (n_adv, 3, H, W): random steps go along its sign
    mix: Literal["mixup", "cutmix"] | None = None
    lam: float = 1.0  # weight of a clean row's own label
    box: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right: of the partner
    partner: Tensor | None = None  # int64 (n_clean,)


RECYCLING = ("fast_advprop", "noise")
COPIES = ("advprop", "adversarial_training")
RANDOM = ("noise", "fgsm_noise")


@dataclass(frozen=True)
class Rules:
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
    adv_group_rows: int = 0  # rows of one auxiliary BN group
    n_adv: int = 0
    pipelined: bool = False  # fast_advprop, noise: one pass, adversarial rows trained a step later
    weights: tuple[float, float, float] = (1.0, 0.5, 0.5)  # clean, noise, adversarial
    sync: bool = True
    combine: Literal["sum", "mean"] = "sum"
    eps_255: float = 1.0
    step_255: float = 1.0
    attack_steps: int = 1
    attack_bn: Literal["batch", "running"] = "batch"
    label_smoothing: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Result:
    gradients: dict[str, dict[str, Tensor]]
    """"shared" | "main" | "aux" -> parameter name -> gradient."""
    adversarial: Tensor | None
    """(n_adv, 3, H, W) grey levels, as crafted in this step, before any shuffle."""
    losses: dict[str, Tensor]
    """Kind -> per-example losses, in the order in which the rows were forwarded."""


@dataclass
class Rows:
    """Rows of one kind on their way through one of the two models, cut into BN groups."""

    kind: str
    images: Tensor  # float64 (n, 3, H, W) grey levels
    labels: Tensor
    other_labels: Tensor | None = None
    lam: float = 1.0


def bn_modules(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def is_bn_parameter(model: nn.Module, name: str) -> bool:
    return name.rpartition(".")[0] in bn_modules(model)


def two_models(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """`model` itself and a copy with batch-norm layers of its own whose other parameters are
    `model`'s.
    """
    aux = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if not is_bn_parameter(model, name):
            owner, _, leaf = name.rpartition(".")
            setattr(aux.get_submodule(owner), leaf, parameter)
    return model, aux


@dataclass
class Twin:
    model: nn.Module  # float64, plain nn.BatchNorm2d; becomes the main-BN model
    rules: Rules
    carry: tuple[Tensor, Tensor] | None = None  # `pipelined`: images and labels of step t-1

    def __post_init__(self) -> None:
        self.main, self.aux = two_models(self.model)
        self.has_aux = self.rules.method not in ("vanilla", "adversarial_training")
        self.velocity: dict[int, Tensor] = {}

    # ------------------------------------------------------------------ the step

    def step(self, draws: Draws) -> Result:
        """Gradients and running statistics of one step; the weights stay until `optimise`."""
        rules = self.rules
        for model in (self.main, self.aux):
            model.zero_grad(set_to_none=True)
        self.losses: dict[str, Tensor] = {}
        n_clean = len(draws.images)
        if rules.method not in COPIES:
            n_clean -= rules.n_adv
        clean = self._mix_clean(draws, n_clean)
        adversarial = None

        if rules.method == "vanilla":
            self._count(n_clean, 0, 0)
            self._train(self.main, [clean], rules.clean_group_rows)

        elif rules.method in RECYCLING:
            x, labels = self._attacked_rows(draws, n_clean)
            self._count(n_clean, len(x), len(x))
            noise = x + self._delta0(draws)
            parts = [Rows("noise", noise, labels)]
            if rules.pipelined:  # the first step has nothing to carry
                parts.append(self._shuffled("adv", *(self.carry or (noise, labels)), draws))
            self._train(self.main, [clean], rules.clean_group_rows)
            gradient = self._train(self.aux, parts, rules.adv_group_rows)[0]
            if rules.method in RANDOM:
                assert draws.direction is not None
                gradient = draws.direction
            adversarial = self._project(x, noise + self._step_size() * self._sign(gradient))
            self.carry = (adversarial, labels)
            if not rules.pipelined:
                self._train(
                    self.aux,
                    [self._shuffled("adv", adversarial, labels, draws)],
                    rules.adv_group_rows,
                )

        elif rules.method == "adversarial_training":  # Madry et al.: nothing else, one set of norms
            x, labels = self._attacked_rows(draws, n_clean)
            self._count(0, 0, len(x))
            adversarial = self._pgd(self.main, x, labels, draws)
            self._train(self.main, [Rows("adv", adversarial, labels)], rules.clean_group_rows)

        else:  # decoupled, advprop, fgsm_noise: an attack without reuse, then one training pass
            x, labels = self._attacked_rows(draws, n_clean)
            self._count(n_clean, 0, len(x))
            if rules.method in RANDOM:
                assert draws.direction is not None
                step = self._step_size() * self._sign(draws.direction)
                adversarial = self._project(x, x + self._delta0(draws) + step)
            else:
                adversarial = self._pgd(self.aux, x, labels, draws)
            self._train(self.main, [clean], rules.clean_group_rows)
            self._train(
                self.aux, [self._shuffled("adv", adversarial, labels, draws)], rules.adv_group_rows
            )

        return Result(self._synchronised(), adversarial, self.losses)

    def _attacked_rows(self, draws: Draws, n_clean: int) -> tuple[Tensor, Tensor]:
        first = n_clean
        if self.rules.method in COPIES:  # of every clean row, unmixed
            first = 0
        return draws.images[first:].double(), draws.labels[first:]

    def _mix_clean(self, draws: Draws, n_clean: int) -> Rows:
        images, labels = draws.images[:n_clean].double(), draws.labels[:n_clean]
        if draws.mix is None:
            return Rows("clean", images, labels)
        partner = draws.partner
        if draws.mix == "mixup":
            mixed = draws.lam * images + (1 - draws.lam) * images[partner]
        else:
            top, left, bottom, right = draws.box
            mixed = images.clone()
            mixed[:, :, top:bottom, left:right] = images[partner][:, :, top:bottom, left:right]
        return Rows("clean", mixed, labels, labels[partner], draws.lam)

    def _shuffled(self, kind: str, images: Tensor, labels: Tensor, draws: Draws) -> Rows:
        order = torch.arange(len(images)) if draws.shuffle is None else draws.shuffle
        return Rows(kind, images[order], labels[order])

    # ------------------------------------------------------------------ weights (semantics: shared parameters' gradient, β, update-speed sync)

    def _count(self, clean: int, noise: int, adv: int) -> None:
        """Fix each example's factor in the loss, and how much weight reaches the shared, main and
        aux parameters.
        """
        n = {"clean": clean, "noise": noise, "adv": adv}
        w = dict(zip(n, self.rules.weights, strict=True))
        total = sum(w[kind] * n[kind] for kind in n)
        if self.rules.combine == "mean":
            # Algorithm 1 to the letter: g_clean + β g_noise + β g_adv of means.
            self.factor = {kind: w[kind] / n[kind] if n[kind] else 0.0 for kind in n}
        else:
            self.factor = {kind: w[kind] / total for kind in n}
        self.speed = {"shared": 1.0, "main": 1.0, "aux": 1.0}
        if self.rules.sync:
            assert self.rules.combine == "sum"
            self.speed["main"] = total / (w["clean"] * clean)
            if noise + adv:
                self.speed["aux"] = total / (w["noise"] * noise + w["adv"] * adv)

    def _synchronised(self) -> dict[str, dict[str, Tensor]]:
        out: dict[str, dict[str, Tensor]] = {"shared": {}, "main": {}, "aux": {}}
        for name, parameter in self.main.named_parameters():
            out["main" if is_bn_parameter(self.main, name) else "shared"][name] = parameter
        for name, parameter in self.aux.named_parameters():
            if is_bn_parameter(self.aux, name) and self.has_aux:
                out["aux"][name] = parameter
        for part, parameters in out.items():
            for parameter in parameters.values():
                assert parameter.grad is not None
                parameter.grad *= self.speed[part]
        return {part: {n: p.grad.clone() for n, p in ps.items()} for part, ps in out.items()}

    # ------------------------------------------------------------------ passes

    def _normalise(self, grey: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(v, dtype=torch.float64).view(3, 1, 1)
            for v in (self.rules.mean, self.rules.std)
        )
        return (grey / 255 - mean) / std

    def _example_losses(self, logits: Tensor, rows: Rows) -> Tensor:
        """(1 - s) x cross-entropy of the label + s x mean cross-entropy over the classes, per
        example.
        """
        log_p, s = logits.log_softmax(1), self.rules.label_smoothing

        def of(labels: Tensor) -> Tensor:
            return -(1 - s) * log_p[torch.arange(len(labels)), labels] - s * log_p.mean(1)

        if rows.other_labels is None:
            return of(rows.labels)
        return rows.lam * of(rows.labels) + (1 - rows.lam) * of(rows.other_labels)

    def _train(self, model: nn.Module, parts: Sequence[Rows], group: int) -> list[Tensor]:
        """Forward and backward of each BN group alone: `group` rows of every part. One
        running-statistics average.

        Returns each part's input gradient in grey levels (the sum over examples of factor x loss).
        """
        inputs = [part.images.clone().requires_grad_() for part in parts]
        statistics, losses = [], {part.kind: [] for part in parts}
        for start in range(0, len(parts[0].images), group):
            rows = slice(start, start + group)
            logits, seen = forward_alone(
                model, self._normalise(torch.cat([x[rows] for x in inputs]))
            )
            statistics.append(seen)
            loss = logits.new_zeros(())
            for part, out in zip(parts, logits.split(group), strict=True):
                other = None if part.other_labels is None else part.other_labels[rows]
                each = self._example_losses(
                    out, Rows(part.kind, out, part.labels[rows], other, part.lam)
                )
                losses[part.kind].append(each.detach())
                loss = loss + self.factor[part.kind] * each.sum()
            loss.backward()
        self.losses |= {kind: torch.cat(each) for kind, each in losses.items()}
        for layer, bn in bn_modules(model).items():
            mean = torch.stack([seen[layer][0] for seen in statistics]).mean(0)
            var = torch.stack([seen[layer][1] for seen in statistics]).mean(0)
            bn.running_mean = (1 - BN_MOMENTUM) * bn.running_mean + BN_MOMENTUM * mean
            bn.running_var = (1 - BN_MOMENTUM) * bn.running_var + BN_MOMENTUM * var
        return [x.grad for x in inputs]

    # ------------------------------------------------------------------ the attack, in grey levels of 0..255

    def _delta0(self, draws: Draws) -> Tensor:
        assert draws.delta0 is not None
        return draws.delta0.double()

    def _step_size(self) -> float:
        return max(self.rules.step_255, self.rules.eps_255 / self.rules.attack_steps)

    def _sign(self, g: Tensor) -> Tensor:
        return torch.where(torch.isfinite(g), torch.sign(g), torch.zeros_like(g))

    def _project(self, x: Tensor, candidate: Tensor) -> Tensor:
        near = torch.minimum(
            torch.maximum(candidate, x - self.rules.eps_255), x + self.rules.eps_255
        )
        return near.clamp(0, 255)

    def _pgd(self, model: nn.Module, x: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """K projected sign steps; no parameter gradient, no running statistics."""
        target, towards = (labels, 1.0) if draws.target is None else (draws.target, -1.0)
        current = x + self._delta0(draws)
        for _ in range(self.rules.attack_steps):
            pieces = []
            for start in range(0, len(x), self.rules.adv_group_rows):
                rows = slice(start, start + self.rules.adv_group_rows)
                grey = current[rows].clone().requires_grad_()
                if self.rules.attack_bn == "batch":
                    logits, _ = forward_alone(model, self._normalise(grey))
                else:
                    logits = model.eval()(self._normalise(grey))
                loss = self._example_losses(logits, Rows("attack", grey, target[rows])).sum()
                pieces.append(torch.autograd.grad(loss, grey)[0])
            direction = towards * self._sign(torch.cat(pieces))
            current = self._project(x, current + self._step_size() * direction)
        return current

    # ------------------------------------------------------------------ the optimiser

    def optimise(self, lr: float) -> None:
        """SGD, momentum 0.9, weight decay 1e-4 on every parameter, batch norm's included."""
        parameters = {id(p): p for model in (self.main, self.aux) for p in model.parameters()}
        with torch.no_grad():
            for key, p in parameters.items():
                if p.grad is not None:
                    g = p.grad + WEIGHT_DECAY * p
                    self.velocity[key] = (
                        SGD_MOMENTUM * self.velocity.get(key, torch.zeros_like(p)) + g
                    )
                    p -= lr * self.velocity[key]

    def bn_state(self) -> dict[str, dict[str, Tensor]]:
        """ "main" | "aux" -> "layer.running_mean" | "layer.running_var" -> value."""
        return {
            which: {
                f"{layer}.{name}": getattr(bn, name).clone()
                for layer, bn in bn_modules(model).items()
                for name in ("running_mean", "running_var")
            }
            for which, model in (("main", self.main), ("aux", self.aux))
        }


def forward_alone(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Logits in train mode, and each BN layer's batch mean and unbiased variance; running
    statistics untouched.
    """
    model.train()
    layers = bn_modules(model)
    kept = {name: (bn.running_mean, bn.running_var, bn.momentum) for name, bn in layers.items()}
    for bn in layers.values():
        # With momentum 1 a plain BN layer leaves exactly this group's statistics in its buffers.
        bn.running_mean, bn.running_var = (
            torch.zeros_like(bn.running_mean),
            torch.ones_like(bn.running_var),
        )
        bn.momentum = 1.0
    logits = model(x)
    seen = {name: (bn.running_mean, bn.running_var) for name, bn in layers.items()}
    for name, bn in layers.items():
        bn.running_mean, bn.running_var, bn.momentum = kept[name]
    return logits, seen
