"""`Collection`: images with labels, in whatever form people hold them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipelines.archives.tree import Tree
from pipelines.files import readable

# An image file's bytes, or pixels: uint8 (H, W, 3), RGB.
Image = bytes | np.ndarray
Content = tuple[int, Callable[[], Image]]  # number of an image, and a call that reads it


class Collection(ABC):
    """N images with labels, numbered as they are to stand in a `.beton`.

    Whatever the form, the order is that of class folders: by label, then by the image's file name.
    So every form of the same data makes the same samples.
    """

    described_as: str  # what was recognised, for the reader of a log

    path: Path
    classes: tuple[str, ...] | None  # names in the order of the labels; None: labels have none
    labels: np.ndarray  # int64 (N,), places in `classes` where there are any
    ignored: dict[str, int]  # sort of what was passed over, and how often

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, number: int) -> str:
        """An image's name in the collection; the sidecar has those of images left out."""

    @abstractmethod
    def contents(self, numbers: np.ndarray) -> Iterator[Content]:
        """The images of these numbers, int64 (n,), in the order in which they are read fastest.

        The calls may be made from other threads. They raise ValueError, OSError or what else
        `pipelines.images.UNREADABLE` holds for an image that cannot be read; the iterator itself
        raises ValueError or OSError for a collection that is damaged beyond one image.
        """

    def shown(self, number: int) -> str:
        """Where an image is, for messages."""
        return f"{self.path}/{self.name(number)}"

    def describe(self) -> list[str]:
        """Lines that say what was recognised, before hours are spent on it."""
        classes = "classes without names"
        if self.classes is not None:
            ends = dict.fromkeys(readable(name, 60) for name in (self.classes[0], self.classes[-1]))
            classes = f"{len(self.classes):,} class(es) {' to '.join(ends)}"
        return [f"{readable(self.path)}: {self.described_as}: {len(self):,} images, {classes}"]

    def close(self) -> None:  # noqa: B027
        """Release file handles."""


class TreeCollection(Collection):
    """Some files of a tree."""

    def __init__(
        self,
        tree: Tree,
        files: Sequence[int],  # their numbers in the tree
        labels: Sequence[int],
        classes: tuple[str, ...] | None,
        described_as: str,
        ignored: dict[str, int],
    ) -> None:
        self.path = tree.path
        self.tree = tree
        self.files = np.array(files, np.int64)
        self.labels = np.array(labels, np.int64)
        self.classes = classes
        self.described_as = described_as
        self.ignored = ignored

    def name(self, number: int) -> str:
        return self.tree.names[self.files[number]]

    def contents(self, numbers: np.ndarray) -> Iterator[Content]:
        files = self.files[numbers]
        number_of = np.zeros(len(self.tree.names), np.int64)
        number_of[files] = numbers
        for file, content in self.tree.contents(files):
            yield int(number_of[file]), content

    def close(self) -> None:
        self.tree.close()
