"""Weights in files: .safetensors, torch.save's, a run's checkpoint, a folder as the Hub has them.

A file is data, whoever wrote it and whatever it is called. Its content says what it is, its size
is bounded, and no pickle is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fap import checkpoint
from fap.nets.dual import export
from fap.nets.weights.about import About, Weights, class_names, from_header, from_timm
from fap.nets.weights.torch_file import is_torch_file, tensors_in
from fap.run_meta import RunMeta, run_meta
from pipelines.files import first_bytes, read_regular, readable, shown

MOST_BYTES = 16 << 30  # of a file of weights
MOST_HEADER = 100 << 20  # bytes of a safetensors file's header, which its library allows
HEAD = 32  # bytes that say whether a file is one of torch.save
MOST_CONFIG = 16 << 20  # bytes of a config.json, label names and all
CONFIG = "config.json"  # of a folder as the Hugging Face Hub has it
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel, and of torch.compile
NO_META = "{}"  # of what fap-export writes
OF_A_RUN = "model."  # a checkpoint has more than the model: momentum, counters
AVERAGE = "ema."  # of the weights of a run with optim.ema; counters have none
# Arguments of a model's constructor that `model.name`, `model.num_classes`, `data.size` express.
KNOWN_ARGUMENTS = {"img_size", "num_classes", "in_chans"}


def from_path(path: str) -> Weights:
    """Weights of a file, a run's folder or checkpoint, or a folder with a config.json.

    Raises OSError, ValueError, DamagedCheckpoint; none of them names `path` for certain.
    """
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        if (place / CONFIG).is_file():
            return replace(_of_hub_folder(place), origin=path)
        place = checkpoint.checkpoint_at(place)
    content = read_regular(place, MOST_BYTES)
    if _is_of_a_run(content):
        return replace(_of_run(place), origin=path)
    return replace(weights_in(content, place), origin=path)


def weights_in(content: bytes, file: Path) -> Weights:
    """Plain weights in the content of `file`.

    Raises OSError; ValueError for any other file.
    """
    if is_torch_file(content):
        state, notes = tensors_in(content)
        about = About()
    else:
        state, header = _safetensors_in(content)
        if _is_of_a_run(content) or any(name.startswith("momentum.") for name in state):
            raise ValueError("a run's checkpoint, no plain weights; fap-export makes them of it")
        if "crc32" in header:  # of fap-export
            _check(file)
        about, notes = from_header(header)
    state, more = _without_prefixes(state)
    return Weights(str(file), state, about, (*notes, *more))


def _safetensors_in(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        state = safetensors.torch.load(content)
        header = _header(content).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"neither a safetensors file ({shown(str(error))}) nor one of torch.save"
        ) from None
    return state, header


def _header(content: bytes) -> dict[str, Any]:
    end = 8 + int.from_bytes(content[:8], "little")
    found = json.loads(content[8:end])
    if not isinstance(found, dict):
        raise ValueError("its header is no mapping")
    return found


def _check(file: Path) -> None:
    """Compare the checksum that a file of ours states with its content."""
    try:
        checkpoint.load(file)
    except checkpoint.DamagedCheckpoint as error:
        raise ValueError(str(error)) from None


def _without_prefixes(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Names as the model has them, whatever wrapped it when it was saved."""
    found = dict(state)
    cut = ""
    while found:
        shared = [p for p in PREFIXES if all(name.startswith(p) for name in found)]
        if not shared:
            break
        cut += shared[0]
        found = {name.removeprefix(shared[0]): tensor for name, tensor in found.items()}
    return found, [f"its names are read without the prefix {cut!r}"] if cut else []


# ---------------------------------------------------------------------- ours


def is_file_of_a_run(file: Path) -> bool:
    """A run's checkpoint, not plain weights? Its first bytes say it.

    Raises ValueError for a file that is neither, OSError.
    """
    head = first_bytes(file, HEAD)
    if is_torch_file(head):
        return False
    end = 8 + int.from_bytes(head[:8], "little")
    head = first_bytes(file, min(end, MOST_HEADER))
    try:
        _header(head)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{readable(file)}: neither a safetensors file, which a run's checkpoint is too, nor "
            "one of torch.save"
        ) from None
    return _is_of_a_run(head)


def _is_of_a_run(content: bytes) -> bool:
    """Has the file the header of a run's checkpoint?"""
    try:
        header = _header(content)
        is_a_models = any(name.startswith(OF_A_RUN) for name in header)
        return is_a_models and header["__metadata__"]["meta"] != NO_META
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def _of_run(path: Path) -> Weights:
    """What fap-export would write: the main norms' weights, their average if the run has one."""
    tensors, tree = checkpoint.load(path)
    meta = run_meta(path, tree)
    model = {k.removeprefix(OF_A_RUN): v for k, v in tensors.items() if k.startswith(OF_A_RUN)}
    average = {k.removeprefix(AVERAGE): v for k, v in tensors.items() if k.startswith(AVERAGE)}
    what = "its main norms"
    if average:
        what += ", the average of its weights"
    note = f"step {meta.step:,} of run {meta.config.name}, {what} ({readable(path)})"
    return Weights(str(path), export(model | average, meta.step), about_run(meta), (note,))


def about_run(meta: RunMeta) -> About:
    config = meta.config
    resize = None
    if config.data.crop != "letterbox":  # which knows no resize
        resize = config.data.resize
    return About(
        architecture=config.model.name,
        num_classes=config.model.num_classes,
        classes=meta.train.classes,
        mean=config.data.mean,
        std=config.data.std,
        size=config.data.size,
        resize=resize,
        interpolation=config.data.eval_filter,
    )


# ---------------------------------------------------------------------- the Hub's


def _of_hub_folder(folder: Path) -> Weights:
    """timm's `local-dir:`, or what fap-export writes of another library's model."""
    config = json_object(folder / CONFIG)
    about, notes = about_hub_config(config)
    for name in HUB_FILES:
        if (folder / name).is_file():
            found = weights_in(read_regular(folder / name, MOST_BYTES), folder / name)
            return replace(found, about=about, notes=(*notes, *found.notes))
    raise ValueError(f"it has a {CONFIG}, but no {' and no '.join(HUB_FILES)}")


def json_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_regular(file, MOST_CONFIG))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{readable(file)}: no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{readable(file)}: no mapping")
    return found


def about_hub_config(config: Mapping[str, Any]) -> tuple[About, list[str]]:
    """What a config.json of timm's kind says. ValueError for a model that a name cannot express."""
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise ValueError(f"its {CONFIG} names no 'architecture', as timm's do")
    cfg = config.get("pretrained_cfg", config)
    arguments = config.get("model_args") or {}
    if not isinstance(cfg, dict) or not isinstance(arguments, dict):
        raise ValueError(f"its {CONFIG} is none of timm's")
    more = sorted(str(name) for name in arguments.keys() - KNOWN_ARGUMENTS)
    if more:
        raise ValueError(
            f"its model is {shown(architecture)} with other arguments "
            f"({shown(', '.join(more))}), which model.name cannot express"
        )
    # fap-export says where the model is from; timm's own files need not.
    library = "" if config.get("library") in ("torchvision", "fap") else "timm/"
    classes = {"num_classes": config["num_classes"]} if "num_classes" in config else {}
    about, notes = from_timm({**cfg, **classes}, library + architecture.removeprefix("timm/"))
    return replace(about, classes=class_names(config.get("label_names"))), notes
