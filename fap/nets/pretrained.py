"""Plain weights in a converted model: `model.init`, and what fap-export writes."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from fap.config import Config
from fap.nets.norm import norms
from pipelines.files import read_regular, shown

MOST_HEADER = 64 << 20  # bytes of names and metadata in a file of weights


def load_plain(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a plain state dict into a converted model; the auxiliary norms become copies of the main
    ones.

    Raises ValueError, before anything is copied, if a name or a shape differs.
    """
    own, copies = model.state_dict(), _auxiliary_names(model)
    missing = [k for k in own if k not in copies and k not in state]
    unexpected = [k for k in state if k not in own or k in copies]
    other: list[str] = []
    for k in own.keys() & state.keys() - copies.keys():
        if state[k].shape != own[k].shape:
            other.append(f"{k}: {(*state[k].shape,)} instead of {(*own[k].shape,)}")
        elif state[k].is_floating_point() != own[k].is_floating_point():
            other.append(f"{k}: {state[k].dtype} instead of {own[k].dtype}")
    wrong = {
        "missing": missing,
        "unknown to the model": unexpected,
        "of another shape or type": sorted(other),
    }
    if any(wrong.values()):
        found = [f"{len(names)} {what} ({_few(names)})" for what, names in wrong.items() if names]
        raise ValueError(f"the weights do not fit the model: tensors: {'; '.join(found)}")
    model.load_state_dict({**state, **{k: state[source] for k, source in copies.items()}})


def _auxiliary_names(model: nn.Module) -> dict[str, str]:
    """Names of the auxiliary norms' tensors -> those of the main norms' that they begin as."""
    names: dict[str, str] = {}
    dual = set(norms(model))
    for path, module in model.named_modules():
        if module in dual and module.aux is not None:
            prefix = f"{path}." if path else ""
            names |= {f"{prefix}aux.{k}": f"{prefix}{k}" for k in module.aux.state_dict()}
    return names


def _few(names: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(shown(name, 100) for name in names[:most]) + rest


def load_init(model: nn.Module, path: str, config: Config, say: Callable[[str], object]) -> None:
    """Start a converted `model` from the plain weights in the .safetensors file `path`
    (`model.init`).

    `say` is told where the file's header, as fap-export writes it, states other inputs or another
    model than `config`. Raises ValueError, before anything is copied, for what is no such file or
    does not fit.
    """
    where = f"model.init = {shown(path)}"
    held = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    try:
        # Weights in float64 are twice as large as ours.
        state, header = _read_weights(Path(os.path.expanduser(path)), 2 * held + MOST_HEADER)
        load_plain(model, state)
    except FileNotFoundError:
        raise ValueError(f"{where}: no such file") from None
    except OSError as e:
        raise ValueError(f"{where}: {e.strerror or e}") from None
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None
    for field, ours in (("mean", config.data.mean), ("std", config.data.std)):
        stated = _number_or_text(header.get(field, "null"))
        if stated not in (None, list(ours)):
            say(
                f"warning: {where} was trained with {field} = {shown(stated)}, but data.{field} ="
                f" {list(ours)}: it knows its inputs on another scale"
            )
    stated = header.get("model", config.model.name)
    if stated != config.model.name:
        say(
            f"warning: {where} holds weights of {shown(stated)}, but model.name ="
            f" {shown(config.model.name)}"
        )


def _read_weights(file: Path, most: int) -> tuple[dict[str, Tensor], dict[str, str]]:  # bytes
    """Tensors and header of a file of plain weights. Raises OSError; ValueError for any other file."""
    from fap import checkpoint  # not at the top: that module builds models

    content = read_regular(file, most)
    try:
        state = safetensors.torch.load(content)
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as e:
        # Not by its suffix: whatever it is called, a pickle is never loaded.
        raise ValueError(
            f"no safetensors file ({shown(str(e))}); {_how_to_convert(file)}"
        ) from None
    if any(name.startswith("momentum.") for name in state):
        raise ValueError("a run's checkpoint; fap-export makes plain weights of it")
    if "crc32" in header:  # of fap-export
        try:
            checkpoint.load(file)
        except checkpoint.DamagedCheckpoint as e:
            raise ValueError(str(e)) from None
    return state, header


def _how_to_convert(file: Path) -> str:
    load = f"torch.load({file.name!r}, map_location='cpu', weights_only=True)"
    save = (
        f"save_file({{k: v.clone() for k, v in {load}.items()}},"
        f" {file.with_suffix('.safetensors').name!r})"
    )
    code = f"import torch; from safetensors.torch import save_file; {save}"
    return (
        "a file of torch.save (.pth, .pt, .bin) is converted, in its folder, by: python -c"
        f' "{code}"'
    )


def _number_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
