"""Files that say of which class images are: ImageNet's devkit, Kaggle's CSV, a CSV of one's own."""

import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.archives.tar import StreamedTar, TarTree, compression_of
from pipelines.archives.tree import FolderTree, Tree
from pipelines.extras import needs
from pipelines.files import GIGABYTE, read_regular, readable, shown

# In ImageNet's devkit (ILSVRC2012_devkit_t12).
META = "meta.mat"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
DEVKIT_NAMES = ("ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12.tar.gz")
VAL_NAME = "ILSVRC2012_val_{:08}"  # of the image with that number, from 1
KAGGLE_VAL = "LOC_val_solution.csv"

KAGGLE_HEADER = ["ImageId", "PredictionString"]
WNID = re.compile(r"n\d{8}")

ACCEPTED = (
    "ImageNet's devkit (ILSVRC2012_devkit_t12, a folder or .tar.gz), Kaggle's LOC_val_solution.csv,"
    " or lines of `path,label`"
)


class Labels(NamedTuple):
    """Which label each image has."""

    described_as: str
    label_of: dict[str, int]  # by what `key` makes of an image's path
    classes: tuple[str, ...] | None  # None: the file has numbers
    key: Callable[[str], str]


def read_labels(path: Path) -> Labels:
    """What a file, or a devkit's folder, says.

    Raises:
        ValueError: it is none of ACCEPTED, or contradicts itself.
        OSError: it cannot be read.
    """
    if not path.exists():
        raise ValueError(f"labels = {readable(path)}: no such file or folder; expected {ACCEPTED}")
    if path.is_dir():
        return _devkit(FolderTree(path))
    if compression_of(path) is not None:
        return _devkit(StreamedTar(path))
    if path.suffix == ".tar":
        return _devkit(TarTree(path))
    return _table(read_regular(path, GIGABYTE), path)


def labels_beside(folder: Path, most_up: int = 4) -> Path | None:
    """Kaggle's CSV or ImageNet's devkit in a folder or above it, where people leave them."""
    for place in [folder, *folder.resolve().parents][: most_up + 1]:
        for name in (KAGGLE_VAL, *DEVKIT_NAMES):
            if (place / name).exists():
                return place / name
    return None


def labels_inside(tree: Tree) -> Labels | None:
    """Kaggle's CSV in the archive that holds the images."""
    for number, name in enumerate(tree.names):
        if os.path.basename(name) == KAGGLE_VAL:
            ((_, read),) = tree.contents(np.array([number]))
            return _table(read(), tree.path / name)
    return None


def by_stem(path: str) -> str:
    """The file's name without folder and suffix."""
    return os.path.splitext(os.path.basename(path))[0]


def by_path(path: str) -> str:
    """The path as it is."""
    return path


# ------------------------------------------------------------------ the devkit


def _devkit(tree: Tree) -> Labels:
    """ImageNet's. Its ground truth has ILSVRC's own ids; META says which WNID each of them is."""
    wanted: dict[int, str] = {}
    for number, name in enumerate(tree.names):
        base = os.path.basename(name)
        if base in (META, GROUND_TRUTH):
            wanted[number] = base
    content = {
        wanted[number]: read() for number, read in tree.contents(np.array(list(wanted), np.int64))
    }
    tree.close()
    missing = {META, GROUND_TRUTH} - content.keys()
    if missing:
        raise ValueError(
            f"labels = {readable(tree.path)}: holds no {' and no '.join(sorted(missing))};"
            f" expected {ACCEPTED}"
        )
    wnid_of = _wnids(content[META], tree.path)
    classes = tuple(sorted(wnid_of.values()))
    label_of_wnid = {wnid: label for label, wnid in enumerate(classes)}
    label_of: dict[str, int] = {}
    for number, line in enumerate(content[GROUND_TRUTH].split(), 1):
        if not line.isdigit() or int(line) not in wnid_of:
            raise ValueError(
                f"labels = {readable(tree.path)}: {GROUND_TRUTH}, line {number}: {shown(line, 40)}"
                " is no id of a class"
            )
        label_of[VAL_NAME.format(number)] = label_of_wnid[wnid_of[int(line)]]
    return Labels(f"the devkit {readable(tree.path.name)}", label_of, classes, by_stem)


def _wnids(meta: bytes, path: Path) -> dict[int, str]:
    """WNID by ILSVRC's id, of the classes without children."""
    with needs("devkit", "ImageNet's devkit"):
        from scipy.io import loadmat
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        found = {
            int(row["ILSVRC2012_ID"]): str(row["WNID"])
            for row in synsets.ravel()
            if int(row["num_children"]) == 0
        }
    except Exception as error:  # scipy raises many types for what is no such file
        raise ValueError(
            f"labels = {readable(path)}: {META} is not that of ILSVRC2012: {error}"
        ) from error
    if not found or not all(WNID.fullmatch(wnid) for wnid in found.values()):
        raise ValueError(f"labels = {readable(path)}: {META} names no classes")
    return found


# ------------------------------------------------------------------ tables


def _table(content: bytes, path: Path) -> Labels:
    """Kaggle's CSV, or lines of path and label."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(
            f"labels = {readable(path)}: is no UTF-8 text; expected {ACCEPTED}"
        ) from None
    lines = text.splitlines()
    first = lines[0] if lines else ""
    delimiter = next((sign for sign in (",", "\t", " ") if sign in first), ",")
    rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
    if rows and rows[0] == KAGGLE_HEADER:
        return _kaggle(path, rows[1:])
    return _own(path, rows)


def _kaggle(path: Path, rows: Sequence[Sequence[str]]) -> Labels:
    """ImageId, and a WNID with a box, or several of them."""
    wnid_of: dict[str, str] = {}
    for line, row in enumerate(rows, 2):
        words = row[1].split() if len(row) == 2 else []
        # Of five words each: WNID and box. Every one of an image has the same WNID.
        wnids = set(words[::5])
        if len(wnids) != 1 or not WNID.fullmatch(words[0]):
            raise ValueError(
                f"labels = {readable(path)}, line {line}: {shown(row, 80)}: expected an ImageId and"
                " boxes of one class"
            )
        _put(wnid_of, row[0], words[0], path, line)
    return _named(f"Kaggle's {readable(path.name)}", wnid_of, by_stem, path)


def _own(path: Path, rows: Sequence[Sequence[str]]) -> Labels:
    """Path and label: names of classes, or numbers."""
    if rows and [word.strip().lower() for word in rows[0]] == ["path", "label"]:
        rows = rows[1:]
    label_of: dict[str, str] = {}
    for line, row in enumerate(rows, 1):
        if len(row) != 2 or not row[0].strip() or not row[1].strip():
            raise ValueError(
                f"labels = {readable(path)}, row {line}: {shown(row, 80)}: expected a path and a"
                f" label; {ACCEPTED} are accepted"
            )
        _put(label_of, row[0].strip().removeprefix("./"), row[1].strip(), path, line)
    described_as = readable(path.name)
    if label_of and all(label.isdecimal() for label in label_of.values()):
        numbers = {name: int(label) for name, label in label_of.items()}
        return Labels(described_as, numbers, None, by_path)
    return _named(described_as, label_of, by_path, path)


def _put(found: dict[str, str], name: str, label: str, path: Path, line: int) -> None:
    if found.setdefault(name, label) != label:
        raise ValueError(
            f"labels = {readable(path)}, row {line}: {readable(name)} has two labels,"
            f" {readable(found[name])} and {readable(label)}"
        )


def _named(
    described_as: str, class_of: dict[str, str], key: Callable[[str], str], path: Path
) -> Labels:
    if not class_of:
        raise ValueError(f"labels = {readable(path)}: is empty; expected {ACCEPTED}")
    classes = tuple(sorted(set(class_of.values())))
    label_of_class = {name: label for label, name in enumerate(classes)}
    label_of = {name: label_of_class[class_name] for name, class_name in class_of.items()}
    return Labels(described_as, label_of, classes, key)
