"""Models to evaluate: which kind each one is that a user names, and how it is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm

from fap.checkpoint import FOLDER, checkpoint_at
from fap.evaluate.load import Trained, WhichWeights, load_model
from fap.evaluate.plain_weights import load_weights
from fap.nets.dual import has_aux
from fap.nets.weights.files import CONFIG, is_file_of_a_run
from fap.nets.weights.find import HUB, TIMM, is_published
from fap.nets.weights.names import TORCHVISION, near, torchvision_names
from pipelines.files import readable, shown

PREFIXES = (TORCHVISION, TIMM, HUB)
KINDS = (
    "a run's folder, a step_*.safetensors of it, a .safetensors or .pth file of weights, "
    "torchvision:WEIGHTS, timm:MODEL.TAG or hf-hub:USER/REPOSITORY"
)


@dataclass(frozen=True)
class Model:
    """A run's checkpoint, or plain weights."""

    source: Path
    """The checkpoint; of plain weights a file, a folder of the Hub's kind, or torchvision:..."""
    words: tuple[str, ...] | None = None
    """The config of plain weights as `key=value`; None: a run's checkpoint, which has its own."""
    classes: tuple[str, ...] | None = None
    """Names of the outputs of plain weights; None: those that the weights know."""
    weights: WhichWeights | None = None
    """Of a checkpoint; None: the average if there is one."""

    @property
    def is_plain(self) -> bool:
        return self.words is not None

    def load(self, device: str = "cpu") -> Trained:
        """Raises ValueError, OSError, DamagedCheckpoint."""
        if self.words is None:
            return load_model(self.source, device, self.weights)
        return load_weights(self.source, self.words, self.classes, device)


def model_of(
    source: str,
    *,
    words: Sequence[str] = (),
    classes: tuple[str, ...] | None = None,
    weights: WhichWeights | None = None,
    best: bool = False,
) -> Model:
    """What `source` names. `words` and `classes` are used if it is plain weights, else left alone.

    `weights` and `best` (the best epoch and not the newest) are for a run. Raises ValueError for
    what is no model, OSError.
    """
    if is_plain(source):
        return Model(Path(source), tuple(words), classes)
    return Model(checkpoint_at(source, best=best), weights=weights)


def is_plain(source: str) -> bool:
    """Plain weights, not a run? Raises ValueError for what is neither, OSError."""
    if is_published(source):
        return True
    path = Path(source)
    try:
        os.lstat(path)
    except FileNotFoundError:
        raise ValueError(
            f"{readable(path)}: no such file or folder{_meant(source)}; give {KINDS}"
        ) from None
    if path.is_dir():
        return (path / CONFIG).is_file() and not (path / FOLDER).is_dir()
    return not is_file_of_a_run(path)


def check_bn(model: Model, trained: Trained, bn: str) -> None:
    """ValueError for norms that the loaded model has not."""
    if bn == "aux" and not has_aux(trained.model):
        raise ValueError(
            f"--bn aux: {model.source} was trained without auxiliary norms; only main is there"
        )


def _meant(source: str) -> str:
    """A hint for a name that is misspelt, or stands without its prefix; or nothing."""
    first, colon, name = source.partition(":")
    if colon:
        hint = near(first + colon, PREFIXES)
        # Of the prefix the whole name, which can be copied.
        return hint.replace("?", f"{name}?").replace(" or ", f"{name} or ") if hint else ""
    places = [TORCHVISION] if source in torchvision_names() else []
    if timm.is_model(source):
        places.append(TIMM)
    if not places:
        return ""
    return f"; did you mean {' or '.join(place + source for place in places)}?"


# ---------------------------------------------------------------------- options


def check_words(option: str, words: Sequence[str]) -> None:
    """ValueError unless all are `key=value`."""
    for word in words:
        if "=" not in word:
            raise ValueError(f"{option}: {shown(word)} is no KEY=VALUE")


def refuse_idle(
    models: Sequence[Model],
    *,
    classes: tuple[str, ...] | None,  # of --classes
    runs: Mapping[str, object],  # the options for runs, with their values
) -> None:
    """ValueError for options that would be ignored."""
    if classes is not None and not any(model.classes == classes for model in models):
        raise ValueError(
            "--classes is about plain weights, and no model given takes it: a run's checkpoint "
            "knows its classes, and classes=FILE of a --model comes first"
        )
    for option, given in runs.items():
        if given and all(model.is_plain for model in models):
            raise ValueError(f"{option} is about a run's checkpoints, and here are plain weights")
