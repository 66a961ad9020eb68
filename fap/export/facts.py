"""What whoever gets a model must know of it: its classes, its images, the run that made it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import timm

from fap.config import Config
from fap.evaluate.load import Plain
from fap.nets.build import torchvision_options
from fap.nets.weights.names import TIMM, TORCHVISION, spelt, torchvision_names
from pipelines.sizes import size_in_words


@dataclass(frozen=True)
class Written:
    """What was exported, and how to use it: lines for the user."""

    what: str
    """The format, and what was checked."""
    load: tuple[str, ...]
    """How to load it."""


def header(plain: Plain) -> dict[str, str]:
    """What stands beside exported tensors, numbers as JSON."""
    config, meta = plain.config, plain.meta
    data = config.data
    numbers: dict[str, Any] = {
        "num_classes": config.model.classes,
        "size": data.size,
        "step": meta.step,
        "mean": data.mean,
        "std": data.std,
    }
    if data.crop != "letterbox":  # which knows no resize
        numbers["resize"] = data.resize
    text = {name: json.dumps(value) for name, value in numbers.items()}
    # As JSON text too, so that it reads as what it is.
    text["interpolation"] = json.dumps(data.eval_filter)
    if meta.train.classes is not None:
        text["classes"] = json.dumps(meta.train.classes)  # in the order of the outputs
    return {"model": config.model.name, "run": config.name, "bn": plain.bn, **text}


def summary(plain: Plain) -> tuple[str, ...]:
    """What it is and which images it wants, in words."""
    config = plain.config
    data = config.data
    name = spelt(config.model.name).removeprefix(TIMM)
    average = ""
    if plain.which == "ema":
        average = ", the average of its weights (--weights raw: the others)"
    norms = ", through its auxiliary norms" if plain.bn == "aux" else ""
    lines = [
        f"{name}, {config.model.classes} classes, after {plain.meta.step} steps of run "
        f"{config.name}{average}{norms}",
        f"input: RGB in 0..1, {size_in_words(data.size)} px, minus mean {list(data.mean)}, "
        f"divided by std {list(data.std)}",
    ]
    if data.crop != "letterbox":
        lines.append(
            f"       evaluated with a shorter side of {data.resize} px, {data.eval_filter}, "
            "centre cut out"
        )
    return tuple(lines)


def library_of(config: Config) -> str:
    """Who makes the plain model: timm, torchvision or fap."""
    name = spelt(config.model.name)
    if name.startswith(TIMM):
        return "timm"
    if config.task != "classification":
        return "fap"
    if name in torchvision_names():
        return "torchvision"
    is_timms = timm.is_model(name) and not config.model.name.startswith(TORCHVISION)
    return "timm" if is_timms else "fap"


def constructor(config: Config) -> str:
    """Python that makes the plain model."""
    name = spelt(config.model.name).removeprefix(TIMM)
    classes = config.model.classes
    match library_of(config):
        case "timm":
            size = ""
            if fixed_size(config):
                size = f", img_size={list(config.data.sides)}"
            return f"timm.create_model({name!r}, num_classes={classes}{size})"
        case "torchvision":
            options = torchvision_options(name, config.data.size)
            given = "".join(f", {option}={value!r}" for option, value in options.items())
            return f"torchvision.models.get_model({name!r}, num_classes={classes}{given})"
    if config.task == "classification":
        return f"fap.nets.build.plain({name!r}, {classes})"
    return f"fap.nets.retinanet.RetinaNet(fap.nets.retinanet.spec_of({name!r}), {classes})"


def fixed_size(config: Config) -> bool:
    """Is it a model of timm that is made for images of one size?"""
    cfg = timm.get_pretrained_cfg(spelt(config.model.name).removeprefix(TIMM))
    return bool(cfg is not None and cfg.fixed_input_size)
