"""`Tree`: files by name in a folder or an archive, which is never unpacked to the disk."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.files import GIGABYTE, first_bytes, read_regular, readable

MOST_BYTES = GIGABYTE  # of one file
MOST_NAME_BYTES = 4096  # Linux's PATH_MAX

# What was passed over in an archive.
LINKS = "symbolic links"
SPECIAL = "special files"

Content = tuple[int, Callable[[], bytes]]  # number of a file, and a call that reads it


class Tree(ABC):
    """Files by name. Their numbers are places in `names`.

    Names are paths below the tree's root: parts with "/" between, none of them empty, "." or "..".
    Nobody ever opens or writes a file of the disk by such a name, but for a `FolderTree`.
    """

    described_as: str  # "a tar"

    path: Path
    names: Sequence[str]
    passed_over: Counter[str]  # sort of member that is no file, and how many

    @abstractmethod
    def contents(self, numbers: np.ndarray) -> Iterator[Content]:
        """The files of these numbers, int64 (n,), in the order in which they lie.

        The calls may be made from other threads, later and in any order. They raise ValueError or
        OSError for what cannot be read.
        """

    def close(self) -> None:  # noqa: B027
        """Release file handles."""

    def shown(self, number: int) -> str:
        """Where a file is, for messages."""
        return f"{self.path}/{self.names[number]}"


class RandomTree(Tree):
    """A tree whose files can be read at any place, in any order, from many threads."""

    positions: np.ndarray  # int64 (N,): sorting them gives the order in which the files lie

    @abstractmethod
    def read(self, number: int, most: int | None = None) -> bytes:
        """A file's content, or its first `most` bytes.

        Raises:
            ValueError, OSError: it cannot be read, or is damaged.
        """

    def contents(self, numbers: np.ndarray) -> Iterator[Content]:
        for number in numbers[np.argsort(self.positions[numbers], kind="stable")].tolist():
            yield number, partial(self.read, number)


class ListedFolder(RandomTree):
    """Files below a folder that somebody has listed."""

    described_as = "a folder"

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path = path
        self.names = names
        self.passed_over = Counter()
        self.positions = np.arange(len(names))

    def read(self, number: int, most: int | None = None) -> bytes:
        path = self.path / self.names[number]
        return read_regular(path) if most is None else first_bytes(path, most)


class FolderTree(ListedFolder):
    """All files below a folder; links to files are files, links to folders are passed over."""

    def __init__(self, path: Path) -> None:
        names: list[str] = []
        n_links = 0
        for folder, inner, files in os.walk(path):
            inner.sort()
            n_links += sum(os.path.islink(os.path.join(folder, name)) for name in inner)
            below = os.path.relpath(folder, path)
            for name in sorted(files):
                names.append(name if below == os.curdir else os.path.join(below, name))
        super().__init__(path, names)
        if n_links:
            self.passed_over[LINKS] = n_links


class JoinedTree(Tree):
    """Several trees as one; the files of each stand under a name of its own."""

    def __init__(self, path: Path, trees: Sequence[tuple[str, Tree]]) -> None:
        self.path = path
        self.trees = [tree for _, tree in trees]
        self.described_as = f"{len(trees):,} x {self.trees[0].described_as}"
        self.names = [f"{prefix}/{name}" for prefix, tree in trees for name in tree.names]
        self.passed_over = Counter()
        for tree in self.trees:
            self.passed_over += tree.passed_over
        self._first = np.cumsum([0] + [len(tree.names) for tree in self.trees])

    def contents(self, numbers: np.ndarray) -> Iterator[Content]:
        wanted = np.sort(numbers)
        ends = np.searchsorted(wanted, self._first)
        for tree, first, begin, end in zip(
            self.trees, self._first[:-1].tolist(), ends[:-1], ends[1:], strict=True
        ):
            for number, content in tree.contents(wanted[begin:end] - first):
                yield first + number, content

    def close(self) -> None:
        for tree in self.trees:
            tree.close()


def checked_name(name: str, path: Path) -> str:
    """A member's name without "./" and doubled or trailing slashes; "" for the root itself.

    Raises:
        ValueError: it leads outside, or is no name.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or name.startswith("/") or "\0" in name:
        raise ValueError(
            f"{readable(path)}: holds {readable(name)!r}, a name that leads outside the archive:"
            " it was not made from a folder of images"
        )
    if len(name) > MOST_NAME_BYTES:
        raise ValueError(f"{readable(path)}: holds a name of {len(name):,} characters")
    return "/".join(parts)


def refuse_doubles(names: Sequence[str], path: Path) -> None:
    """ValueError where two files have the same name: nobody knows which one is meant."""
    if len(set(names)) == len(names):
        return
    name, times = Counter(names).most_common(1)[0]
    raise ValueError(
        f"{readable(path)}: holds {readable(name)} {times} times: nobody knows which one is meant"
    )
