"""The data of a run: opened, counted, and its classes matched, before anything is built or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pipelines
from fap.config import Config
from fap.tasks.labels import SAME_CLASSES, Matching, match_classes
from pipelines.files import readable, shown

NAMES_SHOWN = 3  # class names at either end of the list


@dataclass(frozen=True)
class RunData:
    """`train` and `val`, and what they are: see `Store.identity`."""

    train: pipelines.Store
    val: pipelines.Store
    train_identity: dict[str, Any]
    val_identity: dict[str, Any]
    n_classes: int  # of the model
    matching: Matching  # of val's classes with the model's
    lines: list[str]  # what a reader would check before a long run


def open_data(config: Config) -> RunData:
    """Open data.train and data.val and settle the number of classes.

    Raises:
        ValueError: a field is unset, `model.num_classes` is not the data's, or the classes of the
        two do not match.
        DamagedData: as the stores raise it.
    """
    train = _open("train", config)
    train.check_classes()  # data.val may hold few classes, and its names must be among these
    val = _open("val", config)
    n_classes = _class_count(config, train)
    matching = _match(train, val, n_classes)
    lines = [*_lines("train", train), *_lines("val", val)]
    if train.classes is None and config.model.num_classes is None:
        lines.append(
            f"classes    {n_classes}: data.train has no class names, its largest label is"
            f" {n_classes - 1}"
        )
    return RunData(train, val, train.identity(), val.identity(), n_classes, matching, lines)


def _open(field: Literal["train", "val"], config: Config) -> pipelines.Store:
    path = getattr(config.data, field)
    if path is None:
        raise ValueError(
            f"data.{field} is not set: give a .beton file (make one with fap-convert) or an image"
            " folder"
        )
    store = pipelines.open_store(path)
    least = int(store.labels.min())
    most = int(store.labels.max())
    if least < 0:
        raise ValueError(
            f"data.{field} = {readable(store.path)} holds labels {least} to {most}: a label must"
            " not be negative"
        )
    return store


def _class_count(config: Config, train: pipelines.Store) -> int:
    """The model's classes: those that data.train names, else as many as `model.num_classes` or the
    labels say.
    """
    path = readable(train.path)
    wanted = config.model.num_classes
    most = int(train.labels.max())
    if train.classes is not None:
        found = len(train.classes)
        if wanted is not None and wanted != found:
            raise ValueError(
                f"model.num_classes = {wanted}, but data.train = {path} names {found} classes"
                f" ({_names(train.classes)}): write model.num_classes={found}, or leave it out"
            )
    else:
        found = most + 1 if wanted is None else wanted
        if most >= found:
            raise ValueError(
                f"model.num_classes = {found}, but data.train = {path} holds labels 0 to {most}"
            )
    if found < 2:
        raise ValueError(
            f"data.train = {path} has a single class, so there is nothing to learn; are the class"
            " folders deeper?"
        )
    return found


def _match(train: pipelines.Store, val: pipelines.Store, n_classes: int) -> Matching:
    """By name where both have names, so that data.val may lack classes; by number where neither
    has.
    """
    where = f"data.val = {readable(val.path)}"
    if (train.classes is None) != (val.classes is None):
        named, nameless = ("val", "train") if train.classes is None else ("train", "val")
        raise ValueError(
            f"data.{named} has class names and data.{nameless} has none, so labels could only be"
            " compared by number, and a wrong order gives wrong accuracies without a word: convert"
            " both with fap-convert, which writes the names; or read both without names, as a"
            " .beton whose .json is put aside"
        )
    if train.classes is not None and val.classes is not None:
        if val.classes == train.classes:
            return SAME_CLASSES
        try:
            return Matching("by name", match_classes(val.classes, train.classes))
        except ValueError as error:
            raise ValueError(
                f"{where} does not fit data.train = {readable(train.path)}: {error}"
            ) from None
    most = int(val.labels.max())
    if most >= n_classes:
        raise ValueError(
            f"{where} holds labels up to {most}, but the model has {n_classes} classes"
        )
    return SAME_CLASSES


def _lines(field: str, store: pipelines.Store) -> list[str]:
    first, *more = [*store.describe(), *store.notes]
    return [f"{field:10} {first}", *(f"{'':10} {line}" for line in more)]


def _names(classes: Sequence[str]) -> str:
    """All of a few names, else the first and the last ones."""
    if len(classes) <= 2 * NAMES_SHOWN:
        return ", ".join(map(shown, classes))
    first = ", ".join(map(shown, classes[:NAMES_SHOWN]))
    last = ", ".join(map(shown, classes[-NAMES_SHOWN:]))
    return f"{first} ... {last}"
