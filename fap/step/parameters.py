"""Which parameters are trained, at which share of the rate, and with which decay.

That is `optim.decay_on`, `head_lr_scale`, `layer_decay` and `freeze`. An auxiliary norm's
parameters are treated as those of its main norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from timm.models._manipulate import group_with_matcher
from torch import nn

from fap.nets.dual import names_of_main
from fap.nets.head import head_parameters
from fap.sections import OptimConfig
from pipelines.files import shown

WILDCARDS = "*?["
MOST_PARTS = 20  # of a model, in a message
# Of torchvision's transformers, which name nothing themselves; its recipes give them no decay.
EMBEDDINGS = ("class_token", "pos_embedding", "relative_position_bias_table")


class Setting(NamedTuple):
    """How a parameter is trained."""

    lr_scale: float
    """Its share of the step's learning rate."""
    decay: float
    trained: bool = True
    """False: frozen. No gradient is asked for, nothing changes it."""


FROZEN = Setting(0.0, 0.0, trained=False)


def settings_of(model: nn.Module, config: OptimConfig) -> dict[str, Setting]:
    """The setting of every parameter of a converted model, by name.

    Raises ValueError for patterns that match nothing, or leave nothing to train, and for a model
    that timm does not divide into layers.
    """
    main_names = names_of_main(model)
    parameters = {
        name: parameter for name, parameter in model.named_parameters() if name not in main_names
    }
    frozen = _frozen(parameters, config.freeze)
    without_decay: set[str] = set()
    if config.decay_on == "weights":
        without_decay = _without_decay(model, parameters)
    scales = dict.fromkeys(parameters, 1.0)
    if config.layer_decay is not None:
        scales = _layer_scales(model, parameters, config.layer_decay)
    if config.head_lr_scale != 1:
        head = head_parameters(model)
        if not head:
            raise ValueError(
                f"optim.head_lr_scale = {config.head_lr_scale}: no head of "
                f"{type(model).__name__} is known; leave it out"
            )
        for name in head & scales.keys():  # its auxiliary norms follow their main ones
            scales[name] *= config.head_lr_scale

    settings: dict[str, Setting] = {}
    for name in parameters:
        decay = 0.0 if name in without_decay else config.weight_decay
        settings[name] = FROZEN if name in frozen else Setting(scales[name], decay)
    # Their running statistics are no parameters.
    return settings | {aux: settings[m] for aux, m in main_names.items() if m in settings}


def _frozen(parameters: Mapping[str, nn.Parameter], patterns: tuple[str, ...]) -> set[str]:
    """Raises ValueError unless every pattern matches something, and something is left."""
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in parameters if _matches(name, pattern)}
        if not matched:
            parts = {name.partition(".")[0] for name in parameters}
            raise ValueError(
                f"optim.freeze = {shown(pattern)}: no parameter of the model has such a name; "
                f"its parts are {', '.join(sorted(parts)[:MOST_PARTS])}"
            )
        frozen |= matched
    if frozen == parameters.keys():
        raise ValueError(
            f"optim.freeze = {shown(list(patterns))}: these are all parameters of the model; "
            "at least one must be trained"
        )
    return frozen


def _matches(name: str, pattern: str) -> bool:
    """Is it the parameter, or inside the module, that a pattern names?"""
    if any(wildcard in pattern for wildcard in WILDCARDS):
        return fnmatchcase(name, pattern)
    return name == pattern or name.startswith(f"{pattern}.")


def _without_decay(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Norms, biases, and what timm's models or `EMBEDDINGS` name."""
    no_weight_decay = getattr(model, "no_weight_decay", None)
    named: set[str] = set()
    if callable(no_weight_decay):
        named = {*no_weight_decay()}
    found: set[str] = set()
    for name, parameter in parameters.items():
        leaf = name.rpartition(".")[2]
        of_the_model = any(fnmatchcase(name, pattern) for pattern in named)
        if parameter.ndim < 2 or leaf == "bias" or leaf in EMBEDDINGS or of_the_model:
            found.add(name)
    return found


def _layer_scales(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], layer_decay: float
) -> dict[str, float]:
    """As `timm.optim.param_groups_layer_decay` has them: the last layer's is 1.

    Raises ValueError for a model whose library does not say what its layers are.
    """
    group_matcher = getattr(model, "group_matcher", None)
    if not callable(group_matcher):
        raise ValueError(
            f"optim.layer_decay = {layer_decay}: {type(model).__name__} is not divided into "
            "layers, as most models of timm are (model.name=timm/NAME); leave it out"
        )
    matcher = group_matcher(coarse=False)
    layer_of = group_with_matcher(iter(parameters.items()), matcher, reverse=True)
    last = max(layer_of.values())
    return {name: layer_decay ** (last - layer) for name, layer in layer_of.items()}
