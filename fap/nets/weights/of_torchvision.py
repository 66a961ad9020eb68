"""torchvision's published weights, by its own loader and cache."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision
from torch import Tensor
from torchvision.models import WeightsEnum

from fap.class_maps import imagenet
from fap.nets.retinanet import SPECS
from fap.nets.weights.about import About, Weights
from fap.nets.weights.names import near, spelt, torchvision_names
from pipelines.files import one_line, readable, shown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# torchvision's own model normalises its input again before these weights see it: from ImageNet's
# mean and std, which its transforms take, to these.
TRANSFORMED = ("googlenet", "inception_v3")
HALF = (0.5, 0.5, 0.5)
DEFAULT = "DEFAULT"
# Names that published files have kept from earlier versions: norm.1 of a dense layer is norm1.
_DENSE_LAYER = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.(\d\.\w+)$")
OF_IMAGENET = "IMAGENET1K"  # how weights begin whose outputs are ImageNet's classes, in order
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")  # of the two in TRANSFORMED; not trained here


def published(asked: str, model_name: str | None) -> Weights:
    """What `torchvision:asked` names: an enum's value, a model, or a value of that of `model_name`.

    Raises ValueError for a name without meaning, and for weights that are neither in the cache nor
    to be fetched.
    """
    origin = f"torchvision:{asked}"
    weights, architecture = _chosen(asked, model_name)
    state = _fetched(weights)
    notes = []
    if asked != repr(weights):
        notes.append(f"these are {weights!r}")
    about = _about(weights, architecture)
    if architecture in TRANSFORMED:
        notes.append(
            f"torchvision's {architecture} normalises its input a second time; "
            f"here data.mean = data.std = {list(HALF)} does all of it"
        )
    return Weights(origin, with_current_names(state), about, tuple(notes))


def _chosen(asked: str, model_name: str | None) -> tuple[WeightsEnum, str]:
    """The weights and their model."""
    owners = {_values(name).__name__: name for name in (*torchvision_names(), *_detectors())}
    first, _, value = asked.partition(".")
    if first in owners:  # ResNet50_Weights.IMAGENET1K_V2
        architecture = owners[first]
    elif first in owners.values():  # resnet50, resnet50.IMAGENET1K_V2
        architecture = first
        value = value or DEFAULT
    else:  # IMAGENET1K_V2, DEFAULT
        architecture = spelt(model_name or "")
        value = asked
        if architecture not in owners.values():
            known = [*owners, *owners.values()]
            raise ValueError(
                f"torchvision has no weights of this name{near(first, known)}; write "
                "torchvision:ResNet50_Weights.IMAGENET1K_V2, torchvision:resnet50, or "
                "torchvision:DEFAULT with model.name = one of its models"
            )
    values = _values(architecture)
    if value not in values.__members__:
        there = ", ".join(values.__members__) or "none"
        raise ValueError(f"{architecture} has no weights {shown(value)}; there are: {there}")
    return values[value], architecture


def _values(architecture: str) -> type[WeightsEnum]:
    return torchvision.models.get_model_weights(architecture)


def _detectors() -> list[str]:
    """Those of torchvision's that are trained here."""
    return sorted(set(torchvision.models.list_models()) & SPECS.keys())


def _about(weights: WeightsEnum, architecture: str) -> About:
    transforms = weights.transforms()
    n_classes = len(weights.meta.get("categories") or ()) or None
    if architecture in SPECS:  # a detector normalises its images itself
        return About(architecture, n_classes, IMAGENET_MEAN, IMAGENET_STD)
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    if architecture in TRANSFORMED:
        mean = std = HALF
    (size,) = transforms.crop_size
    (resize,) = transforms.resize_size
    how = transforms.interpolation.value
    names = None
    if weights.name.startswith(OF_IMAGENET) and n_classes == len(imagenet()):
        names = imagenet()
    return About(architecture, n_classes, mean, std, size, max(size, resize), how, names)


def _fetched(weights: WeightsEnum) -> Mapping[str, Tensor]:
    """From torch.hub's cache, or downloaded into it."""
    name = os.path.basename(urlparse(weights.url).path)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    was_there = cached.exists()
    try:
        # weights_only: the file in the cache may be anyone's.
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # of the network, of the disk, of a garbled file
        if was_there:
            raise ValueError(
                f"{readable(cached)} is damaged or no file of tensors ({one_line(error, 150)}); "
                "remove it, and it is fetched anew"
            ) from None
        raise ValueError(
            f"{weights.url} cannot be fetched ({one_line(error, 150)}), and {readable(cached)} is "
            f"not there; where there is a network:  curl -LO {weights.url}  "
            f"and copy the file to {readable(cached.parent)}/ of this machine"
        ) from None


def with_current_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The names that torchvision's models have today, without heads that are not trained here."""
    renamed = {_DENSE_LAYER.sub(r"\1\2", name): tensor for name, tensor in state.items()}
    return {k: v for k, v in renamed.items() if not k.startswith(AUXILIARY_HEADS)}
