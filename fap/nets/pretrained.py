"""Plain weights in a converted model: `model.init`, as fap-export and others write them."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fap import checkpoint
from fap.config import Config
from fap.nets.dual import export, norms
from fap.nets.retinanet import RetinaNet
from pipelines.files import read_regular, shown

MOST_HEADER = 64 << 20  # bytes of names and metadata in a file of weights
MOST_NAMES = 3  # that a message shows
MOST_NAME = 100  # characters of a name that a message shows
BODY = "backbone.body."  # of a detector: where a classifier's weights go
CLASSIFIER_HEAD = "fc."  # of a ResNet; a detector has none
COUNTER = "num_batches_tracked"  # of a batch norm

A_CLASSIFIER = "a classifier's weights; pyramid and heads begin at random"
A_DETECTOR = "weights of the whole detector"

# Of torchvision's published weights: its detectors' heads had ReLUs as children once.
_OLD_HEAD = re.compile(r"(head\.\w+_head\.conv)\.(\d)\.(weight|bias)")


def load_plain(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a plain state dict into a converted model; auxiliary norms become copies of the main.

    Norms that counted no batches, as frozen ones, begin to count at 0. Raises ValueError, before
    anything is copied, if a name or a shape differs.
    """
    own = model.state_dict()
    main_names = _main_names(model)
    counters = [k for k in own if k.endswith(COUNTER) and k not in main_names]
    state = {k: torch.zeros_like(own[k]) for k in counters} | dict(state)
    wrong = {
        "missing": [k for k in own if k not in main_names and k not in state],
        "unknown to the model": [k for k in state if k not in own or k in main_names],
        "of another shape or type": _differences(own, state, own.keys() - main_names.keys()),
    }
    if any(wrong.values()):
        found = [f"{len(names)} {what} ({_few(names)})" for what, names in wrong.items() if names]
        raise ValueError(f"the weights do not fit the model: tensors: {'; '.join(found)}")
    copies = {aux: state[main] for aux, main in main_names.items()}
    model.load_state_dict({**state, **copies})


def _main_names(model: nn.Module) -> dict[str, str]:
    """Names of the auxiliary norms' tensors -> those of the main norms' that they begin as."""
    names: dict[str, str] = {}
    dual = set(norms(model))
    for path, module in model.named_modules():
        if module in dual and module.aux is not None:
            prefix = f"{path}." if path else ""
            names |= {f"{prefix}aux.{k}": f"{prefix}{k}" for k in module.aux.state_dict()}
    return names


def _differences(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], names: set[str]
) -> list[str]:
    """Of the `names` that both have, those whose shapes or sorts of numbers differ; sorted.

    Floating-point types may differ: loading converts them.
    """
    found: list[str] = []
    for name in names & state.keys():
        ours = own[name]
        theirs = state[name]
        if theirs.shape != ours.shape:
            found.append(f"{name}: {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
        elif theirs.is_floating_point() != ours.is_floating_point():
            found.append(f"{name}: {theirs.dtype} instead of {ours.dtype}")
    return sorted(found)


def _few(names: Sequence[str]) -> str:
    few = ", ".join(shown(name, MOST_NAME) for name in names[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        few += f" and {len(names) - MOST_NAMES:,} more"
    return few


def load_init(model: nn.Module, path: str, config: Config, say: Callable[[str], object]) -> None:
    """Start a converted model from the plain weights in a .safetensors file (`model.init`).

    A detector's may be those of a classifier: they go to its backbone, and the rest keeps its
    random weights. `say` is told which of the two it is, and where the file's header, as fap-export
    writes it, states other inputs or another model than `config`. Raises ValueError, before
    anything is copied, for what is no such file or does not fit.
    """
    where = f"model.init = {shown(path)}"
    held = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    # Weights in float64 are twice as large as ours.
    most_bytes = 2 * held + MOST_HEADER
    try:
        file = Path(os.path.expanduser(path))
        state, header = weights_in(read_regular(file, most_bytes), file)
        what = ""
        if isinstance(model, RetinaNet):
            state, what = _of_detector(model, state)
        load_plain(model, state)
    except FileNotFoundError:
        raise ValueError(f"{where}: no such file") from None
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if what:
        say(f"{where}: {what}")
    if what == A_CLASSIFIER:
        header.pop("model", None)  # that it is another model is no doubt
    for warning in _doubts(header, config):
        say(f"warning: {where} {warning}")


def _of_detector(
    detector: RetinaNet,
    state: Mapping[str, Tensor],  # of a detector, or of a classifier
) -> tuple[dict[str, Tensor], str]:
    """A plain state dict of the whole detector, and what `state` was."""
    if any(name.startswith(BODY) for name in state):
        return _with_new_names(state), A_DETECTOR
    plain = export(detector.state_dict())
    rest = {k: v for k, v in plain.items() if not k.startswith(BODY)}
    # Whatever else does not fit goes there too, so that an error shows it.
    body = {BODY + k: v for k, v in state.items() if not k.startswith(CLASSIFIER_HEAD)}
    return rest | body, A_CLASSIFIER


def _with_new_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a detector's heads: conv.2.weight, the second convolution, is now conv.1.0.weight."""

    def new(old: re.Match[str]) -> str:
        return f"{old[1]}.{int(old[2]) // 2}.0.{old[3]}"

    return {_OLD_HEAD.sub(new, name): tensor for name, tensor in state.items()}


def _doubts(header: Mapping[str, str], config: Config) -> list[str]:
    """What a file's header states otherwise than the config; what it does not state is no doubt."""
    doubts = []
    for field, ours in (("mean", config.data.mean), ("std", config.data.std)):
        stated = _number_or_text(header.get(field, "null"))
        if stated not in (None, list(ours)):
            doubts.append(
                f"was trained with {field} = {shown(stated)}, but data.{field} = {list(ours)}: "
                "it knows its inputs on another scale"
            )
    name = config.model.name
    stated = header.get("model", name)
    if stated != name:
        doubts.append(f"holds weights of {shown(stated)}, but model.name = {shown(name)}")
    return doubts


def weights_in(content: bytes, file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header in the content of a file of plain weights.

    Raises OSError; ValueError for any other file.
    """
    try:
        state = safetensors.torch.load(content)
        header_end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:header_end]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        # Not by its suffix: whatever it is called, a pickle is never loaded.
        raise ValueError(
            f"no safetensors file ({shown(str(error))}); {_how_to_convert(file)}"
        ) from None
    if any(name.startswith("momentum.") for name in state):
        raise ValueError("a run's checkpoint; fap-export makes plain weights of it")
    if "crc32" in header:  # of fap-export
        try:
            checkpoint.load(file)
        except checkpoint.DamagedCheckpoint as error:
            raise ValueError(str(error)) from None
    return state, header


def _how_to_convert(file: Path) -> str:
    load = f"torch.load({file.name!r}, map_location='cpu', weights_only=True)"
    # Cloned, because safetensors refuses tensors that share a storage.
    tensors = f"{{k: v.clone() for k, v in {load}.items()}}"
    save = f"save_file({tensors}, {file.with_suffix('.safetensors').name!r})"
    code = f"import torch; from safetensors.torch import save_file; {save}"
    return (
        "a file of torch.save (.pth, .pt, .bin) is converted, in its folder, "
        f'by: python -c "{code}"'
    )


def _number_or_text(text: str) -> Any:
    """What JSON text says, or the text itself where it is none: a header may say anything."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
