"""Which files of a tree are images, and of which class, where their names say it."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from pipelines.archives.tree import Tree
from pipelines.files import listed, readable
from pipelines.intake.collection import TreeCollection, in_class_order
from pipelines.intake.label_files import Labels
from pipelines.sources.listing import (
    BESIDE,
    HIDDEN_FILES,
    INDEX,
    NO_SUFFIX,
    SUFFIXES,
    is_foreign,
    sort_of_foreign,
)

WITHOUT_LABEL = "images that the labels do not name"


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image which belongs to the data."""
    *folders, file = name.split("/")
    if file.startswith(".") or any(is_foreign(folder) for folder in folders):
        return False
    return file.lower().endswith(SUFFIXES)


def class_folders(tree: Tree, root: str = "") -> TreeCollection:
    """The images below the class folders of `root`, a folder of the tree ("" or "a/b/").

    The rules are those of `pipelines.sources.listing.list_images`.

    Raises:
        ValueError: there are none.
    """
    ignored = Counter(tree.passed_over)
    foreign: set[str] = set()  # folders that hold no images of a class, counted once each
    files: list[int] = []
    names: list[str] = []
    for number, name in enumerate(tree.names):
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
            names.append(below)
        else:
            ignored[os.path.splitext(file)[1].lower() or NO_SUFFIX] += 1
    ignored.update(sort_of_foreign(folder.rpartition("/")[2]) for folder in foreign)
    if not files:
        raise ValueError(
            f"{readable(tree.path)}: no images under {root}CLASS/IMAGE.JPEG:"
            f" images are files named {', '.join(SUFFIXES)}"
        )
    classes = tuple(sorted({name.partition("/")[0] for name in names}))
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of[name.partition("/")[0]] for name in names]
    order = in_class_order(labels, names)
    return TreeCollection(
        tree,
        [files[place] for place in order],
        [labels[place] for place in order],
        classes,
        f"class folders in {tree.described_as}",
        dict(+ignored),
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


def flat(tree: Tree, labels: Labels, root: str = "") -> TreeCollection:
    """The images of a folder of the tree whose labels stand in a file.

    Raises:
        ValueError: an image that the labels name is not there, or none is.
    """
    ignored = Counter(tree.passed_over)
    found: dict[str, int] = {}  # what the labels call an image, and its number
    for number, name in enumerate(tree.names):
        if not name.startswith(root) or not is_image(name):
            continue
        key = labels.key(name[len(root) :])
        if key not in labels.label_of:
            ignored[WITHOUT_LABEL] += 1
        elif key in found:
            raise ValueError(
                f"{readable(tree.path)}: {readable(tree.names[found[key]])} and {readable(name)}"
                f" are both {readable(key)} in {labels.described_as}"
            )
        else:
            found[key] = number
    missing = [key for key in labels.label_of if key not in found]
    if missing:
        raise ValueError(
            f"{readable(tree.path)}: {len(missing):,} of the {len(labels.label_of):,} images in"
            f" {labels.described_as} are not there: {listed(missing)}"
        )
    keys = list(found)
    numbers = [labels.label_of[key] for key in keys]
    order = in_class_order(numbers, [tree.names[found[key]] for key in keys])
    return TreeCollection(
        tree,
        [found[keys[place]] for place in order],
        [numbers[place] for place in order],
        labels.classes,
        f"images in {tree.described_as}, labels from {labels.described_as}",
        dict(+ignored),
    )
