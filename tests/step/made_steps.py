"""Small steps of a ResNet-8, ready to run, with what tests do to them: feed, clone, poison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fap.config import make_config
from fap.methods import METHODS
from fap.nets.build import build
from fap.step.half import Amp
from fap.step.step import Step

SCHEDULES = ("sequential", "fused", "pipelined", "parallel")
VARIANTS = (*SCHEDULES, *(name for name in METHODS if not METHODS[name].recycles))
"""Methods, and of Fast AdvProp its schedules."""
COPYING = tuple(name for name in METHODS if METHODS[name].attacked == "copies")
"""Variants that attack copies of the clean rows, which are not mixed."""

CLASSES = 10
CLEAN_ROWS = 16
GROUP_ROWS = 8  # of a clean group: there are two
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""Fields of `data`: one grey level of such images is too small for bfloat16."""


def make(
    variant: str,  # of VARIANTS
    *,
    device: str = "cpu",
    amp: Amp = "off",
    size: int = 8,
    seed: int = 0,  # of the weights
    model: str = "cifar_resnet8",
    method: dict[str, Any] | None = None,  # more fields of `method`
    data: dict[str, Any] | None = None,  # more fields of `data`
) -> Step:
    """A step that is fed with its first input; equal arguments make equal steps."""
    config = make_config(
        {
            "model": {"name": model, "num_classes": CLASSES},
            "method": {"group_rows": GROUP_ROWS} | fields_of(variant) | (method or {}),
            "data": {"size": size, "resize": size, "crop": "pad"} | (data or {}),
            "optim": {"clean_batch": CLEAN_ROWS},
        }
    )
    torch.manual_seed(seed)
    network = build(model, CLASSES, aux=config.method.entry.has_aux, size=size)
    step = Step(network.to(device), config, amp=amp)
    feed(step, 0)
    return step


def fields_of(variant: str) -> dict[str, Any]:
    """The fields of `method` that make a variant."""
    match variant:
        case "vanilla":
            return {"name": variant}
        case "advprop" | "adversarial_training":
            return {"name": variant, "attack_steps": 2}
        case "decoupled":
            return {"name": variant, "p_adv": "1/3"}
        case _:
            return {"schedule": variant, "p_adv": "1/3"}


def feed(step: Step, seed: int) -> None:
    """Random images, targets and draws; equal seeds feed equally."""
    g = torch.Generator().manual_seed(seed)
    n_rows = step.inputs.images.shape[0]
    size = step.inputs.images.shape[-1]
    images = torch.randint(0, 256, (n_rows, 3, size, size), dtype=torch.uint8, generator=g)
    draws: dict[str, Tensor] = {}
    if step.n_adv:
        draws["shuffle"] = torch.randperm(step.n_adv, generator=g)
        draws["noise_key"] = torch.randint(
            0, 2**31 - 1, (step.n_adv_groups,), dtype=torch.int32, generator=g
        )
    if step.mix:
        draws["mix_lam"] = torch.rand((), generator=g)
        draws["mix_box"] = torch.tensor([1, 2, 5, 7])
        draws["mix_partner"] = torch.randperm(step.inputs.n_clean, generator=g)
    targets = torch.randint(0, CLASSES, (n_rows,), generator=g)
    step.feed(images, targets, 0.1, **draws)


def clone(step: Step) -> dict[str, Tensor]:
    """The state as it is now."""
    return {name: tensor.clone() for name, tensor in step.state().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor], *but: str) -> set[str]:
    """Names of what differs, apart from the metrics and what begins with one of `but`."""
    return {
        name
        for name in before
        if not torch.equal(before[name], after[name]) and not name.startswith(("metrics", *but))
    }


def poison(step: Step) -> None:
    """An infinite bias in the last layer makes every row's loss and gradient non-finite."""
    last_bias(step)[0] = float("inf")


def last_bias(step: Step) -> Tensor:
    """Of the last layer, (CLASSES,)."""
    return step.network.flat.parameters["fc.bias"].data
