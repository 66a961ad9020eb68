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
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fap import checkpoint
from fap.checkpoint import DamagedCheckpoint, brief
from fap.config import Config
from fap.nets import norm
from fap.run_meta import RunMeta, run_meta
from fap.tasks import make_task
from fap.tasks.base import Task
from pipelines.files import shown

SUFFIX = ".safetensors"
# Not torch.tensor and torch.arange: torchvision computes RegNet's widths with them.
_STORAGE = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a training run."""

    model: nn.Module  # converted, in evaluation mode
    config: Config
    meta: RunMeta
    content: str  # the file's checksum and size

    @property
    def task(self) -> Task:
        return make_task(self.config)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Trained:
    """The converted model of a run's checkpoint, in evaluation mode.

    Raises DamagedCheckpoint, OSError, or ValueError for a checkpoint that is not of a training run.
    """
    state, meta, config, content = _read(path)
    model = _converted(config, state)
    model.load_state_dict(state)
    model.to(device)
    model.to(memory_format=torch.channels_last)
    return Trained(model.eval(), config, meta, content)


def export(path: str | Path, out: str | Path) -> dict[str, str]:
    """Write the plain model of a run's checkpoint; returns the metadata written beside it, as text.

    The file's tensors are a state dict that the unconverted torchvision or timm model loads with
    strict=True, which is tried before this function returns. Raises as `load_model`; ValueError too
    if `out` exists or is named like another format.
    """
    out = Path(out)
    if out.suffix != SUFFIX:
        raise ValueError(
            f"{out}: only {SUFFIX} files are written, no {out.suffix or 'other'} ones; choose"
            f" NAME{SUFFIX}"
        )
    if out.is_symlink() or out.exists():
        raise ValueError(f"{out} exists; choose another name or remove it first")
    state, meta, config, _ = _read(path)
    n_classes = config.model.classes
    header = {"num_classes": n_classes, "size": config.data.size, "step": meta.step,
              "mean": config.data.mean, "std": config.data.std}  # fmt: skip
    text = {"model": config.model.name, "run": config.name} | {
        k: json.dumps(v) for k, v in header.items()
    }
    plain = make_task(config).plain_model()
    weights = norm.export(state, meta.step)
    _load_strictly(plain, weights, path)
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


def _load_strictly(plain: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    try:
        plain.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: the plain model does not load these weights: {brief(error)}"
        ) from None


def _read(path: str | Path) -> tuple[dict[str, Tensor], RunMeta, Config, str]:
    """The model's tensors, the metadata, the config and the content, each checked and all fitting
    together.
    """
    tensors, tree, content = checkpoint.load_with_content(path)
    meta = run_meta(path, tree)
    config = meta.config
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    _check_model(path, config, state)
    return state, meta, config, content


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
    """Raise DamagedCheckpoint unless `state` is that of the config's model, and images of the
    config's size fit it.
    """
    name = config.model.name
    n_classes = config.model.classes
    depth = name.removeprefix("cifar_resnet")
    # Even without storage a million layers, or a table per class, take a while: the file must have
    # them.
    if depth != name and depth.isdigit() and (len(depth) > 9 or int(depth) > len(state)):
        raise DamagedCheckpoint(
            f"{path}: it holds {len(state)} of the model's tensors, too few for {shown(name)}"
        )
    if not any(t.shape[:1] == (n_classes,) for t in state.values()):
        raise DamagedCheckpoint(
            f"{path}: no tensor has a row for each of model.num_classes = {n_classes} classes"
        )
    try:
        with warnings.catch_warnings(), _WithoutStorage():
            warnings.simplefilter("ignore")  # of tensors that are not copied
            model = _converted(config, state)
    except ValueError as error:  # it names the field
        raise ValueError(f"{path}: {brief(error)}") from None
    except Exception as error:  # a constructor of torchvision or timm may raise anything
        raise ValueError(
            f"{path}: model.name = {shown(name)} cannot be built: {brief(error)}"
        ) from None
    _compare(path, model.state_dict(), state)
    size = config.data.size
    try:
        with torch.inference_mode():
            model.eval()(torch.empty(1, 3, size, size, device="meta"))
    except Exception as error:
        raise ValueError(
            f"{path}: data.size = {size}: the model does not accept such images: {brief(error)}"
        ) from None


def _compare(path: str | Path, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    for name in sorted(expected.keys() ^ state.keys()):
        what = "is missing" if name in expected else "is none of the model's"
        raise DamagedCheckpoint(f"{path}: tensor {shown('model.' + name)} {what}")
    for name, wanted in expected.items():
        found = state[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise DamagedCheckpoint(
                f"{path}: tensor {shown('model.' + name)} is {found.dtype} of shape"
                f" {shown(tuple(found.shape))}, the config's model has {wanted.dtype} of shape"
                f" {tuple(wanted.shape)}"
            )


def _converted(config: Config, state: dict[str, Tensor]) -> nn.Module:
    """The config's model, with auxiliary norms if `state` has them. The training step's faster stem
    is not needed here.
    """
    aux = any(name.endswith("aux.running_mean") for name in state)
    return norm.convert(make_task(config).plain_model(), aux)
