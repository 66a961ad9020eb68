"""Plain weights in a converted model: those of `model.init`, or of a file that is evaluated."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn, zeros_like
from torchvision.models import vision_transformer

from fap.nets.dual import export, names_of_main
from fap.nets.head import head_parameters
from fap.nets.retinanet import RetinaNet
from fap.nets.weights.about import Weights
from fap.nets.weights.find import named
from fap.nets.weights.of_torchvision import with_current_names
from pipelines.files import one_line, shown

MOST_NAMES = 3  # that a message shows
MOST_NAME = 100  # characters of a name that a message shows
BODY = "backbone.body."  # of a detector: where a classifier's weights go
CLASSIFIER_HEAD = "fc."  # of a ResNet; a detector has none
COUNTER = "num_batches_tracked"  # of a batch norm
POSITIONS = "encoder.pos_embedding"  # of torchvision's vision transformers
TIMMS_FILTER = "checkpoint_filter_fn"  # of the module of each model that has had other names

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
    main_names = names_of_main(model)
    counters = [k for k in own if k.endswith(COUNTER) and k not in main_names]
    state = {k: zeros_like(own[k]) for k in counters} | dict(state)
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


def load_init(
    model: nn.Module,
    name: str,  # of the model, as the user knows it
    weights: Weights,
    n_classes: int,
    say: Callable[[str], object],
) -> None:
    """Start a converted model of `n_classes` from weights (`model.init`).

    A detector's may be those of a classifier: they go to its backbone, and the rest keeps its
    random weights. So does the head, if the weights have other classes or none. `say` is told all
    of this. Raises ValueError, before anything is copied, for what does not fit.
    """
    state: Mapping[str, Tensor] = weights.state
    where = named(weights.origin)
    said = []
    try:
        if isinstance(model, RetinaNet):
            state, what = _of_detector(model, state)
            said.append(what)
        state = _as_of_today(model, state)
        state, replaced = _with_own_head(model, state, n_classes)
        said += replaced
        load_plain(model, state)
    except ValueError as error:
        raise ValueError(f"{where} for model.name = {shown(name)}: {error}") from None
    for line in said:
        say(f"{where}: {line}")


def load_strictly(model: nn.Module, weights: Weights) -> None:
    """Weights of this very model, its head included. Raises ValueError for others."""
    state = weights.state
    if isinstance(model, RetinaNet):
        state = _with_new_names(state)
    load_plain(model, _as_of_today(model, state))


def _with_own_head(
    model: nn.Module, state: Mapping[str, Tensor], n_classes: int
) -> tuple[Mapping[str, Tensor], list[str]]:
    """`state` with the model's own head where that of the weights is of other classes, or absent.

    And what to say of it. Only tensors of the head whose first dimension alone differs are
    replaced: anything else that does not fit is left for an error.
    """
    own = export(model.state_dict())
    head = {name for name in head_parameters(model) if name in own}
    missing = head - state.keys()
    differ = {name for name in head - missing if state[name].shape != own[name].shape}
    if head and missing == head:
        kept = {name: own[name] for name in head}
        return {**state, **kept}, [f"no head in the weights; that of {n_classes:,} classes is new"]
    rows = {(len(own[name]), state[name].shape[:1].numel()) for name in differ}
    is_count = all(state[name].shape[1:] == own[name].shape[1:] for name in differ)
    layers = {name.rpartition(".")[0] for name in differ}
    of_layers = {name for name in head if name.rpartition(".")[0] in layers}
    if missing or len(rows) != 1 or not is_count or of_layers != differ:
        return state, []
    ((ours, theirs),) = rows
    before = theirs * n_classes // ours  # a detector's head has rows for each anchor
    kept = {name: own[name] for name in differ}
    return {**state, **kept}, [f"head of {before:,} classes replaced by one of {n_classes:,}"]


# ---------------------------------------------------------------------- names and sizes of others


def _as_of_today(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state with the names that the model has now, and resampled to its size of images.

    What libraries do to their own published files. It is returned as it is where it fits, but for
    the head, or where this does not help.
    """
    own = export(model.state_dict())
    if _fits(own, state, model):
        return state
    renamed = with_current_names(state)
    if POSITIONS in renamed and POSITIONS in own:
        renamed = _resampled(model, renamed)
    if _fits(own, renamed, model):
        return renamed
    adapted = getattr(sys.modules[type(model).__module__], TIMMS_FILTER, None)
    if adapted is None:
        return state
    try:
        by_timm = adapted(dict(state), model)
    except Exception as error:  # of a function that expects another state
        raise ValueError(
            f"the weights do not fit the model, and timm cannot adapt them: {one_line(error, 150)}"
        ) from None
    if isinstance(by_timm, Mapping) and _fits(own, by_timm, model):
        return by_timm
    return state


def _fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Are names and shapes those of the model, but for its head and counters?"""
    head = head_parameters(model)
    free = head | {name for name in own if name.endswith(COUNTER)}
    wanted = {name: tensor.shape for name, tensor in own.items() if name not in free}
    found = {name: tensor.shape for name, tensor in state.items() if name not in free}
    return wanted == found


def _resampled(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Position embeddings of torchvision's vision transformers for the model's size of images."""
    try:
        found = vision_transformer.interpolate_embeddings(
            model.image_size, model.patch_size, dict(state)
        )
    except ValueError:  # of a shape that is none of theirs
        return dict(state)
    return dict(found)


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
