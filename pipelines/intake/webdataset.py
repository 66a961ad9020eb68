"""WebDataset's shards: tars in which KEY.jpg stands beside KEY.cls or KEY.json."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.archives.listing import NO_SUFFIX
from pipelines.archives.names import IMAGE_FIELDS, KEY_AND_FIELD, LABEL_FIELDS, in_class_order
from pipelines.archives.tree import Tree
from pipelines.files import listed, readable, shown
from pipelines.intake.collection import Content, TreeCollection
from pipelines.intake.wnids import class_names, without_wnid

LABEL_ENTRIES = ("label", "cls", "class", "class_id")  # in a JSON, the first number
NAME_ENTRIES = ("filename", "file_name", "path")  # in a JSON, what the image's file was called
META = "__"  # WebDataset's own entries begin and end with it

MOST_LABEL = 10**9


class Sample(NamedTuple):
    """The files of one key, as numbers in the tree."""

    key: str
    image: int
    label: int | None


class WebDataset(TreeCollection):
    """The samples of WebDataset's shards.

    The label is the number in KEY.cls, else that in KEY.json. A sample without one is a bad image:
    reading it raises ValueError.

    Raises:
        ValueError: no samples, or labels that are none.
    """

    def __init__(self, tree: Tree) -> None:
        ignored = Counter(tree.passed_over)
        samples = _samples(tree, ignored)
        if not samples:
            raise ValueError(
                f"{readable(tree.path)}: no samples: expected KEY.jpg beside KEY.cls or KEY.json"
            )
        labels, names = _labels_and_names(tree, samples)
        self._without = {
            sample.key for sample, label in zip(samples, labels, strict=True) if label is None
        }
        if len(self._without) == len(samples):
            raise ValueError(
                f"{readable(tree.path)}: none of {len(samples):,} samples has a label: expected a"
                f" number in KEY.cls, or in KEY.json as one of {', '.join(LABEL_ENTRIES)}"
            )
        # Those without a label go last: their place does not matter, since they are left out.
        last = 1 + max(label for label in labels if label is not None)
        numbers = [last if label is None else label for label in labels]
        order = in_class_order(numbers, names)
        known = [place for place in order if numbers[place] != last]
        classes = class_names([names[i] for i in known], [numbers[i] for i in known])
        super().__init__(
            tree,
            [samples[place].image for place in order],
            [numbers[place] for place in order],
            classes,
            f"WebDataset samples in {tree.described_as}",
            dict(+ignored),
        )
        self._keys = [samples[place].key for place in order]

    def contents(self, numbers: np.ndarray) -> Iterator[Content]:
        for number, content in super().contents(numbers):
            if self._keys[number] in self._without:
                yield number, _no_label
            else:
                yield number, content


def _no_label() -> bytes:
    raise ValueError("has no label: neither KEY.cls nor a number in KEY.json")


def _samples(tree: Tree, ignored: Counter[str]) -> list[Sample]:
    """The samples in the order in which they lie."""
    fields_of: dict[str, dict[str, int]] = {}
    for number, name in enumerate(tree.names):
        match = KEY_AND_FIELD.match(name)
        if match is None or os.path.basename(name).startswith(META):
            ignored[NO_SUFFIX] += 1
            continue
        fields_of.setdefault(match[1], {})[match[2].lower()] = number
    samples = []
    for key, fields in fields_of.items():
        images = [field for field in IMAGE_FIELDS if field in fields]
        if len(images) > 1:
            raise ValueError(
                f"{readable(tree.path)}: {readable(key)} has several images: {listed(images)}"
            )
        labels = [fields[field] for field in LABEL_FIELDS if field in fields]
        for field in fields:
            if field not in (*images, *LABEL_FIELDS):
                ignored[f".{field}"] += 1
        if images:
            samples.append(Sample(key, fields[images[0]], labels[0] if labels else None))
    return samples


def _labels_and_names(tree: Tree, samples: Sequence[Sample]) -> tuple[list[int | None], list[str]]:
    """The label of each sample, None where it has none, and the name of its image's file."""
    labels: list[int | None] = [None] * len(samples)
    names = [os.path.basename(tree.names[sample.image]) for sample in samples]
    place_of = {
        sample.label: place for place, sample in enumerate(samples) if sample.label is not None
    }
    for number, content in tree.contents(np.array(list(place_of), np.int64)):
        place = place_of[number]
        where = tree.shown(number)
        if tree.names[number].lower().endswith(".json"):
            entries = _json(content(), where)
            labels[place] = _label_in(entries)
            names[place] = _name_in(entries) or names[place]
        else:
            labels[place] = _number(content().decode(errors="replace").strip(), where)
    return labels, [without_wnid(name) for name in names]


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{readable(where)}: is no JSON: {error}") from None
    return entries if isinstance(entries, dict) else {"label": entries}


def _label_in(entries: dict[str, Any]) -> int | None:
    for name in LABEL_ENTRIES:
        value = entries.get(name)
        if type(value) is int and 0 <= value < MOST_LABEL:
            return value
    return None


def _name_in(entries: dict[str, Any]) -> str | None:
    for name in NAME_ENTRIES:
        value = entries.get(name)
        if isinstance(value, str) and value:
            return os.path.basename(value)
    return None


def _number(text: str, where: str) -> int:
    if not (text.isdecimal() and int(text[:20]) < MOST_LABEL):
        raise ValueError(f"{readable(where)}: {shown(text, 40)} is no label: expected a number")
    return int(text)
