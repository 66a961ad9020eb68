"""Reports made by hand, of results that nobody computed."""

from collections.abc import Mapping, Sequence

import numpy as np

from fap.config import Config, make_config
from fap.evaluate.published import SEVERITIES
from fap.evaluate.training import training_of
from fap.evaluate.work import Report
from fap.run_meta import run_meta
from fap.tasks import make_task
from fap.tasks.base import Result, Task
from pipelines.corrupt import NAMES
from tests.evaluate.world import tiny_config
from tests.hostile_meta import valid_meta

IMAGES = 1280  # of training


def result(top1: float = 0.5, count: int = 50) -> Result:
    return {"loss": 1.0, "top1": top1, "top5": 1.0, "ece": 0.1, "count": count}


def report_of(
    results: dict[str, Result],
    name: str = "tiny",
    step: int = 5,
    paper: Mapping[str, float] | None = None,
    small: bool = False,
    task: Task | None = None,
    seed: int = 0,
    config: Config | None = None,
    trained: bool = True,
    bn: str = "main",
) -> Report:
    """`trained`: by a run, of `config` but for name and seed; else they are weights alone."""
    config = config or tiny_config()
    own = {"name": name if name.isalnum() else "odd", "seed": seed}
    tree = valid_meta(make_config(config.model_dump() | own), step=step)
    tree["train"] = tree["train"] | {"count": IMAGES}
    meta = run_meta("x", tree | {"seconds": 100.0 + seed})
    return Report(
        task=task or make_task(tiny_config()),
        checkpoint=f"{name}.safetensors",
        name=name,
        seed=seed,
        step=step,
        paper=dict(paper or {}),
        small=small,
        settings={"data": "x", "bn": bn},
        labels=dict.fromkeys(results, "by name"),
        unused=[],
        results=results,
        training=training_of(meta) if trained else None,
    )


def complete(top1: float = 0.5) -> dict[str, Result]:
    """Every set of ImageNet-C."""
    results = {"clean": result(top1)}
    for name in NAMES:
        for severity in SEVERITIES:
            results[f"imagenet_c/{name}/{severity}"] = result(top1)
    return results


def plausible(
    rng: np.random.Generator, gain: float = 0.0, count: int = 50_000, *, attacks: bool = True
) -> dict[str, Result]:
    """What a seed of a ResNet-50 might reach, better by `gain` where images are not clean."""

    def about(top1: float, spread: float = 0.004) -> Result:
        top1 = float(np.clip(top1 + rng.normal(0, spread), 0, 1))
        return {**result(top1, count), "ece": 0.04 + 0.1 * (1 - top1), "loss": 4 * (1 - top1)}

    results = {"clean": about(0.765, 0.0015)}
    for number, name in enumerate(NAMES):
        for severity in SEVERITIES:
            top1 = 0.78 - 0.11 * severity - 0.01 * (number % 5) + gain
            results[f"imagenet_c/{name}/{severity}"] = about(top1)
    results["imagenet_r"] = about(0.36 + gain) | {"count": 30_000}
    results["imagenet_a"] = about(0.03 + gain / 2) | {"count": 7_500}
    results["stylized"] = about(0.075 + gain / 2)
    if attacks:
        for method, strength in (("fgsm", 0.12), ("pgd10", 0.25)):
            for eps in ("0.5", "1", "2", "4"):
                top1 = (0.75 + gain) * np.exp(-strength * 4 * float(eps))
                results[f"attack/{method}/{eps}"] = about(top1) | {"count": 1_000}
    return results


def seeds_of(
    name: str, gain: float, seeds: Sequence[int], config: Config | None = None, draw: int = 0
) -> list[Report]:
    """A plausible report for each seed; what the seeds have in common is the first clean image."""
    return [
        report_of(
            plausible(np.random.default_rng([draw, seed]), gain),
            name=name,
            seed=seed,
            config=config,
            step=500,
            paper={"top1": 76.5, "imagenet_c": 56.4},
        )
        for seed in seeds
    ]
