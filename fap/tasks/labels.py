"""The classes of an evaluation set as the model's: by their names, or by position where allowed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.files import shown

MOST_NAMED = 3  # class names in a message
PADDING_LABEL = -1  # of a row that holds no image


class Matching(NamedTuple):
    """How the data's labels become the model's."""

    how: str
    """For the report."""
    label_map: Tensor | None = None
    """int64 (K,): the model's class of each of the data's labels; with `groups` a row of those;
    None: they are the same."""
    restrict: bool = False
    """Only the logits of `label_map`'s classes, or of those in `groups`, count (ImageNet-R)."""
    groups: Tensor | None = None
    """int64 (G, n): the model's classes that each of G classes means, where that may be several
    (ObjectNet); rows with fewer than n repeat their first one."""

    def tree(self) -> dict[str, Any]:
        """As JSON: all that a result depends on."""
        return {
            "how": self.how,
            "label_map": None if self.label_map is None else self.label_map.tolist(),
            "restrict": self.restrict,
            "groups": None if self.groups is None else self.groups.tolist(),
        }


@dataclass(frozen=True)
class ClassMap:
    """The classes of a published set, and what they are among those that a model may have."""

    title: str
    """The set: ObjectNet."""
    how: str
    """Of the labels, for the report: by name, by number, by its published map."""
    meanings: Mapping[str, tuple[str, ...]]
    """Names of the model's classes for each of the set's, in the order of its labels. A class that
    means none has no images to be matched."""
    restrict: bool = False
    """Only the logits of these classes count, of one with several the greatest."""
    counted: str = ""
    """Which logits count, for the report; empty: all, or with `restrict` these."""

    def of(self, names: Sequence[str], classes: Sequence[str]) -> Matching:
        """For data with these class names and a model that knows each of the classes meant.

        Raises ValueError for a name that is none of the set's.
        """
        meant = {name: means for name, means in self.meanings.items() if means}
        unknown = [name for name in names if name not in meant]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of its {len(names)} classes are none of {self.title}'s "
                f"{len(meant)}, the first being {shown(unknown[0], 60)}; "
                f"those are {_first([*meant])}"
            )
        n_meant = len({name for means in meant.values() for name in means})
        which = self.counted or f"all {len(classes)} logits count"
        if self.restrict:
            which = f"only the logits of these {n_meant} count"
        several = f", which are {n_meant} of the model's" if n_meant != len(meant) else ""
        how = f"{self.how} ({len(names)} of {self.title}'s {len(meant)} classes{several}; {which})"
        row = {name: number for number, name in enumerate(meant)}
        label_map = torch.tensor([row[name] for name in names])
        return Matching(how, label_map, self.restrict, _groups(meant, classes))

    @property
    def is_of_names(self) -> bool:
        """Each class is called what the model calls it."""
        return all(means == (name,) for name, means in self.meanings.items())

    def lacking(self, classes: Sequence[str]) -> list[str]:
        """Which of the classes meant the model does not know."""
        known = set(classes)
        return [name for means in self.meanings.values() for name in means if name not in known]


def _groups(
    meant: Mapping[str, tuple[str, ...]], classes: Sequence[str]
) -> Tensor:  # int64 (len(meant), n)
    position = {name: number for number, name in enumerate(classes)}
    most = max(len(means) for means in meant.values())
    rows = []
    for means in meant.values():
        row = [position[name] for name in means]
        rows.append(row + row[:1] * (most - len(row)))
    return torch.tensor(rows)


def compared(
    outputs: Tensor,  # (B, C)
    references: Tensor,  # int64 (B,): the data's labels, -1 for padding
    matching: Matching,  # its tensors on the device of the outputs
) -> tuple[Tensor, Tensor]:  # (B, C'), int64 (B,): -1 for padding
    """The logits that count, and which of them is right.

    Where a label means several classes and all logits count, the right one is the likeliest of
    those: the first guess is right if it is any of them.
    """
    if matching.label_map is None:
        return outputs, references
    is_padding = references == PADDING_LABEL
    found = matching.label_map[references.clamp(min=0)]
    if matching.groups is None:
        if matching.restrict:
            # Column k is the class of the data's label k, so labels need no mapping.
            return outputs[:, matching.label_map], references
        return outputs, torch.where(is_padding, PADDING_LABEL, found)
    if matching.restrict:
        best = outputs[:, matching.groups].amax(2)
        return best, torch.where(is_padding, PADDING_LABEL, found)
    candidates = matching.groups[found]  # (B, n)
    likeliest = outputs.gather(1, candidates).argmax(1, keepdim=True)
    right = candidates.gather(1, likeliest)[:, 0]
    return outputs, torch.where(is_padding, PADDING_LABEL, right)


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
    class_map: ClassMap | None = None,  # of a published set whose classes are known
) -> Matching:
    """Match labels by class names, or by position where that is all there is.

    Where only one side has names, nothing shows whether the orders agree (folders 0, 1, 10, 100, 2
    are sorted as text), so `by_position` must allow it, and the counts must be equal. What has a
    `class_map` needs names on both sides.

    Raises ValueError for labels beyond the classes, and where names or counts do not fit.
    """
    _check_range(names, labels, n_classes)
    if names and classes:
        if class_map is not None:
            return _match_published(names, classes, class_map)
        return Matching(_by_name(names, classes), match_classes(names, classes))

    lacking = "the data"
    if names:
        lacking = "the checkpoint"
    if class_map is not None:
        lack = f"{lacking} has none"
        if not names and not classes:
            lack = "neither the checkpoint nor the data has class names"
        raise ValueError(
            f"class names say which of the model's classes are {class_map.title}'s: {lack}; "
            "use data with class names, as fap-convert writes them, and for plain weights whose "
            "1000 outputs are ImageNet's in the usual order --classes imagenet"
        )
    if not names and not classes:
        return Matching("by position (neither side has class names)")
    if not by_position:
        imagenet = " (--classes imagenet: ImageNet's, in their usual order)"
        raise ValueError(
            f"{lacking} has no class names, so labels could only be compared by position, and a "
            "wrong order gives a wrong number without a word; use data with class names, for "
            "plain weights --classes FILE, or --labels-by-position if the orders are the same"
            f"{imagenet if n_classes == 1000 else ''}"
        )
    if names and len(names) != n_classes:
        raise ValueError(
            f"it has {len(names)} classes and the model {n_classes}: "
            "labels by position need the same classes on both sides"
        )
    return Matching(f"by position (allowed by --labels-by-position; {lacking} has no class names)")


def _by_name(names: Sequence[str], classes: Sequence[str]) -> str:
    if tuple(names) == tuple(classes):
        return "by name"
    return f"by name ({len(names)} of {len(classes)} classes)"


def _match_published(names: Sequence[str], classes: Sequence[str], class_map: ClassMap) -> Matching:
    """By the published map, or by name for a model of other classes, which may share some.

    Raises ValueError where the model lacks classes that the map needs.
    """
    lacking = class_map.lacking(classes)
    if not lacking:
        return class_map.of(names, classes)
    if not class_map.is_of_names:
        raise ValueError(
            f"{class_map.title}'s classes are ImageNet's, and {len(lacking)} of those that they "
            f"mean are none of the model's {len(classes)} classes, the first being "
            f"{shown(lacking[0])}; the model has {_first(classes)}"
        )
    label_map = match_classes(names, classes)
    which = f"all {len(classes)} logits count"
    if class_map.restrict:
        which = "only their logits count"
    how = f"{_by_name(names, classes)}, {which}: the model lacks some of {class_map.title}'s"
    return Matching(how, label_map, class_map.restrict)


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
