"""Which files of an image folder are images, and of which class.

Classes, files and their order are those of torchvision's ImageFolder, without what is no part of a
data set: hidden files and folders, those that a NAS, a Mac, a notebook or Windows leaves, and
folders met a second time through a link. What is passed over is counted and told.
"""

import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from pipelines.files import listed, readable

THREADS = 16  # that wait for the disk

# torchvision's.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Folders that are no classes and hold no images of one, in lower case; hidden ones are left out
# anyway.
FOREIGN = {
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "@tmp",
    "#recycle",
    "#snapshot",
    "__macosx",
    "__pycache__",
    "lost+found",
    "$recycle.bin",
    "system volume information",
}
INDEX = ".fap-index.npz"  # ours, see folder.py: beside the class folders, and not counted

# What was passed over, besides suffixes and FOREIGN.
LINKS = "links to folders that are listed anyway"
HIDDEN_FILES = "hidden files"
HIDDEN_FOLDERS = "hidden folders"
NO_SUFFIX = "files without suffix"
BESIDE = "files beside the class folders"
MOST_TOLD = 10  # of these, in a message


class Listing(NamedTuple):
    """The images of a folder."""

    classes: tuple[str, ...]
    files: list[tuple[str, int]]  # path and label, in torchvision's order
    ignored: dict[str, int]  # suffix or sort of what was passed over, and how often

    def notes(self) -> tuple[str, ...]:
        """See `notes_of`."""
        return notes_of(self.ignored)


def notes_of(ignored: Mapping[str, int]) -> tuple[str, ...]:
    """A line that says what was passed over; none where nothing was."""
    if not ignored:
        return ()
    # The most frequent first.
    sorts = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{count:,} {readable(sort, 60)}" for sort, count in sorts[:MOST_TOLD]]
    rest = sum(count for _, count in sorts[MOST_TOLD:])
    if rest:
        told.append(f"{rest:,} of {len(sorts) - MOST_TOLD:,} other kinds")
    return (f"ignored: {', '.join(told)}",)


def list_images(root: Path) -> Listing:
    """The images below the class folders of `root`.

    Raises:
        ValueError: no class folders, a class without images.
        OSError: a folder cannot be read.
    """
    above = {_identity(folder) for folder in (root, *root.resolve().parents)}
    classes, ignored = _class_folders(root, above)

    def images_of(name: str) -> tuple[list[str], Counter[str]]:
        return _images_below(os.path.join(root, name), above)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(images_of, classes))
    files = []
    for label, (paths, passed_over) in enumerate(found):
        files += [(path, label) for path in paths]
        ignored += passed_over
    listing = Listing(tuple(classes), files, dict(ignored))
    empty = [name for name, (paths, _) in zip(classes, found, strict=True) if not paths]
    if empty or not classes:
        raise ValueError("; ".join([_what_is_missing(root, empty), *listing.notes()]))
    return listing


def _what_is_missing(root: Path, empty: list[str]) -> str:
    """The message for classes without images, or for no class at all."""
    names = f"files named {', '.join(SUFFIXES)}"
    if not empty:
        return f"{readable(root)}: no images under CLASS/IMAGE.JPEG: images are {names}"
    return (
        f"{readable(root)}: no images under {listed(empty)}: {len(empty):,} class folder(s) without"
        f" images: remove them, or fill them with {names}"
    )


def _class_folders(root: Path, above: set[tuple[int, int]]) -> tuple[list[str], Counter[str]]:
    """Names of the class folders, sorted, and what was passed over beside them."""
    classes = []
    ignored: Counter[str] = Counter()
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if not _is_folder(entry):
            if entry.name.startswith(INDEX):
                continue
            is_hidden = entry.name.startswith(".")
            ignored[HIDDEN_FILES if is_hidden else BESIDE] += 1
        elif is_foreign(entry.name):
            ignored[sort_of_foreign(entry.name)] += 1
        elif entry.is_symlink() and _identity(entry.path) in above:
            ignored[LINKS] += 1
        else:
            classes.append(entry.name)
    return classes, ignored


def _images_below(top: str, above: set[tuple[int, int]]) -> tuple[list[str], Counter[str]]:
    """Paths of the images of one class, and what was passed over.

    Every folder is listed once, however many links lead to it: real folders first, links after the
    rest, in the order of their paths. So a folder's images keep their real path where they have
    one, and links in a circle, or two to each folder of a chain, multiply nothing.
    """
    found: list[tuple[str, str]] = []  # folder, name
    ignored: Counter[str] = Counter()
    seen = set(above)
    folders = [top]
    links: list[str] = []
    while folders or links:
        if folders:
            folder = folders.pop()
        else:
            links.sort()
            folder = links.pop(0)
            if _identity(folder) in seen:
                ignored[LINKS] += 1
                continue
        seen.add(_identity(folder))
        for entry in os.scandir(folder):
            name = entry.name
            if _is_folder(entry):
                if is_foreign(name):
                    ignored[sort_of_foreign(name)] += 1
                elif entry.is_symlink():
                    links.append(entry.path)
                else:
                    folders.append(entry.path)
            elif name.startswith("."):
                ignored[HIDDEN_FILES] += 1
            elif name.lower().endswith(SUFFIXES):
                found.append((folder, name))
            else:
                ignored[os.path.splitext(name)[1].lower() or NO_SUFFIX] += 1
    # By folder, then name, as torchvision does it. By path, "a b/1" would come before "a/2".
    return [os.path.join(folder, name) for folder, name in sorted(found)], ignored


def _identity(folder: str | Path) -> tuple[int, int]:
    """Device and number: what a folder is, whatever the path to it."""
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def is_foreign(name: str) -> bool:
    """Whether a folder is no part of the data."""
    return name.startswith(".") or name.lower() in FOREIGN


def sort_of_foreign(name: str) -> str:
    """What to count such a folder as."""
    if name.lower() in FOREIGN:
        return f"{name} folders"
    return HIDDEN_FOLDERS
