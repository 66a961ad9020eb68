"""Accuracy under attack: L-infinity, untargeted, on the model itself, in grey levels of 0..255."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fap.draws import avalanche, uniform
from fap.evaluate.exact import forward, in_evaluation
from fap.nets.norm import Bn
from fap.step.attack import ascend, sign
from fap.tasks.base import Evaluator, Result
from fap.tasks.class_counts import PADDING_LABEL, as_the_models, first_guesses

STARTS = 0x41544B53  # sets random starts apart from other draws of the same seed

Outputs = Callable[[Tensor], Tensor]
"""A model's outputs (B, classes) of images (B, 3, H, W) in grey levels."""


def nothing() -> None:
    """For whoever wants to hear of no progress."""


@dataclass(frozen=True)
class LinfAttack(ABC):
    """One attack at one strength."""

    method: str
    """fgsm, pgd<K> or autoattack."""
    eps_255: float
    """Radius of the ball, in grey levels."""
    seed: int
    """Of what is random."""
    fewest_classes = 2
    """Of a model that it can attack."""

    @property
    def key(self) -> str:
        """That of its set."""
        return f"attack/{self.method}/{number(self.eps_255)}"

    @property
    @abstractmethod
    def words(self) -> str:
        """What it is, for the report."""

    @property
    @abstractmethod
    def steps_of_a_batch(self) -> int | None:
        """How often `after_step` is called for each batch; None: that depends on the images."""

    def origin(self) -> dict[str, Any]:
        """JSON: all that its result depends on."""
        return asdict(self)

    @abstractmethod
    def candidates(
        self,
        outputs_of: Outputs,
        clean: Tensor,  # float32 (B, 3, H, W)
        labels: Tensor,  # int64 (B,): the model's, -1 for padding
        numbers: Tensor,  # int32 (B,): which image each row is
        after_step: Callable[[], Any] = nothing,
    ) -> Iterator[Tensor]:  # as `clean`
        """Attacked images, in the ball and in 0..255; of every restart."""


@dataclass(frozen=True)
class SignSteps(LinfAttack):
    """FGSM and PGD."""

    steps: int
    step_255: float
    random_start: bool
    restarts: int
    """Attacks on each image, each from a random start of its own."""

    @property
    def words(self) -> str:
        if not self.random_start:
            return f"{self.steps} step of eps, no random start"
        starts = "1 random start" if self.restarts == 1 else f"{self.restarts} random starts"
        of_eps = number(self.step_255 / self.eps_255) if self.eps_255 else "0"
        return f"{self.steps} steps of {of_eps} eps, {starts}"

    @property
    def steps_of_a_batch(self) -> int:
        return self.steps * self.restarts

    def candidates(
        self,
        outputs_of: Outputs,
        clean: Tensor,
        labels: Tensor,
        numbers: Tensor,
        after_step: Callable[[], Any] = nothing,
    ) -> Iterator[Tensor]:
        for restart in range(self.restarts):
            start = clean
            if self.random_start:
                keys = start_keys(self.seed, restart, numbers)
                start = random_start(clean, keys, self.eps_255)
            yield pgd(
                outputs_of,
                clean,
                labels,
                start,
                steps=self.steps,
                step_255=self.step_255,
                eps_255=self.eps_255,
                after_step=after_step,
            )


def number(value: float) -> str:
    """As a user writes it: 1, 0.5."""
    return f"{value:.10g}"


# ---------------------------------------------------------------------- the attack


def start_keys(
    seed: int,
    restart: int,
    numbers: Tensor,  # int32 (B,)
) -> Tensor:  # int32 (B,)
    """Of the random starts: functions of the image, whatever batch it is in."""
    (drawn,) = np.random.SeedSequence(seed, spawn_key=(STARTS, restart)).generate_state(1)
    return avalanche(numbers) ^ int(drawn.astype(np.int32))


def random_start(
    clean: Tensor,  # float32 (B, 3, H, W)
    keys: Tensor,  # int32 (B,)
    eps_255: float,
) -> Tensor:  # as `clean`
    """Evenly distributed in the ball, cut at the pixel range."""
    return torch.add(clean, uniform(keys, clean.shape), alpha=eps_255).clamp_(0, 255)


def pgd(
    outputs_of: Outputs,
    clean: Tensor,  # float32 (B, 3, H, W) grey levels, the centre of the ball
    labels: Tensor,  # int64 (B,), -1 for padding
    start: Tensor,  # as `clean`
    *,
    steps: int,
    step_255: float,
    eps_255: float,
    after_step: Callable[[], Any] = nothing,
) -> Tensor:  # as `clean`
    """Steps along the sign of the cross-entropy's gradient, each projected into the ball.

    Madry et al. (2018), section 2.1. It waits for nothing that the device computes.
    """
    current = start
    for _ in range(steps):
        leaf = current.detach().requires_grad_()
        with torch.enable_grad():
            loss = _losses(outputs_of(leaf), labels).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        current = ascend(leaf.detach(), clean, sign(gradient), step_255, eps_255)
        after_step()
    return current


def _losses(
    outputs: Tensor,  # (B, classes)
    labels: Tensor,  # int64 (B,), -1 for padding
) -> Tensor:  # float64 (B,), 0 for padding
    # In float64, as float32 has no gradient where the model is sure: 1 - p is then rounded to 0.
    return F.cross_entropy(outputs.double(), labels, ignore_index=PADDING_LABEL, reduction="none")


# ---------------------------------------------------------------------- what comes of it


def evaluate_attacked(
    model: nn.Module,  # on `device`
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],  # images, references and numbers of images
    evaluator: Evaluator,
    attack: LinfAttack,
    *,
    label_map: Tensor | None,  # int64 (K,): the model's class of each of the data's labels
    mean: Sequence[float],  # (3,), of pixels in 0..1
    std: Sequence[float],
    bn: Bn = "main",
    device: torch.device | str = "cpu",
    after_step: Callable[[], Any] = nothing,
) -> Result:
    """Evaluate `model` on the worst that the attack finds for each image, through the norms `bn`.

    `evaluator` sees the outputs of `worst`. Afterwards each module is in its former mode. Raises
    ValueError without images or without `bn`.
    """
    if label_map is not None:
        label_map = label_map.to(device)
    with in_evaluation(model, bn), _frozen(model):
        outputs_of = forward(model, mean=mean, std=std, device=device)
        for images, references, numbers in batches:
            clean = images.to(device).float()
            references = references.to(device)
            labels = as_the_models(references, label_map)
            attacked = attack.candidates(outputs_of, clean, labels, numbers.to(device), after_step)
            evaluator.update(worst(outputs_of, clean, labels, attacked), references)
    return evaluator.result()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block the weights take no gradients, which an attack has no use for."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def worst(
    outputs_of: Outputs,
    clean: Tensor,  # float32 (B, 3, H, W)
    labels: Tensor,  # int64 (B,)
    attacked: Iterable[Tensor],  # each as `clean`
) -> Tensor:  # (B, classes)
    """Each image's outputs where the model is wrong, else where its loss is largest.

    Clean or attacked: so an image is right only if it is right clean and after every attack.
    """
    with torch.no_grad():
        found = outputs_of(clean)
    for images in attacked:
        with torch.no_grad():
            outputs = outputs_of(images)
        is_worse = _is_worse(outputs, found, labels)
        found = torch.where(is_worse[:, None], outputs, found)
    return found


def _is_worse(
    outputs: Tensor,  # (B, classes)
    than: Tensor,  # (B, classes)
    labels: Tensor,  # int64 (B,)
) -> Tensor:  # bool (B,)
    wrong = first_guesses(outputs) != labels
    was_wrong = first_guesses(than) != labels
    more = _losses(outputs, labels) > _losses(than, labels)
    return (wrong & ~was_wrong) | ((wrong == was_wrong) & more)
