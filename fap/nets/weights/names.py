"""Names of models and of published weights, as `model.name` and `model.init` take them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import timm
import torchvision

TIMM = "timm/"  # forces a name of timm where torchvision has the same
TORCHVISION = "torchvision:"
SPELLINGS = {"timm:": TIMM, TORCHVISION: ""}  # as model.init begins; elsewhere timm/ is written


def spelt(name: str) -> str:
    """A model's name in one spelling: `timm:NAME` is `timm/NAME`, `torchvision:NAME` is NAME."""
    for prefix, ours in SPELLINGS.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name


def torchvision_names() -> list[str]:
    """The classifiers of torchvision."""
    return torchvision.models.list_models(module=torchvision.models)


def current_name(name: str) -> str:
    """What timm calls a model today.

    An old name may stand for one with a tag (tf_efficientnet_b0_ns), or for a model that was
    removed: then nothing is left of it.
    """
    return timm.models.get_deprecated_models().get(name, name) or ""


def near(wanted: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint at what was meant: "; did you mean ...?", or nothing."""
    found = difflib.get_close_matches(wanted[:200], sorted(known), n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(found)}?" if found else ""
