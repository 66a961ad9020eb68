"""ObjectNet: its images of classes that ImageNet has. Its own archive says which those are.

The archive holds `images/`, a folder for each object, and `mappings/`, four files. A folder has a
label (FOLDERS), and a label has ImageNet's names (NAMES). Each name is a line of LINES, and NUMBERS
gives the line of each of ImageNet's classes, which it has in their usual order.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fap.class_maps import imagenet
from pipelines import Store
from pipelines.files import listed, one_line, read_regular, readable, shown
from pipelines.pixel_store import PixelStore
from pipelines.subset import RelabelledStore

IMAGES = "images"
MAPPINGS = "mappings"
FOLDERS = "folder_to_objectnet_label.json"  # {FOLDER: LABEL, ...}
NAMES = "objectnet_to_imagenet_1k.json"  # {LABEL: "NAME; NAME", ...}
LINES = "imagenet_to_label_2012_v2"  # a NAME a line
NUMBERS = "pytorch_to_imagenet_2012_id.json"  # {"0": line of class 0, ...}, lines counted from 0
BETWEEN_NAMES = "; "
MOST_BYTES = 1 << 20  # of each; as published they have 25,000 at most
RED_BORDER = 2  # pixels: ObjectNet's README

Meanings = Mapping[str, tuple[str, ...]]
"""The WNIDs of each folder, sorted; none for a folder that is not in ImageNet."""


def parts_of(root: Path) -> tuple[Path, Path]:
    """Images and mappings, of objectnet-1.0/ or of the images in it: a folder, a tar, a `.beton`.

    Raises ValueError where there is nothing.
    """
    if not root.exists():
        raise ValueError(f"{readable(root)}: no such file or folder")
    if (root / IMAGES).is_dir():
        return root / IMAGES, root / MAPPINGS
    return root, Path(os.path.abspath(root)).parent / MAPPINGS


def meanings_in(mappings: Path) -> Meanings:
    """Raises ValueError for files that lack, or that are none of ObjectNet's; OSError."""
    files = (FOLDERS, NAMES, LINES, NUMBERS)
    lacking = [name for name in files if not (mappings / name).exists()]
    if lacking:
        raise ValueError(
            f"{readable(mappings)}: holds no {', '.join(lacking)}; ObjectNet's archive has "
            f"{MAPPINGS}/ beside {IMAGES}/, and its files say what of ImageNet an object is: give "
            f"objectnet-1.0, or its {IMAGES} with {MAPPINGS} beside them"
        )
    label_of = _texts(mappings / FOLDERS)
    names_of = _texts(mappings / NAMES)
    wnid_of = _wnids_by_name(mappings / LINES, _class_of_line(mappings / NUMBERS))

    folder_of = {label: folder for folder, label in label_of.items()}
    if len(folder_of) < len(label_of):
        twice = _first_twice([*label_of.values()])
        raise ValueError(f"{readable(mappings / FOLDERS)}: {shown(twice)} is two folders' label")
    meanings: dict[str, tuple[str, ...]] = dict.fromkeys(sorted(label_of), ())
    for label, names in names_of.items():
        where = f"{readable(mappings / NAMES)}: {shown(label)}"
        if label not in folder_of:
            raise ValueError(f"{where}: no label of {FOLDERS}")
        meant = names.split(BETWEEN_NAMES)
        # A name may stand for two classes, as crane does, but then it says of none what it is.
        unclear = [name for name in meant if len(wnid_of.get(name, ())) != 1]
        if unclear:
            raise ValueError(f"{where}: {shown(unclear[0])}: not one line of {LINES}")
        meanings[folder_of[label]] = tuple(sorted(wnid_of[name][0] for name in meant))
    all_meant = [wnid for wnids in meanings.values() for wnid in wnids]
    if len(set(all_meant)) < len(all_meant):
        twice = _first_twice(all_meant)
        raise ValueError(f"{readable(mappings / NAMES)}: means ImageNet's {twice} twice")
    return meanings


def _texts(file: Path) -> dict[str, str]:
    """Of a JSON object. Raises ValueError, OSError."""
    found = _json_object(file)
    wrong = [key for key, value in found.items() if type(value) is not str]
    if wrong:
        raise ValueError(
            f"{readable(file)}: {shown(wrong[0])}: {shown(found[wrong[0]])}: must be a text"
        )
    return found


def _class_of_line(file: Path) -> list[int]:
    """Place among ImageNet's classes of each line's name. Raises ValueError, OSError."""
    found = _json_object(file)
    count = len(imagenet())
    numbers = range(count)
    lines: list[Any] = [found.get(str(number)) for number in numbers]
    # `type`, since True is an instance of int.
    are_lines = all(type(line) is int for line in lines) and set(lines) == set(numbers)
    if len(found) != count or not are_lines:
        raise ValueError(
            f'{readable(file)}: must give each of "0" to "{count - 1}" a line of its own, '
            f"0 to {count - 1}"
        )
    return sorted(numbers, key=lines.__getitem__)


def _wnids_by_name(file: Path, class_of_line: list[int]) -> dict[str, list[str]]:
    """Raises ValueError, OSError."""
    content = read_regular(file, MOST_BYTES)
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{readable(file)}: is no text: {one_line(error)}") from None
    if len(lines) != len(class_of_line):
        raise ValueError(
            f"{readable(file)}: has {len(lines):,} lines, not {len(class_of_line):,}: a name for "
            "each class of ImageNet"
        )
    found: dict[str, list[str]] = {}
    for name, number in zip(lines, class_of_line, strict=True):
        found.setdefault(name, []).append(imagenet()[number])
    return found


def _json_object(file: Path) -> dict[str, Any]:
    content = read_regular(file, MOST_BYTES)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{readable(file)}: is no JSON: {one_line(error)}") from None
    if type(found) is not dict or not found:
        raise ValueError(f"{readable(file)}: must be a JSON object with entries")
    return found


def _first_twice(texts: list[str]) -> str:
    return Counter(texts).most_common(1)[0][0]


def objects_of_imagenet(store: Store, *, meanings: Meanings) -> Store:
    """The images of classes that ImageNet has, without their red border.

    Raises ValueError for folders that are none of ObjectNet's.
    """
    if store.classes is None:  # whoever matches the labels says so
        return PixelStore(store, RED_BORDER)
    foreign = [name for name in store.classes if name not in meanings]
    if foreign:
        raise ValueError(
            f"{readable(store.path)}: {listed(foreign)}: none of the {len(meanings)} folders of "
            f"{FOLDERS}; give objectnet-1.0, or its {IMAGES}, which hold air_freshener, "
            "alarm_clock ..."
        )
    kept = [name for name in store.classes if meanings[name]]
    left_out = [name for name in store.classes if not meanings[name]]
    if not kept:
        raise ValueError(f"{readable(store.path)}: none of its classes is in ImageNet")
    place = np.full(len(store.classes), -1)
    place[[store.classes.index(name) for name in kept]] = np.arange(len(kept))
    labels = place[store.labels]
    (numbers,) = np.nonzero(labels >= 0)
    notes = list(store.notes)
    if left_out:
        notes.append(
            f"{len(labels) - len(numbers):,} images of {len(left_out)} classes of "
            f"{readable(store.path)} that are not in ImageNet: {listed(left_out)}"
        )
    return PixelStore(RelabelledStore(store, numbers, labels[numbers], kept, notes), RED_BORDER)
