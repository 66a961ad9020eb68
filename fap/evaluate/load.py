"""The model of a run's checkpoint, to evaluate it or to export it.

A checkpoint may come from anyone. Before a model is built, its metadata is validated, and the
names, shapes and types of its tensors are compared with those of a model without storage. So what
is allocated is never more than the file itself holds, whatever its config says.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fap import checkpoint
from fap.checkpoint import DamagedCheckpoint
from fap.config import Config
from fap.nets import dual
from fap.nets.build import channels_last
from fap.nets.norm import Bn
from fap.run_meta import RunMeta, run_meta
from fap.tasks import make_task
from fap.tasks.base import Task
from pipelines.files import one_line, shown

WhichWeights = Literal["ema", "raw"]
"""Of a checkpoint: the exponential average, or what the optimiser holds."""

CIFAR_RESNET = "cifar_resnet"  # the depth follows
MOST_DIGITS = 9  # of that depth
# Not torch.tensor and torch.arange: torchvision computes RegNet's widths with them.
_STORAGE = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a training run, or plain weights."""

    model: nn.Module  # converted, in evaluation mode
    task: Task
    config: Config
    classes: tuple[str, ...] | None  # names in the order of the outputs; None: nobody knows them
    step: int  # optimiser steps done; 0 of plain weights, whose file does not say it
    content: str  # what it is: the file's checksum and size, and of plain weights their config
    notes: tuple[str, ...] = ()  # on plain weights: one line each
    weights: WhichWeights = "raw"  # which of a checkpoint's
    meta: RunMeta | None = None  # of a checkpoint


def load_model(
    path: str | Path, device: str | torch.device = "cpu", weights: WhichWeights | None = None
) -> Trained:
    """The converted model of a run's checkpoint, in evaluation mode.

    `weights`: the exponential average of a run with `optim.ema`, or the raw ones; None: the average
    if there is one. Raises DamagedCheckpoint, OSError, or ValueError for a checkpoint that is not
    of a training run, or has no average that was asked for.
    """
    read = _read(path, weights)
    task = make_task(read.config)
    model = _converted(task, read.state)
    model.load_state_dict(read.state)
    model.to(device)
    channels_last(model)
    meta = read.meta
    return Trained(
        model.eval(),
        task,
        read.config,
        meta.train.classes,
        meta.step,
        read.content,
        weights=read.weights,
        meta=meta,
    )


@dataclass(frozen=True)
class Plain:
    """A run's model as its library makes it, for others to load."""

    task: Task
    weights: dict[str, Tensor]
    config: Config
    meta: RunMeta
    which: WhichWeights = "raw"
    bn: Bn = "main"  # which of its norms `weights` has


def load_plain_model(path: str | Path, which: WhichWeights | None = None, bn: Bn = "main") -> Plain:
    """The plain weights of a run's checkpoint, which its plain model loads with strict=True.

    `which`, and what is raised, as `load_model`; ValueError too for norms that it has not.
    """
    read = _read(path, which)
    task = make_task(read.config)
    try:
        weights = dual.export(read.state, read.meta.step, bn)
    except ValueError:
        raise ValueError(
            f"{path}: it was trained without auxiliary norms; --bn must be main"
        ) from None
    with warnings.catch_warnings(), _WithoutStorage():
        warnings.simplefilter("ignore")  # of tensors that are not copied
        _load_strictly(task.plain_model(), weights, path)
    return Plain(task, weights, read.config, read.meta, read.weights, bn)


def _load_strictly(plain: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    try:
        plain.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: the plain model does not load these weights: {one_line(error)}"
        ) from None


class _Read(NamedTuple):
    """A run's checkpoint as it was read, its parts checked and fitting together."""

    state: dict[str, Tensor]  # of the model, main and auxiliary norms
    meta: RunMeta
    config: Config
    content: str  # the file's checksum and size, and which weights where it has two
    weights: WhichWeights


def _read(path: str | Path, weights: WhichWeights | None = None) -> _Read:
    tensors, tree, content = checkpoint.load_with_content(path)
    meta = run_meta(path, tree)
    config = meta.config
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    averages = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
    if not averages:
        if weights == "ema":
            raise ValueError(
                f"{path}: it has no average of its weights (optim.ema); only 'raw' is there"
            )
        weights = "raw"
    else:
        weights = weights or "ema"
        content = f"{content}-{weights}"
    if weights == "ema":
        state |= averages  # counters have none
    _check_model(path, config, state)
    return _Read(state, meta, config, content, weights)


class _WithoutStorage(TorchFunctionMode):
    """While entered, new tensors have a shape and a type, but no memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func in _STORAGE and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


def _check_model(path: str | Path, config: Config, state: dict[str, Tensor]) -> None:
    """Raise unless `state` is that of the config's model, and images of the config's size fit it.

    DamagedCheckpoint for tensors that are not the model's, ValueError for a config without a model.
    """
    name = shown(config.model.name)
    try:
        task = make_task(config)
    except ValueError as error:  # it names the field
        raise ValueError(f"{path}: {one_line(error)}") from None
    _check_effort(path, config, task, state)
    try:
        with warnings.catch_warnings(), _WithoutStorage():
            warnings.simplefilter("ignore")  # of tensors that are not copied
            model = _converted(task, state)
    except ValueError as error:  # it names the field
        raise ValueError(f"{path}: {one_line(error)}") from None
    except Exception as error:  # a constructor of torchvision or timm may raise anything
        raise ValueError(
            f"{path}: model.name = {name} cannot be built: {one_line(error)}"
        ) from None
    _compare(path, model.state_dict(), state)
    try:
        with torch.inference_mode():
            model.eval()(torch.empty(1, 3, *config.data.sides, device="meta"))
    except Exception as error:
        raise ValueError(
            f"{path}: data.size = {shown(config.data.size)}: "
            f"the model does not accept such images: {one_line(error)}"
        ) from None


def _check_effort(path: str | Path, config: Config, task: Task, state: dict[str, Tensor]) -> None:
    """Raise DamagedCheckpoint for a model that is far larger than the file.

    Even without storage a million layers, or a table per class, take a while.
    """
    name = config.model.name
    if name.startswith(CIFAR_RESNET):
        depth = name.removeprefix(CIFAR_RESNET)
        if depth.isdigit() and (len(depth) > MOST_DIGITS or int(depth) > len(state)):
            raise DamagedCheckpoint(
                f"{path}: it holds {len(state)} of the model's tensors, too few for {shown(name)}"
            )
    if not any(tensor.shape[:1] == (task.output_rows,) for tensor in state.values()):
        raise DamagedCheckpoint(
            f"{path}: no tensor has the {task.output_rows:,} rows of a last layer for "
            f"model.num_classes = {config.model.classes} classes"
        )


def _compare(path: str | Path, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise DamagedCheckpoint unless names, shapes and types of the tensors are those expected."""
    for name in sorted(expected.keys() ^ state.keys()):
        what = "is none of the model's"
        if name in expected:
            what = "is missing"
        raise DamagedCheckpoint(f"{path}: tensor {shown('model.' + name)} {what}")
    for name, wanted in expected.items():
        found = state[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise DamagedCheckpoint(
                f"{path}: tensor {shown('model.' + name)} is {found.dtype} "
                f"of shape {shown(tuple(found.shape))}, "
                f"the config's model has {wanted.dtype} of shape {tuple(wanted.shape)}"
            )


def _converted(task: Task, state: dict[str, Tensor]) -> nn.Module:
    """The task's model, with auxiliary norms if `state` has them.

    Without the training step's faster stem, which is not needed here.
    """
    model = task.plain_model()
    # A model may have a module of its own that is called aux.
    own = model.state_dict().keys()
    aux = any(dual.AUX in name.split(".") and name not in own for name in state)
    return dual.convert(model, aux, any_norm=not aux)
