"""Small steps of every task, ready to run, with what tests do to them: feed, clone, poison.

A step classifies by a ResNet-8, unless a test asks for `task="detection"`: boxes by a tiny
RetinaNet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fap.config import make_config
from fap.methods import METHODS
from fap.nets.build import prepare
from fap.step.half import Amp
from fap.step.step import Step
from fap.tasks import make_task

SCHEDULES = ("sequential", "fused", "pipelined", "parallel")
VARIANTS = (*SCHEDULES, *(name for name in METHODS if not METHODS[name].recycles))
"""Methods, and of Fast AdvProp its schedules."""
COPYING = tuple(name for name in METHODS if METHODS[name].attacked == "copies")
"""Variants that attack copies of the clean rows, which are not mixed."""
STEPS = (
    *(("classification", variant) for variant in VARIANTS),
    *(("detection", variant) for variant in (*VARIANTS, "max")),
)
"""Tasks and their variants. `max` is for a loss that has parts: an attack by each of them."""

CLASSES = 10
CLEAN_ROWS = 16
GROUP_ROWS = 8  # of a clean group: there are two
MOST_BOXES = 3
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "classification": {
        "model": {"name": "cifar_resnet8"},
        "data": {"size": 8, "resize": 8, "crop": "pad"},
    },
    "detection": {
        "model": {"name": "retinanet_tiny"},
        "data": {"size": (32, 64), "crop": "letterbox", "most_boxes": MOST_BOXES},
    },
}
"""By task, where a test asks for nothing else."""
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""Fields of `data`: one grey level of such images is too small for bfloat16."""


def make(
    variant: str,  # of VARIANTS
    *,
    task: str = "classification",
    device: str = "cpu",
    amp: Amp = "off",
    size: int | None = None,  # of a square
    seed: int = 0,  # of the weights
    model: str | None = None,
    method: dict[str, Any] | None = None,  # more fields of `method`
    data: dict[str, Any] | None = None,  # more fields of `data`
    optim: dict[str, Any] | None = None,  # more fields of `optim`
    dtype: torch.dtype = torch.float32,
) -> Step:
    """A step that is fed with its first input; equal arguments make equal steps."""
    settings = SETTINGS[task]
    sizes = {} if size is None else {"size": size, "resize": size}
    names = {} if model is None else {"name": model}
    config = make_config(
        {
            "task": task,
            "model": settings["model"] | names | {"num_classes": CLASSES},
            "method": {"group_rows": GROUP_ROWS} | fields_of(variant) | (method or {}),
            "data": settings["data"] | sizes | (data or {}),
            "optim": {"clean_batch": CLEAN_ROWS} | (optim or {}),
        }
    )
    torch.manual_seed(seed)
    plain = make_task(config).plain_model()
    of_norms = {"aux": config.method.has_aux, "any_norm": config.method.any_norm}
    network = prepare(plain, size=config.data.size, **of_norms)
    step = Step(network.to(device, dtype), config, amp=amp)
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
        case "max":
            return {"name": "decoupled", "p_adv": "1/3", "attack_loss": "max"}
        case _:
            return {"schedule": variant, "p_adv": "1/3"}


def feed(step: Step, seed: int) -> None:
    """Random images, targets and draws; equal seeds feed equally."""
    g = torch.Generator().manual_seed(seed)
    n_rows = step.inputs.images.shape[0]
    shape = (n_rows, *step.inputs.images.shape[1:])
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
    draws: dict[str, Tensor] = {}
    if step.n_adv:
        draws["shuffle"] = torch.randperm(step.n_adv, generator=g)
        draws["noise_key"] = torch.randint(
            0, 2**31 - 1, (step.n_adv_groups,), dtype=torch.int32, generator=g
        )
    if step.inputs.data.mix is not None:
        draws["mix_lam"] = torch.rand(step.inputs.mix_lam.shape, generator=g)
        draws["mix_box"] = torch.tensor([1, 2, 5, 7]).expand(step.inputs.mix_box.shape)
        draws["mix_partner"] = torch.randperm(n_rows, generator=g)
    targets = torch.randint(0, CLASSES, (n_rows,), generator=g)
    if step.has_padding:
        draws["place"] = _places(images, g)
        targets = _boxes(targets, draws["place"], g)
    step.feed(images, targets, 0.1, **draws)


def _places(images: Tensor, g: torch.Generator) -> Tensor:
    """int64 (rows, 4): pictures as wide as the canvas and of random height, in `images` too."""
    n_rows, _, height, width = images.shape
    places = torch.tensor([[0, 0, height, width]]).repeat(n_rows, 1)
    places[:, 2] = torch.randint(height // 2, height + 1, (n_rows,), generator=g)
    is_picture = torch.arange(height) < places[:, 2, None]
    images *= is_picture[:, None, :, None]
    return places


def _boxes(
    classes: Tensor,  # (rows,)
    places: Tensor,  # (rows, 4)
    g: torch.Generator,
) -> Tensor:  # float32 (rows, MOST_BOXES, 5)
    """0 to MOST_BOXES boxes in each picture, all of its class."""
    n_rows = len(classes)
    sides = places[:, None, [3, 2]]  # width, height
    corner = torch.rand(n_rows, MOST_BOXES, 2, generator=g) * sides / 2
    size = 4 + torch.rand(n_rows, MOST_BOXES, 2, generator=g) * (sides / 2 - 4)
    boxes = torch.cat([corner, corner + size], 2)
    is_box = torch.arange(MOST_BOXES) < torch.arange(n_rows)[:, None] % (MOST_BOXES + 1)
    named = torch.cat([classes[:, None, None].expand(-1, MOST_BOXES, 1), boxes], 2)
    padding = torch.tensor([-1.0, 0, 0, 0, 0])
    return torch.where(is_box[:, :, None], named, padding)


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
