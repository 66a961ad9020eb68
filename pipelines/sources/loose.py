"""Images without labels, as people hand them over: files, a folder or an archive in any layout.

For predictions. Training data have classes, and are opened by `open_store`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import numpy as np

from pipelines.archives.listing import SUFFIXES
from pipelines.archives.names import is_image
from pipelines.archives.tar import TarTree, has_tar_header
from pipelines.archives.tree import FolderTree, ListedFolder, RandomTree
from pipelines.archives.zips import ZipTree
from pipelines.files import readable
from pipelines.images import UNREADABLE, reason
from pipelines.progress import in_order
from pipelines.sources.beton import BetonStore
from pipelines.sources.image_files import CHUNK, THREADS, ImageFilesStore, refused_sides
from pipelines.sources.shards import ShardedStore, is_pattern
from pipelines.store import Store

ACCEPTED = "image files, folders of them, a .tar, a .zip, a .beton, 'shards/*.beton'"
SOURCES_OF_SAMPLES: tuple[type[Store], ...] = (BetonStore, ShardedStore)


class LooseImages(ImageFilesStore):
    """Some image files of a tree, in the order given; all labels are 0, and there are no classes.

    Raises:
        ValueError: a file is no image, unless `skip` takes it: it is told the name and the reason.
    """

    described_as = "image files"

    classes = None  # type: ignore[assignment]
    _index_name = "this run's list"

    def __init__(
        self,
        tree: RandomTree,
        numbers: Sequence[int],  # of the files in the tree
        size_of: Callable[[int], int],  # bytes of a file of the tree. Raises OSError
        skip: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(tree.path)
        self._tree = tree
        self._files = np.array(numbers, np.int64)
        self._names = [tree.names[number] for number in numbers]
        rows = self._scan(size_of)
        if skip is None:
            self._refuse_bad(rows)
        good: list[tuple[int, ...]] = []
        kept: list[int] = []
        for index, row in enumerate(rows):
            if isinstance(row, str):
                assert skip is not None
                skip(f"{readable(self.file(index))}: {row}")
            else:
                kept.append(index)
                good.append(row)
        self._files = self._files[kept]
        self._names = [self._names[index] for index in kept]
        self._use(*np.array(good, np.int64).reshape(-1, 3).T)
        self.labels = np.zeros(len(kept), np.int64)

    def close(self) -> None:
        self._tree.close()

    def _file_content(self, index: int, most: int | None = None) -> bytes:
        return self._tree.read(int(self._files[index]), most)

    def _scan(self, size_of: Callable[[int], int]) -> list[tuple[int, ...] | str]:
        """Bytes, height and width of every file, or what is wrong with it."""

        def row(index: int) -> tuple[int, ...] | str:
            try:
                size = size_of(int(self._files[index]))
                sides = self._sides(index)
            except UNREADABLE as error:
                return reason(error, self.file(index))
            return refused_sides(sides) or (size, *sides)

        numbers = range(len(self._names))
        return list(in_order(row, numbers, THREADS, CHUNK, "image headers"))


def open_images(
    paths: Sequence[Path], skip: Callable[[str], None] | None = None
) -> list[tuple[Store, Callable[[int], str]]]:
    """Stores of all images that the paths name, in their order, each with what names its images.

    Files that follow each other are one store. `skip`: see `LooseImages`.

    Raises:
        ValueError: nothing is there, a folder or an archive without images, a file that is none.
        DamagedData: as `BetonStore`.
    """
    with ExitStack() as opened:  # what was opened is closed where another one fails
        found: list[tuple[Store, Callable[[int], str]]] = []
        for is_file, group in groupby(paths, _is_image_file):
            some = list(group)
            stores = iter([_of_files(some, skip)]) if is_file else _opened(some, skip)
            for store, name in stores:
                opened.callback(store.close)
                found.append((store, name))
        opened.pop_all()
        return found


def _opened(
    paths: Sequence[Path], skip: Callable[[str], None] | None
) -> Iterator[tuple[Store, Callable[[int], str]]]:
    for path in paths:
        if path.is_dir():
            folder = FolderTree(path)
            yield _loose(folder, _images_of(folder), _size_in(folder), skip)
        elif path.is_file() and zipfile.is_zipfile(path):
            archive = ZipTree(path)
            yield _loose(archive, _images_of(archive), _size_packed(archive), skip)
        elif path.is_file() and has_tar_header(path):
            tar = TarTree(path)
            yield _loose(tar, _images_of(tar), _size_packed(tar), skip)
        else:
            yield _of_samples(path)


def _of_samples(path: Path) -> tuple[Store, Callable[[int], str]]:
    """A `.beton`, or shards: samples have numbers and no names."""
    if not (path.exists() or is_pattern(path)):
        raise ValueError(f"{readable(path)}: no such file or folder; expected {ACCEPTED}")
    for source in SOURCES_OF_SAMPLES:
        if source.accepts(path):
            store = source(path)
            return store, store.name_of
    raise ValueError(f"{readable(path)}: is no image, and none of {ACCEPTED}")


def _is_image_file(path: Path) -> bool:
    """By its name, as in folders; what a pipe or a device is, `read_regular` says."""
    return path.name.lower().endswith(SUFFIXES) and path.exists() and not path.is_dir()


def _of_files(
    paths: Sequence[Path], skip: Callable[[str], None] | None
) -> tuple[Store, Callable[[int], str]]:
    tree = ListedFolder(Path(), [str(path) for path in paths])
    return _loose(tree, range(len(paths)), _size_in(tree), skip)


def _loose(
    tree: RandomTree,
    numbers: Sequence[int],
    size_of: Callable[[int], int],
    skip: Callable[[str], None] | None,
) -> tuple[Store, Callable[[int], str]]:
    store = LooseImages(tree, numbers, size_of, skip)

    def name(index: int) -> str:
        return str(store.file(index))

    return store, name


def _images_of(tree: RandomTree) -> list[int]:
    """Numbers of the images in a folder or a tar, by their names, in any folder of it."""
    numbers = [number for number, name in enumerate(tree.names) if is_image(name)]
    if not numbers:
        raise ValueError(
            f"{readable(tree.path)}: holds no images: images are files named {', '.join(SUFFIXES)}"
        )
    return sorted(numbers, key=lambda number: tree.names[number])


def _size_in(tree: ListedFolder) -> Callable[[int], int]:
    def size(number: int) -> int:
        return os.stat(tree.path / tree.names[number]).st_size

    return size


def _size_packed(tree: TarTree | ZipTree) -> Callable[[int], int]:
    def size(number: int) -> int:
        return int(tree.sizes[number])

    return size
