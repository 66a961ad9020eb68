"""Accuracy under attack: L-infinity, untargeted, on the model itself, in grey levels of 0..255."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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

MOST_STEPS = 10_000
MOST_EPS = 255  # grey levels: nothing of the image is left
FGSM = "fgsm"
PGD = re.compile(r"pgd([1-9][0-9]{0,5})")
STEP_OF_EPS = 2.5  # Madry et al. (2018): steps of 2.5 eps / K reach every corner of the ball
STARTS = 0x41544B53  # sets random starts apart from other draws of the same seed

Outputs = Callable[[Tensor], Tensor]
"""A model's outputs (B, classes) of images (B, 3, H, W) in grey levels."""


def nothing() -> None:
    """For whoever wants to hear of no progress."""


@dataclass(frozen=True)
class LinfAttack:
    """One attack at one strength."""

    method: str
    """fgsm, or pgd<K>."""
    eps_255: float
    """Radius of the ball, in grey levels."""
    steps: int
    step_255: float
    random_start: bool
    restarts: int
    """Attacks on each image, each from a random start of its own."""
    seed: int
    """Of what is random."""

    @property
    def key(self) -> str:
        """That of its set."""
        return f"attack/{self.method}/{number(self.eps_255)}"

    @property
    def words(self) -> str:
        """For the report: `10 steps of 1, 2 random starts`."""
        if not self.random_start:
            return f"{self.steps} step of eps, no random start"
        starts = "1 random start" if self.restarts == 1 else f"{self.restarts} random starts"
        return f"{self.steps} steps of {number(self.step_255)}, {starts}"

    @property
    def gradients(self) -> int:
        """Of each image."""
        return self.steps * self.restarts

    def origin(self) -> dict[str, Any]:
        """JSON: all that its result depends on."""
        return asdict(self)

    def candidates(
        self,
        outputs_of: Outputs,
        clean: Tensor,  # float32 (B, 3, H, W)
        labels: Tensor,  # int64 (B,): the model's, -1 for padding
        numbers: Tensor,  # int32 (B,): which image each row is
        after_step: Callable[[], Any] = nothing,
    ) -> Iterator[Tensor]:  # as `clean`
        """The attacked images of every restart."""
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


# ---------------------------------------------------------------------- what is asked for


def attacks_of(
    methods: Sequence[str],
    eps: Sequence[str],  # grey levels
    *,
    step: float | None,  # grey levels, of pgd; None: 2.5 eps / K
    restarts: int | None,  # of pgd; None: 1
    seed: int,
) -> tuple[LinfAttack, ...]:
    """Each method at each strength. Raises ValueError."""
    if not any(PGD.fullmatch(method) for method in methods):
        for option, given in (("--attack-step", step), ("--restarts", restarts)):
            if given is not None:
                raise ValueError(f"{option} is about pgd<K>, which --attack does not name")
    if step is not None and not 0 < step <= MOST_EPS:
        raise ValueError(f"--attack-step {step:g}: must be above 0 and at most {MOST_EPS}")
    if restarts is not None and restarts < 1:
        raise ValueError(f"--restarts {restarts}: must be at least 1")
    strengths = dict.fromkeys(_grey_levels(text) for text in eps)
    return tuple(
        _attack(method, eps_255, step, restarts or 1, seed)
        for method in dict.fromkeys(methods)
        for eps_255 in strengths
    )


def _grey_levels(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= MOST_EPS:
        raise ValueError(
            f"--eps {text}: must be grey levels, 0 to {MOST_EPS}; "
            "4 is what the literature writes as 4/255"
        )
    return value


def _attack(
    method: str, eps_255: float, step: float | None, restarts: int, seed: int
) -> LinfAttack:
    if method == FGSM:
        return LinfAttack(method, eps_255, 1, eps_255, random_start=False, restarts=1, seed=seed)
    found = PGD.fullmatch(method)
    if found is None:
        raise ValueError(f"--attack {method[:60]}: must be fgsm, or pgd<K> such as pgd10")
    steps = int(found[1])
    if steps > MOST_STEPS:
        raise ValueError(f"--attack {method}: must have at most {MOST_STEPS:,} steps")
    if step is None:
        step = STEP_OF_EPS * eps_255 / steps
    return LinfAttack(method, eps_255, steps, step, True, restarts, seed)


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
    with in_evaluation(model, bn):
        outputs_of = forward(model, mean=mean, std=std, device=device)
        for images, references, numbers in batches:
            clean = images.to(device).float()
            references = references.to(device)
            labels = as_the_models(references, label_map)
            attacked = attack.candidates(outputs_of, clean, labels, numbers.to(device), after_step)
            evaluator.update(worst(outputs_of, clean, labels, attacked), references)
    return evaluator.result()


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
