"""What weights are, and what they say of themselves: their model, and the images they know."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipelines.files import shown
from pipelines.names import checked_names
from pipelines.sizes import Size

CHANNELS = 3
MOST_SIDE = 1 << 16  # pixels of a side that a file may state
MOST_TEXT = 200  # characters of a name in a file


@dataclass(frozen=True)
class About:
    """What is known of weights besides their tensors; None where nobody says it."""

    architecture: str | None = None
    """As `model.name` has it: resnet50, timm/convnext_tiny."""
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    """Of the images, per channel, of values in 0..1."""
    std: tuple[float, ...] | None = None
    size: Size | None = None
    """Pixels: what the model saw."""
    resize: int | None = None
    """Pixels: the shorter side of an image before the centre crop of `size`, in evaluation."""
    interpolation: str | None = None
    """Of that resize: bilinear, bicubic."""
    classes: tuple[str, ...] | None = None
    """Their names, in the order of the outputs."""


@dataclass(frozen=True)
class Weights:
    """A plain state dict, wherever it is from."""

    origin: str
    """As `model.init` names it: a path, timm:TAG."""
    state: Mapping[str, Tensor]
    """By the names of the plain model."""
    about: About = About()
    notes: tuple[str, ...] = ()
    """What was chosen, left out or not understood on the way: one line each."""


def from_header(header: Mapping[str, str]) -> tuple[About, list[str]]:
    """What the header of a file says, as fap-export writes it, and notes on what is nonsense.

    Anybody may have written it.
    """
    readers = {
        "num_classes": _count,
        "classes": class_names,
        "mean": _channels,
        "std": _channels,
        "size": _size,
        "resize": _count,
        "interpolation": _name,
    }
    found: dict[str, Any] = {}
    notes = []
    for name, reader in readers.items():
        if name not in header:
            continue
        found[name] = reader(number_or_text(header[name]))
        if found[name] is None:
            notes.append(f"its header says {name} = {shown(header[name])}, which is none: left out")
    architecture = _name(header.get("model"))
    return About(architecture, **found), notes


def number_or_text(text: str) -> Any:
    """What JSON text says, or the text itself where it is none: a header may say anything."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _count(value: Any) -> int | None:
    if type(value) is int and 1 <= value < 1 << 31:
        return value
    return None


def class_names(value: Any) -> tuple[str, ...] | None:
    """A list of them; None for anything else."""
    try:
        return checked_names(value)
    except ValueError:
        return None


def _channels(value: Any) -> tuple[float, ...] | None:
    if not isinstance(value, list | tuple) or len(value) != CHANNELS:
        return None
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float):
            return None
        if not math.isfinite(number):
            return None
    return tuple(float(number) for number in value)


def _size(value: Any) -> Size | None:
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MOST_SIDE for side in sides):
        return None
    height, width = sides
    return height if height == width else (height, width)


def _name(value: Any) -> str | None:
    if isinstance(value, str) and 0 < len(value) <= MOST_TEXT:
        return value
    return None


def from_timm(
    cfg: Mapping[str, Any],  # timm's pretrained_cfg, or that of a config.json
    architecture: str | None = None,
) -> tuple[About, list[str]]:
    """What timm's fields say, and notes on what is done otherwise here."""
    notes = []
    size: Size | None = None
    resize = None
    sides = cfg.get("input_size")
    if isinstance(sides, list | tuple) and len(sides) == CHANNELS:
        size = _size(list(sides[1:]))
    crop_pct = cfg.get("crop_pct")
    is_share = isinstance(crop_pct, int | float) and 0 < crop_pct <= 1
    if isinstance(size, int) and is_share:
        assert crop_pct is not None
        resize = math.floor(size / crop_pct)  # as timm's transforms_imagenet_eval
    mode = cfg.get("crop_mode") or "center"
    if mode != "center":
        notes.append(
            f"evaluated with crop_mode {shown(mode)}; here the centre of the image is cut out"
        )
    return About(
        architecture=architecture,
        num_classes=_count(cfg.get("num_classes")),
        mean=_channels(cfg.get("mean")),
        std=_channels(cfg.get("std")),
        size=size,
        resize=resize,
        interpolation=_name(cfg.get("interpolation")),
    ), notes
