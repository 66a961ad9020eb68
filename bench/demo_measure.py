"""What the demo measures by itself: the cost of a run, accuracy under attack, images to look at.

A library of `bench.demo`; it writes nothing.
"""

import json
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import pipelines
from bench.common import alternate, ratio
from bench.contestants import AMPS, GPU, Contestant
from bench.demo_common import last_epoch
from bench.demo_words import Cost
from fap.budget import budget
from fap.config import Config
from fap.draws import uniform
from fap.evaluate.attacks import pgd
from fap.evaluate.load import load_model
from fap.sections import DataConfig
from pipelines.sources.cifar10 import CLASSES

ATTACK_STEPS = 5
STEP_255 = 1.0
BATCH = 250  # images attacked at once
SHOWN_EXAMPLES = 4
EXAMPLES_AMONG = 100  # test images


# ------------------------------------------------------------------ cost


def cost(configs: Mapping[str, Config], images: int, rounds: int, block: int) -> Cost:
    """Blocks of `block` steps of `vanilla` and of `fast_advprop` take turns in this process.

    Seconds per step times the steps of each run's budget over `images` training images. One batch
    is used again and again: loading and evaluation are left out, which are the same for both. Torch
    should have one thread, as in the runs.
    """
    amp = AMPS[0] if GPU else "off"
    ours = Contestant(configs["fast_advprop"], amp)
    vanilla = Contestant(configs["vanilla"], amp)

    def measure(contestant: Contestant) -> float:
        return seconds_per_step(contestant, block)

    our_seconds, base_seconds = alternate(measure, [ours, vanilla], rounds)
    our_run = our_seconds * budget(ours.config, images).steps
    base_run = base_seconds * budget(vanilla.config, images).steps
    per_step = {
        ours.config.method.name: float(our_seconds.mean()),
        vanilla.config.method.name: float(base_seconds.mean()),
    }
    return Cost(**ratio(our_run, base_run), seconds_per_step=per_step)


def seconds_per_step(contestant: Contestant, steps: int) -> float:
    """By the wall clock on a GPU, by the processor's on a CPU.

    Other programs of a busy machine lengthen the processor's seconds less.
    """
    if GPU:
        return contestant.block(steps)[0]
    before = time.process_time()
    contestant.block(steps)
    return (time.process_time() - before) / steps


# ------------------------------------------------------------------ what a run and fap-eval wrote


def summary(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """One run in numbers, accuracies in percent.

    `corruptions`, by name, are means over the severities.
    """
    result = json.loads((folder / "result.json").read_text())
    epoch = last_epoch(folder)
    by_name: dict[str, list[float]] = {}
    for key, found in report["results"].items():
        if key.startswith("computed/"):
            name = key.split("/")[1]
            by_name.setdefault(name, []).append(100 * found["top1"])
    corruptions = {name: fmean(values) for name, values in by_name.items()}
    train_adv = None  # of a method without adversarial rows
    if "epoch_acc_adv" in epoch:
        train_adv = 100 * epoch["epoch_acc_adv"]
    return {
        "seed": result["seed"],
        "clean": 100 * report["results"]["clean"]["top1"],
        "corrupted": fmean(corruptions.values()),
        "corruptions": corruptions,
        "train_clean": 100 * epoch["epoch_acc_clean"],
        "train_adv": train_adv,
        "steps": result["steps"],
        "image_passes": result["image_passes"],
        "seconds": result["seconds"],
    }


# ------------------------------------------------------------------ images and their attack


def first_images(
    file: Path, count: int, data: DataConfig
) -> tuple[Tensor, Tensor]:  # float32 (n, 3, H, W) in 0..255; int64 (n,)
    """The first `count` test images, or all, as evaluation sees them, and their labels."""
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
            labels = torch.from_numpy(plan.look_up(store.labels, padding=-1))
            return batch.images.float(), labels[batch.step]


def logits_of(model: nn.Module, images_255: Tensor, data: DataConfig) -> Tensor:
    """(B, classes), through the model's main norms: what `fap-eval` and a deployed model use."""
    mean = torch.tensor(data.mean).view(3, 1, 1) * 255
    std = torch.tensor(data.std).view(3, 1, 1) * 255
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
    """The images with uniform noise within eps, and after `steps` attack steps from there."""
    key = torch.zeros(1, dtype=torch.int32)
    noise = eps_255 * uniform(key, images_255.shape)
    start = (images_255 + noise).clamp(0, 255)
    worst = pgd(
        lambda x: logits_of(model, x, data),
        images_255,
        labels,
        start,
        steps=steps,
        step_255=step_255,
        eps_255=eps_255,
    )
    return start, worst


def adversarial_accuracy(checkpoint: Path, test: Path, count: int, eps_255: float) -> float:
    """Percent of the first `count` test images that are still right after PGD on the model."""
    trained = load_model(checkpoint)
    data = trained.config.data
    images, labels = first_images(test, count, data)
    right = 0
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        _, worst = perturbed(trained.model, x, y, data, eps_255, STEP_255, ATTACK_STEPS)
        with torch.inference_mode():
            called = logits_of(trained.model, worst, data).argmax(1)
        right += int((called == y).sum())
    return 100 * right / len(images)


# ------------------------------------------------------------------ examples


@dataclass(frozen=True)
class Example:
    """One test image in three forms, and what the model calls each."""

    label: str
    images_255: tuple[Any, Any, Any]  # clean, noisy, adversarial: float (H, W, 3) in 0..255
    called: tuple[str, str, str]


def examples(
    checkpoint: Path,
    test: Path,
    eps_255: float,
    count: int = SHOWN_EXAMPLES,
    among: int = EXAMPLES_AMONG,
) -> list[Example]:
    """The first `count` test images that the model gets right.

    Noisy and adversarial as training makes its rows.
    """
    trained = load_model(checkpoint)
    model = trained.model
    data = trained.config.data
    images, labels = first_images(test, among, data)
    with torch.inference_mode():
        right = logits_of(model, images, data).argmax(1) == labels
    at = right.nonzero().flatten()[:count]
    clean = images[at]
    labels = labels[at]
    noisy, adversarial = perturbed(model, clean, labels, data, eps_255, eps_255, steps=1)
    forms = (clean, noisy, adversarial)
    with torch.inference_mode():
        called = [logits_of(model, form, data).argmax(1).tolist() for form in forms]
    shown = [form.permute(0, 2, 3, 1).numpy() for form in forms]
    found = []
    for i, label in enumerate(labels.tolist()):
        images_255 = (shown[0][i], shown[1][i], shown[2][i])
        names = (CLASSES[called[0][i]], CLASSES[called[1][i]], CLASSES[called[2][i]])
        found.append(Example(CLASSES[label], images_255, names))
    return found
