"""The model of a run's checkpoint, to evaluate it or to export it; or that of plain weights.

A checkpoint may come from anyone. Before a model is built, its metadata is validated, and the
names, shapes and types of its tensors are compared with those of a model without storage. So what
is allocated is never more than the file itself holds, whatever its config says.
"""

import json
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fap import checkpoint
from fap.checkpoint import DamagedCheckpoint
from fap.config import Config, load_config
from fap.nets import dual
from fap.nets.build import channels_last
from fap.nets.pretrained import load_plain, weights_in
from fap.run_meta import RunMeta, run_meta
from fap.tasks import make_task
from fap.tasks.base import Task
from pipelines.files import one_line, read_regular, shown

SUFFIX = ".safetensors"
MOST_WEIGHTS = 16 << 30  # bytes of a file of plain weights
NOT_IN_NAMES = r"[^A-Za-z0-9._-]"  # in those of results
MOST_NAME = 60

# torchvision's, for all of its published weights.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
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


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Trained:
    """The converted model of a run's checkpoint, in evaluation mode.

    Raises DamagedCheckpoint, OSError, or ValueError for a checkpoint that is not of a training run.
    """
    read = _read(path)
    task = make_task(read.config)
    model = _converted(task, read.state)
    model.load_state_dict(read.state)
    model.to(device)
    channels_last(model)
    meta = read.meta
    return Trained(model.eval(), task, read.config, meta.train.classes, meta.step, read.content)


def load_weights(
    path: str | Path,
    words: Sequence[str],
    classes: tuple[str, ...] | None = None,
    device: str | torch.device = "cpu",
) -> Trained:
    """Plain weights, as torchvision and timm publish them and fap-export writes them.

    `words` are `key=value` of a config: model.name, and how the model wants its images. What they
    do not say is taken from the file's header, if fap-export wrote it, else it is what torchvision
    evaluates on: ImageNet's mean and std, 1,000 classes, 224 px cut out of 256.

    Raises ValueError for what is no such file or does not fit, OSError.
    """
    path = Path(path)
    content = read_regular(path, MOST_WEIGHTS)
    state, header = weights_in(content, path)
    config = load_config(None, _words_of_weights(path, header, words, classes))
    try:
        task = make_task(config)
        model = dual.convert(task.plain_model(), aux=False, any_norm=True)
        load_plain(model, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model.to(device)
    channels_last(model)
    settings = config.model_dump_json(include={"model", "data", "task"})
    crc32 = zlib.crc32(settings.encode(), zlib.crc32(content))
    return Trained(model.eval(), task, config, classes, 0, f"{crc32:08x}-{len(content)}")


def _words_of_weights(
    path: Path, header: Mapping[str, str], words: Sequence[str], classes: tuple[str, ...] | None
) -> list[str]:
    """The config of plain weights as `key=value`; later words win."""
    found = [
        f"name={re.sub(NOT_IN_NAMES, '-', path.stem)[:MOST_NAME]}",
        f"data.mean={list(IMAGENET_MEAN)}",
        f"data.std={list(IMAGENET_STD)}",
        f"model.num_classes={len(classes or ()) or IMAGENET_CLASSES}",
    ]
    fields = {"mean": "data.mean", "std": "data.std", "size": "data.size"}
    fields |= {"num_classes": "model.num_classes", "model": "model.name"}
    found += [f"{field}={header[name]}" for name, field in fields.items() if name in header]
    found += words
    if not any(word.startswith("model.name=") for word in found):
        raise ValueError(f"{path}: say which model these weights are of: --plain model.name=NAME")
    return found


def export(path: str | Path, out: str | Path) -> dict[str, str]:
    """Write the plain model of a run's checkpoint; returns the metadata written beside it, as text.

    The file's tensors are a state dict that the unconverted torchvision or timm model loads with
    strict=True, which is tried before this function returns. Raises as `load_model`; ValueError too
    if `out` exists or is named like another format.
    """
    out = Path(out)
    if out.suffix != SUFFIX:
        raise ValueError(
            f"{out}: only {SUFFIX} files are written, no {out.suffix or 'other'} ones; "
            f"choose NAME{SUFFIX}"
        )
    if out.is_symlink() or out.exists():
        raise ValueError(f"{out} exists; choose another name or remove it first")
    read = _read(path)
    plain = make_task(read.config).plain_model()
    weights = dual.export(read.state, read.meta.step)
    _load_strictly(plain, weights, path)
    text = _header(read.config, read.meta)
    try:
        checkpoint.save(out, weights, {}, overwrite=False, **text)
    except FileExistsError:  # made by someone else in the meantime
        raise ValueError(f"{out} exists; choose another name or remove it first") from None
    try:
        checkpoint.load(out)  # its checksum says that these are the bytes that were written
    except (OSError, DamagedCheckpoint):
        out.unlink(missing_ok=True)
        raise
    return text


def _header(config: Config, meta: RunMeta) -> dict[str, str]:
    """The metadata of an exported file: what its user needs to know, numbers as JSON."""
    numbers = {
        "num_classes": config.model.classes,
        "size": config.data.size,
        "step": meta.step,
        "mean": config.data.mean,
        "std": config.data.std,
    }
    text = {name: json.dumps(value) for name, value in numbers.items()}
    return {"model": config.model.name, "run": config.name, **text}


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
    content: str  # the file's checksum and size


def _read(path: str | Path) -> _Read:
    tensors, tree, content = checkpoint.load_with_content(path)
    meta = run_meta(path, tree)
    config = meta.config
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    _check_model(path, config, state)
    return _Read(state, meta, config, content)


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
