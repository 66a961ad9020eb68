"""The model of plain weights: a file, or what a library or the Hub knows by name."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fap.config import load_config
from fap.evaluate.load import Trained
from fap.nets import dual
from fap.nets.build import channels_last
from fap.nets.pretrained import load_strictly
from fap.nets.weights.about import Weights
from fap.nets.weights.files import MOST_BYTES, weights_in
from fap.nets.weights.find import find_weights, is_published
from fap.nets.weights.names import spelt
from fap.nets.weights.of_torchvision import IMAGENET_MEAN, IMAGENET_STD
from fap.nets.weights.settle import resize_for
from fap.tasks import make_task
from pipelines.back_ends import EVAL_FILTERS
from pipelines.files import read_regular, readable

NOT_IN_NAMES = r"[^A-Za-z0-9._-]"  # in those of results
MOST_NAME = 60

IMAGENET_CLASSES = 1000


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
