"""The classes of an evaluation set as the model's: by their names, or by position where allowed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.files import shown

MOST_NAMED = 3  # class names in a message


class Matching(NamedTuple):
    """How the data's labels become the model's."""

    how: str
    """For the report."""
    label_map: Tensor | None = None
    """int64 (K,): the model's class of each of the data's labels; None: they are the same."""
    restrict: bool = False
    """Only the logits of `label_map`'s classes count (ImageNet-R)."""


SAME_CLASSES = Matching("the data's labels are the model's classes")


def match_classes(
    names: Sequence[str],  # the data's
    classes: Sequence[str],  # the model's
) -> Tensor:  # int64 (len(names),)
    """Where each of the data's class names stands among the model's.

    Raises ValueError for a name that is unknown or there twice.
    """
    position = {name: i for i, name in enumerate(classes)}
    if len(position) < len(classes) or len(set(names)) < len(names):
        raise ValueError("a class name is there twice, so classes cannot be told apart by name")
    unknown = [name for name in names if name not in position]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the {len(names)} classes are none of the model's "
            f"{len(classes)} classes, the first being {shown(unknown[0])}; "
            f"the model has {_first(classes)}"
        )
    return torch.tensor([position[name] for name in names])


def match_labels(
    names: Sequence[str] | None,  # the data's classes, in the order of its labels
    labels: tuple[int, int],  # the least and the greatest label
    classes: Sequence[str] | None,  # the model's
    n_classes: int,  # logits of the model
    *,
    by_position: bool = False,
    restrict: bool = False,
) -> Matching:
    """Match labels by class names, or by position where that is all there is.

    Where only one side has names, nothing shows whether the orders agree (folders 0, 1, 10, 100, 2
    are sorted as text), so `by_position` must allow it, and the counts must be equal. `restrict`
    (ImageNet-R) needs names.

    Raises ValueError for labels beyond the classes, and where names or counts do not fit.
    """
    _check_range(names, labels, n_classes)
    if names and classes:
        how = "by name"
        if tuple(names) != tuple(classes):
            how = f"by name ({len(names)} of {len(classes)} classes)"
        return Matching(how, match_classes(names, classes), restrict)

    lacking = "the data"
    if names:
        lacking = "the checkpoint"
    if restrict:
        lack = f"{lacking} has none"
        if not names and not classes:
            lack = "neither the checkpoint nor the data has class names"
        raise ValueError(
            "only the logits of its own classes count, and class names say which those are: "
            f"{lack}; train and evaluate on data with class names, as fap-convert writes it"
        )
    if not names and not classes:
        return Matching("by position (neither side has class names)")
    if not by_position:
        raise ValueError(
            f"{lacking} has no class names, so labels could only be compared by position, and a "
            "wrong order gives a wrong number without a word; use data with class names, for "
            "plain weights --classes FILE, or --labels-by-position if the orders are the same"
        )
    if names and len(names) != n_classes:
        raise ValueError(
            f"it has {len(names)} classes and the model {n_classes}: "
            "labels by position need the same classes on both sides"
        )
    return Matching(f"by position (allowed by --labels-by-position; {lacking} has no class names)")


def _check_range(names: Sequence[str] | None, labels: tuple[int, int], n_classes: int) -> None:
    """Raise ValueError for labels that are beyond the data's own names, or the model's classes."""
    least, greatest = labels
    if names is None:
        known = n_classes
        whose = "the model has"
    else:
        known = len(names)
        whose = "there are names for"
    if least < 0 or greatest >= known:
        raise ValueError(f"its labels are {least} to {greatest}, but {whose} {known} classes")


def _first(names: Sequence[str]) -> str:
    listed = ", ".join(shown(name, 60) for name in names[:MOST_NAMED])
    if len(names) > MOST_NAMED:
        listed += " ..."
    return listed
