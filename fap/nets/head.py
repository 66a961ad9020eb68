"""The head of a model: the layers that make the classes of what the others found.

Fine-tuning gives it a learning rate of its own, and weights of other classes have none for us.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fap.nets.retinanet import RetinaNet

DETECTOR_HEAD = "head."  # of a RetinaNet: class logits and boxes, of all levels


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the head's parameters, as in `named_parameters()`, of a plain or converted model.

    Of a classifier it is the layer that gives the logits: timm says which one that is (some models
    have two), elsewhere it is the last linear layer or convolution. Of a detector it is both heads.
    Empty for a model that gives features, as timm's with no classes.
    """
    if isinstance(model, RetinaNet):
        return {name for name, _ in model.named_parameters() if name.startswith(DETECTOR_HEAD)}
    wanted = {id(parameter) for layer in _layers(model) for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def _layers(classifier: Any) -> list[nn.Module]:
    if not hasattr(classifier, "get_classifier"):
        found = [m for m in classifier.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return [*found[-1:]]
    given = classifier.get_classifier()  # of timm: a module, or a tuple of two
    if isinstance(given, nn.Module):
        return [given]
    return [layer for layer in given or () if isinstance(layer, nn.Module)]
