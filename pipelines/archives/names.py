"""What the names of a tree's files say: which are images, and of which class."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pipelines.archives.listing import (
    BESIDE,
    HIDDEN_FILES,
    INDEX,
    NO_SUFFIX,
    SUFFIXES,
    is_foreign,
    sort_of_foreign,
)

# WebDataset's rule: the key ends at the first dot behind the last slash.
KEY_AND_FIELD = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff")
LABEL_FIELDS = ("cls", "json")  # the first one that a sample has


class ClassFolders(NamedTuple):
    """The images below class folders."""

    classes: tuple[str, ...]
    files: list[int]  # their numbers in the tree, by class, then as torchvision orders them
    labels: list[int]
    ignored: dict[str, int]  # suffix or sort of what was passed over, and how often


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image which belongs to the data."""
    *folders, file = name.split("/")
    if file.startswith(".") or any(is_foreign(folder) for folder in folders):
        return False
    return file.lower().endswith(SUFFIXES)


def class_folders(names: Sequence[str], root: str = "") -> ClassFolders:
    """The images below the class folders of `root`, a folder of the tree ("" or "a/b/").

    The rules are those of `pipelines.archives.listing.list_images`.

    Raises:
        ValueError: there are none.
    """
    ignored: Counter[str] = Counter()
    foreign: set[str] = set()  # folders that hold no images of a class, counted once each
    files: list[int] = []
    found: list[str] = []
    for number, name in enumerate(names):
        if not name.startswith(root):
            continue
        below = name[len(root) :]
        *folders, file = below.split("/")
        outermost = _first_foreign(folders)
        if outermost is not None:
            foreign.add("/".join(folders[: outermost + 1]))
        elif not folders:
            if not file.startswith(INDEX):
                ignored[HIDDEN_FILES if file.startswith(".") else BESIDE] += 1
        elif file.startswith("."):
            ignored[HIDDEN_FILES] += 1
        elif file.lower().endswith(SUFFIXES):
            files.append(number)
            found.append(below)
        else:
            ignored[os.path.splitext(file)[1].lower() or NO_SUFFIX] += 1
    ignored.update(sort_of_foreign(folder.rpartition("/")[2]) for folder in foreign)
    if not files:
        raise ValueError(
            f"no images under {root}CLASS/IMAGE.JPEG: images are files named {', '.join(SUFFIXES)}"
        )
    classes = tuple(sorted({name.partition("/")[0] for name in found}))
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of[name.partition("/")[0]] for name in found]
    order = in_class_order(labels, found)
    return ClassFolders(
        classes,
        [files[place] for place in order],
        [labels[place] for place in order],
        dict(ignored),
    )


def _first_foreign(folders: Sequence[str]) -> int | None:
    for depth, folder in enumerate(folders):
        if is_foreign(folder):
            return depth
    return None


def innermost_root(names: Iterable[str]) -> str:
    """The folder of an archive that holds the class folders, "" or "a/b/".

    Archives are often made from outside: then all images lie in one folder, which is no class as
    long as they lie two folders deeper.
    """
    images = [name for name in names if is_image(name)]
    root = ""
    while images:
        depth = root.count("/")
        first = {name.split("/", depth + 1)[depth] for name in images}
        deep = all(name.count("/") >= depth + 2 for name in images)
        if len(first) != 1 or not deep:
            break
        root += f"{first.pop()}/"
    return root


def in_class_order(labels: Sequence[int], names: Sequence[str]) -> list[int]:
    """Places sorted by label, then by folder and file name, as torchvision's ImageFolder has them.

    By path, "a b/1" would come before "a/2".
    """

    def key(place: int) -> tuple[str, str]:
        folder, _, file = names[place].rpartition("/")
        return folder, file

    by_label = np.argsort(labels, kind="stable")
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    order: list[int] = []
    # Class by class: keys of all names at once would take more room than the names.
    for places in np.split(by_label, np.cumsum(counts)[:-1]):
        order += sorted(places.tolist(), key=key)
    return order


def looks_like_shards(names: Sequence[str]) -> bool:
    """Whether some image has a label beside it."""
    labelled = set()
    for name in names:
        match = KEY_AND_FIELD.match(name)
        if match and match[2].lower() in LABEL_FIELDS:
            labelled.add(match[1])
    if not labelled:  # most archives have none
        return False
    matches = (KEY_AND_FIELD.match(name) for name in names)
    return any(
        match and match[2].lower() in IMAGE_FIELDS and match[1] in labelled for match in matches
    )
