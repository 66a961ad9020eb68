"""The data of a run: opened, counted, its classes matched, before anything is built or written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

import pipelines
from fap.config import Config
from fap.run.back_end import loader_name
from fap.tasks import task_class
from fap.tasks.labels import SAME_CLASSES, Matching, match_classes
from pipelines.files import readable, shown
from pipelines.sizes import Size
from pipelines.sources import accepted
from pipelines.subset import held_out

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
    train, val = _open_both(config)
    n_classes = _class_count(config, train)
    matching = _match(config, train, val, n_classes)
    not_trained = task_class(config.task).notes(train, config)
    lines = [*_lines("train", train, not_trained), *_lines("val", val)]
    identities = train.identity(), val.identity()
    if identities[0] == identities[1]:
        lines.append("warning: data.val is data.train: what is measured is what is trained")
    if train.classes is None and config.model.num_classes is None:
        lines.append(
            f"classes    {n_classes}: data.train has no class names, "
            f"its largest label is {n_classes - 1}"
        )
    return RunData(train, val, *identities, n_classes, matching, lines)


def open_loader(
    config: Config,
    store: pipelines.Store,
    device: torch.device,
    size: Size | None = None,  # where it is not data.size
) -> pipelines.Loader:
    """The settled config's back end for `store`. ImportError if its package is missing."""
    data = config.data
    name = loader_name(data)
    options = data.model_dump(include=pipelines.loader_options(name))
    return pipelines.open_loader(name, store, size=size or data.size, device=device, **options)


@contextmanager
def closing(loader: pipelines.Loader, say: Callable[[str], Any]) -> Iterator[pipelines.Loader]:
    """Close it after the block; a failure to is secondary, and hides no error of the block."""
    try:
        yield loader
    finally:
        try:
            loader.close()
        except Exception as error:
            say(f"warning: the loader was not closed properly: {error}")


def _open_both(config: Config) -> tuple[pipelines.Store, pipelines.Store]:
    """data.train and data.val, which may be a part of data.train."""
    train = _open("train", config)
    train.check_classes()  # data.val may hold few classes, and its names must be among these
    share = config.data.val_share
    if share is None:
        return train, _open("val", config)
    try:
        return held_out(train, share)
    except ValueError as error:
        raise ValueError(f"data.val_share = {share:g}: {error}") from None


def _open(field: Literal["train", "val"], config: Config) -> pipelines.Store:
    path = getattr(config.data, field)
    if path is None:
        instead = ""
        if field == "val":
            instead = ", or hold out a part of data.train: data.val_share=0.1"
        raise ValueError(
            f"data.{field} is not set: "
            f"give {accepted()} (fap-convert makes a .beton of what else you hold){instead}"
        )
    store = pipelines.open_store(path)
    try:
        least, most = task_class(config.task).labels(store)
    except ValueError as error:
        raise ValueError(f"data.{field} = {error}") from None
    if least < 0:
        raise ValueError(
            f"data.{field} = {readable(store.path)} holds labels {least} to {most}: "
            "a label must not be negative"
        )
    return store


def _class_count(config: Config, train: pipelines.Store) -> int:
    """The model's classes: those that data.train names, else what the config or the labels say."""
    path = readable(train.path)
    wanted = config.model.num_classes
    _, most = task_class(config.task).labels(train)
    if train.classes is not None:
        found = len(train.classes)
        if wanted is not None and wanted != found:
            raise ValueError(
                f"model.num_classes = {wanted}, but data.train = {path} names {found} classes "
                f"({_names(train.classes)}): write model.num_classes={found}, or leave it out"
            )
    else:
        found = most + 1
        if wanted is not None:
            found = wanted
        if most >= found:
            raise ValueError(
                f"model.num_classes = {found}, but data.train = {path} holds labels 0 to {most}"
            )
    if found < task_class(config.task).fewest_classes:
        raise ValueError(
            f"data.train = {path} has a single class, so there is nothing to learn; "
            "are the class folders deeper?"
        )
    return found


def _match(
    config: Config, train: pipelines.Store, val: pipelines.Store, n_classes: int
) -> Matching:
    """By name where both have names, so that data.val may lack classes; else by number."""
    where = f"data.val = {readable(val.path)}"
    if train.classes is None and val.classes is None:
        _, most = task_class(config.task).labels(val)
        if most >= n_classes:
            raise ValueError(
                f"{where} holds labels up to {most}, but the model has {n_classes} classes"
            )
        return SAME_CLASSES
    if train.classes is None:
        raise ValueError(_one_sided("val", "train"))
    if val.classes is None:
        raise ValueError(_one_sided("train", "val"))
    if val.classes == train.classes:
        return SAME_CLASSES
    try:
        return Matching("by name", match_classes(val.classes, train.classes))
    except ValueError as error:
        raise ValueError(
            f"{where} does not fit data.train = {readable(train.path)}: {error}"
        ) from None


def _one_sided(named: str, nameless: str) -> str:
    return (
        f"data.{named} has class names and data.{nameless} has none, "
        "so labels could only be compared by number, "
        "and a wrong order gives wrong accuracies without a word: "
        "convert both with fap-convert, which writes the names; "
        "or read both without names, as a .beton whose .json is put aside"
    )


def _lines(field: str, store: pipelines.Store, notes: Sequence[str] = ()) -> list[str]:
    first, *more = [*store.describe(), *store.notes, *notes]
    return [f"{field:10} {first}", *(f"{'':10} {line}" for line in more)]


def _names(classes: Sequence[str]) -> str:
    """All of a few names, else the first and the last ones."""
    names = [shown(name) for name in classes]
    if len(names) <= 2 * NAMES_SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:NAMES_SHOWN])} ... {', '.join(names[-NAMES_SHOWN:])}"
