"""Models by name from torchvision and timm, with dual batch norms and a stem that can differentiate
few rows.
"""

import difflib
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from fap.nets.cifar import CifarResNet
from fap.nets.fuse import fuse_blocks
from fap.nets.norm import convert
from fap.nets.stem import install_stem
from pipelines.files import shown

TIMM = "timm/"  # forces a name of timm where torchvision has the same


def plain(name: str, num_classes: int) -> nn.Module:
    """An unconverted, randomly initialised model.

    Raises ValueError for a name that nobody knows, and for one that asks for pretrained weights.
    """
    if (
        name == "cifar_resnet18"
    ):  # ResNet-18 with a 3x3 stem and no pooling: the field's CIFAR variant
        model = torchvision.models.resnet18(num_classes=num_classes)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model
    if name.startswith("cifar_resnet") and name.removeprefix("cifar_resnet").isdigit():
        return CifarResNet(int(name.removeprefix("cifar_resnet")), num_classes)
    if name in _torchvision_names():
        kwargs: dict[str, Any] = (
            {"init_weights": True, "aux_logits": False}
            if name in ("googlenet", "inception_v3")
            else {}
        )
        return torchvision.models.get_model(name, num_classes=num_classes, **kwargs)
    # An old name of timm's may stand for a tag (tf_efficientnet_b0_ns), or for a model that was
    # removed (None).
    asked = name.removeprefix(TIMM)
    current = timm.models.get_deprecated_models().get(asked, asked) or ""
    architecture, dot, tag = current.partition(".")
    of_timm, of_torchvision = timm.is_model(architecture), architecture in _torchvision_names()
    if dot and (of_timm or of_torchvision):
        known = TIMM + architecture if of_timm else architecture
        raise ValueError(
            f"model.name = {shown(name)}: {shown(tag)} names pretrained weights, but a name alone"
            f" gives random weights; write model.name={known}, and model.init=FILE.safetensors to"
            " start from weights"
        )
    if of_timm:
        return timm.create_model(architecture, num_classes=num_classes)
    near = near_names(name)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    nobody = "neither torchvision nor timm has it, nor is it cifar_resnet18 or cifar_resnetD"
    raise ValueError(f"model.name = {shown(name)}: {nobody}{hint}")


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def near_names(name: str) -> list[str]:
    """At most three known names that look like `name` without its case and the tag of its weights,
    best first.
    """
    prefix = TIMM if name.startswith(TIMM) else ""
    known = {*timm.list_models()}
    if not prefix:
        known |= {*_torchvision_names(), "cifar_resnet18", "cifar_resnet20", "cifar_resnet56"}
    wanted = name.rpartition("/")[2].partition(".")[0].lower()
    return [
        prefix + near for near in difflib.get_close_matches(wanted, sorted(known), n=3, cutoff=0.7)
    ]


def build(name: str, num_classes: int, *, aux: bool = True, size: int = 224) -> nn.Module:
    """A prepared model whose logits are (B, num_classes) for (B, 3, size, size) images."""
    return prepare(plain(name, num_classes), aux=aux, size=size)


def prepare(model: nn.Module, *, aux: bool = True, size: int = 224) -> nn.Module:
    """A plain model, changed in place into one that the step trains: dual norms, channels_last."""
    convert(model, aux)
    fuse_blocks(model)
    install_stem(model, size)
    return model.to(memory_format=torch.channels_last)
