"""What the demo measures by itself: the cost of a run, accuracy under attack, and images to look
at.
"""

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipelines
from bench.common import alternate, ratio
from bench.demo_words import Cost
from bench.step import AMPS, GPU, Contestant
from fap.budget import budget
from fap.config import Config, DataConfig
from fap.evaluate.load import load_model
from fap.step.step import attack
from pipelines.sources.cifar10 import CLASSES

ATTACK_STEPS = 5
STEP_255 = 1.0
BATCH = 250  # images attacked at once


def cost(configs: Mapping[str, Config], images: int, rounds: int, block: int) -> Cost:
    """Blocks of `block` steps of the two arms `vanilla` and `fast_advprop` take turns in this
    process.

    Seconds per step times the steps of each run's budget over `images` training images. One batch
    is used again and
    again: loading and evaluation are left out, which are the same for both. Torch should have one
    thread, as in the runs.
    """
    pair = [
        Contestant(configs[arm], AMPS[0] if GPU else "off") for arm in ("fast_advprop", "vanilla")
    ]
    times = alternate([partial(seconds_per_step, c, block) for c in pair], rounds)
    ours, base = (t * budget(c.config, images).steps for t, c in zip(times, pair, strict=True))
    per_step = {c.config.method.name: float(t.mean()) for t, c in zip(times, pair, strict=True)}
    return Cost(**ratio(ours, base), seconds_per_step=per_step)


def seconds_per_step(contestant: Contestant, steps: int) -> float:
    """On a CPU seconds of the processor, which other programs of a busy machine lengthen less than
    those of a clock.
    """
    if GPU:
        return contestant.block(steps)[0]
    before = time.process_time()
    contestant.block(steps)
    return (time.process_time() - before) / steps


def first_images(file: Path, count: int, data: DataConfig) -> tuple[Tensor, Tensor]:
    """The first `count` test images, or all, as evaluation sees them: float32 (n, 3, H, W) in
    0..255; their labels.
    """
    with closing(pipelines.open_store(file)) as store:
        count = min(count, len(store))
        plan = pipelines.eval_plan(
            store.heights[:count],
            store.widths[:count],
            size=data.size,
            resize=data.resize,
            batch=count,
        )
        with closing(pipelines.open_loader("reference", store, size=data.size)) as loader:
            (batch,) = loader.load(plan)
            return batch.images.float(), batch.labels.clone()


def logits_of(model: nn.Module, images_255: Tensor, data: DataConfig) -> Tensor:
    """(B, classes), through the model's main norms: what `fap-eval` and a deployed model use."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (data.mean, data.std))
    return model(((images_255 - mean) / std).contiguous(memory_format=torch.channels_last))


def perturbed(
    model: nn.Module,
    images_255: Tensor,  # float32 (B, 3, H, W)
    labels: Tensor,  # int64 (B,)
    data: DataConfig,
    eps_255: float,
    step_255: float,
    steps: int,
) -> tuple[Tensor, Tensor]:  # both as images_255
    """The images with uniform noise within eps, and after `steps` steps from there against `model`."""
    key = torch.zeros(1, dtype=torch.int32)
    start = (images_255 + eps_255 * attack.uniform(key, images_255.shape)).clamp(0, 255)
    current = start
    for _ in range(steps):
        leaf = current.detach().requires_grad_()
        loss = F.cross_entropy(logits_of(model, leaf, data), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        current = attack.ascend(leaf.detach(), images_255, attack.sign(gradient), step_255, eps_255)
    return start, current


def adversarial_accuracy(checkpoint: Path, test: Path, count: int, eps_255: float) -> float:
    """Percent of the first `count` test images that are still right after PGD against the model
    itself.
    """
    trained = load_model(checkpoint)
    model, config = trained.model, trained.config
    images, labels = first_images(test, count, config.data)
    right = 0
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        _, worst = perturbed(model, x, y, config.data, eps_255, STEP_255, ATTACK_STEPS)
        with torch.inference_mode():
            right += int((logits_of(model, worst, config.data).argmax(1) == y).sum())
    return 100 * right / len(images)


@dataclass(frozen=True)
class Example:
    """One test image in three forms, uint8-like float (H, W, 3) in 0..255, and what the model calls
    each.
    """

    label: str
    images_255: tuple[Any, Any, Any]  # clean, with noise, adversarial
    called: tuple[str, str, str]


def examples(
    checkpoint: Path, test: Path, eps_255: float, count: int = 4, among: int = 100
) -> list[Example]:
    """The first `count` test images that the model gets right, made noisy and adversarial as the
    training makes its rows.
    """
    trained = load_model(checkpoint)
    model, config = trained.model, trained.config
    images, labels = first_images(test, among, config.data)
    with torch.inference_mode():
        right = logits_of(model, images, config.data).argmax(1) == labels
    at = right.nonzero().flatten()[:count]
    clean, labels = images[at], labels[at]
    forms = (clean, *perturbed(model, clean, labels, config.data, eps_255, eps_255, 1))
    with torch.inference_mode():
        called = [logits_of(model, form, config.data).argmax(1).tolist() for form in forms]
    shown = [form.permute(0, 2, 3, 1).numpy() for form in forms]
    return [
        Example(
            CLASSES[label],
            (shown[0][i], shown[1][i], shown[2][i]),
            (CLASSES[called[0][i]], CLASSES[called[1][i]], CLASSES[called[2][i]]),
        )
        for i, label in enumerate(labels.tolist())
    ]
