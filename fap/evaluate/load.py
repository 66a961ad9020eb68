"""The model of a run's checkpoint, to evaluate it or to export it; or that of plain weights.

A checkpoint may come from anyone. Before a model is built, its metadata is validated, and the
names, shapes and types of its tensors are compared with those of a model without storage. So what
is allocated is never more than the file itself holds, whatever its config says.
"""

import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fap import checkpoint
from fap.checkpoint import DamagedCheckpoint
from fap.config import Config, load_config
from fap.nets import dual
from fap.nets.build import channels_last
from fap.nets.norm import Bn
from fap.nets.pretrained import load_strictly
from fap.nets.weights.about import Weights
from fap.nets.weights.files import MOST_BYTES, weights_in
from fap.nets.weights.find import find_weights, is_published
from fap.nets.weights.names import spelt
from fap.nets.weights.of_torchvision import IMAGENET_MEAN, IMAGENET_STD
from fap.nets.weights.settle import resize_for
from fap.run_meta import RunMeta, run_meta
from fap.tasks import make_task
from fap.tasks.base import Task
from pipelines.back_ends import EVAL_FILTERS
from pipelines.files import one_line, read_regular, readable, shown

WhichWeights = Literal["ema", "raw"]
"""Of a checkpoint: the exponential average, or what the optimiser holds."""

NOT_IN_NAMES = r"[^A-Za-z0-9._-]"  # in those of results
MOST_NAME = 60

IMAGENET_CLASSES = 1000
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


def load_weights(
    source: str | Path,
    words: Sequence[str],
    classes: tuple[str, ...] | None = None,
    device: str | torch.device = "cpu",
) -> Trained:
    """Plain weights: a file, or what `fap.nets.weights.find.find_weights` knows by name.

    `words` are `key=value` of a config: model.name, and how the model wants its images. What they
    do not say is taken from the weights, if they say it, else it is what torchvision evaluates on:
    ImageNet's mean and std, 1,000 classes, 224 px cut out of 256. `classes` are the names of the
    outputs; None: those that the weights know.

    Raises ValueError for what is no such file or does not fit, OSError.
    """
    weights, checksum = _plain_weights(str(source), words)
    config = load_config(None, _words_of_weights(weights, words, classes))
    n_classes = config.model.classes
    known = weights.about.classes
    if classes is None and known is not None and len(known) == n_classes:
        classes = known
    if classes is not None and len(classes) != n_classes:
        raise ValueError(
            f"--classes: {len(classes):,} names, but {readable(source)} has {n_classes:,} classes; "
            "must be one name for each, in the order of the labels"
        )
    try:
        task = make_task(config)
        model = dual.convert(task.plain_model(), aux=False, any_norm=True)
        load_strictly(model, weights)
    except ValueError as error:
        raise ValueError(f"{source}: {error}{_of_another(weights, words)}") from None
    model.to(device)
    channels_last(model)
    settings = config.model_dump_json(include={"model", "data", "task"})
    content = f"{zlib.crc32(settings.encode(), checksum.crc32):08x}-{checksum.n_bytes}"
    return Trained(model.eval(), task, config, classes, 0, content, weights.notes)


class _Checksum(NamedTuple):
    crc32: int
    n_bytes: int


def _plain_weights(source: str, words: Sequence[str]) -> tuple[Weights, _Checksum]:
    """The weights, and what they are: of a file its content, as it was read."""
    if not is_published(source) and not os.path.isdir(source):
        path = Path(source)
        content = read_regular(path, MOST_BYTES)
        try:
            weights = weights_in(content, path)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        return weights, _Checksum(zlib.crc32(content), len(content))
    size = _word("data.size", words)
    weights = find_weights(
        source,
        _word("model.name", words),
        int(size) if size and size.isdecimal() else None,
        where=source,
    )
    crc32 = 0
    n_bytes = 0
    for name in sorted(weights.state):
        tensor = weights.state[name].detach().contiguous().flatten().view(torch.uint8)
        crc32 = zlib.crc32(tensor.numpy().data, zlib.crc32(name.encode(), crc32))
        n_bytes += len(tensor)
    return weights, _Checksum(crc32, n_bytes)


def _word(key: str, words: Sequence[str]) -> str | None:
    """The value of the last `key=value`, None without one."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    return values[-1] if values else None


def _words_of_weights(
    weights: Weights, words: Sequence[str], classes: tuple[str, ...] | None
) -> list[str]:
    """The config of plain weights as `key=value`; later words win."""
    about = weights.about
    stem = Path(weights.origin).stem if not is_published(weights.origin) else weights.origin
    found = [
        f"name={re.sub(NOT_IN_NAMES, '-', stem)[:MOST_NAME].lstrip('.') or 'plain'}",
        f"data.mean={list(about.mean or IMAGENET_MEAN)}",
        f"data.std={list(about.std or IMAGENET_STD)}",
        f"model.num_classes={about.num_classes or len(classes or ()) or IMAGENET_CLASSES}",
    ]
    if about.architecture is not None:
        found.append(f"model.name={about.architecture}")
    size = about.size
    given = _word("data.size", words)
    if given is not None and given.isdecimal():
        size = int(given)
    resize = resize_for(about, size)
    if resize is not None:
        found.append(f"data.resize={resize}")
    if about.size is not None:
        found.append(f"data.size={json.dumps(about.size)}")
    if about.interpolation in EVAL_FILTERS:
        found.append(f"data.eval_filter={about.interpolation}")
    found += words
    if not any(word.startswith("model.name=") for word in found):
        raise ValueError(
            f"{weights.origin}: say which model these weights are of: --plain model.name=NAME "
            "or --model SOURCE model.name=NAME"
        )
    return found


def _of_another(weights: Weights, words: Sequence[str]) -> str:
    """A hint for weights that do not fit the model that the words name, and know their own."""
    given = _word("model.name", words)
    own = weights.about.architecture
    if given is None or own is None or spelt(given) == spelt(own):
        return ""
    return (
        f"; the weights say that they are of {readable(own)}: with --model SOURCE KEY=VALUE a "
        "model has words of its own"
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
