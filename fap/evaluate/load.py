"""The model of a run's checkpoint: to evaluate it, or to export it as plain weights.

A checkpoint may come from anyone. Before a model is built, its metadata is validated, and the
names, shapes and types of its tensors are compared with those of a model without storage. So what
is allocated is never more than the file itself holds, whatever its config says.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fap import checkpoint
from fap.checkpoint import DamagedCheckpoint
from fap.config import Config
from fap.nets import dual
from fap.run_meta import RunMeta, run_meta
from fap.tasks import make_task
from fap.tasks.base import Task
from pipelines.files import one_line, shown

SUFFIX = ".safetensors"
CIFAR_RESNET = "cifar_resnet"  # the depth follows
MOST_DIGITS = 9  # of that depth
# Not torch.tensor and torch.arange: torchvision computes RegNet's widths with them.
_STORAGE = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a training run."""

    model: nn.Module  # converted, in evaluation mode
    task: Task
    config: Config
    meta: RunMeta
    content: str  # the file's checksum and size


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Trained:
    """The converted model of a run's checkpoint, in evaluation mode.

    Raises DamagedCheckpoint, OSError, or ValueError for a checkpoint that is not of a training run.
    """
    read = _read(path)
    task = make_task(read.config)
    model = _converted(task, read.state)
    model.load_state_dict(read.state)
    model.to(device)
    model.to(memory_format=torch.channels_last)
    return Trained(model.eval(), task, read.config, read.meta, read.content)


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
    _check_effort(path, config, state)
    name = shown(config.model.name)
    try:
        with warnings.catch_warnings(), _WithoutStorage():
            warnings.simplefilter("ignore")  # of tensors that are not copied
            model = _converted(make_task(config), state)
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


def _check_effort(path: str | Path, config: Config, state: dict[str, Tensor]) -> None:
    """Raise DamagedCheckpoint for a model that is far larger than the file.

    Even without storage a million layers, or a table per class, take a while.
    """
    name = config.model.name
    n_classes = config.model.classes
    if name.startswith(CIFAR_RESNET):
        depth = name.removeprefix(CIFAR_RESNET)
        if depth.isdigit() and (len(depth) > MOST_DIGITS or int(depth) > len(state)):
            raise DamagedCheckpoint(
                f"{path}: it holds {len(state)} of the model's tensors, too few for {shown(name)}"
            )
    if not any(tensor.shape[:1] == (n_classes,) for tensor in state.values()):
        raise DamagedCheckpoint(
            f"{path}: no tensor has a row for each of model.num_classes = {n_classes} classes"
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
    aux = any(name.endswith("aux.running_mean") for name in state)
    return dual.convert(task.plain_model(), aux)
