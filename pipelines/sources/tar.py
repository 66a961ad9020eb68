"""A tar of class folders, or of tars, as a store: no conversion, and nothing is unpacked."""

import contextlib
import os
from collections import Counter
from pathlib import Path

import numpy as np

from pipelines.archives.listing import notes_of
from pipelines.archives.names import ClassFolders, class_folders, innermost_root, looks_like_shards
from pipelines.archives.tar import TarTree, has_tar_header
from pipelines.files import open_regular, readable
from pipelines.images import UNREADABLE, reason
from pipelines.progress import in_order
from pipelines.sources.image_files import (
    CHUNK,
    THREADS,
    ImageFilesStore,
    index_places,
    keep_index,
    read_index,
    refused_sides,
)

INDEX_VERSION = 1


class TarStore(ImageFilesStore):
    """A plain tar whose members lie in class folders; ILSVRC2012_img_train.tar is one.

    Raises:
        ValueError: a damaged archive, one without class folders, members that are no images.
    """

    described_as = "a tar of class folders"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._index_name = f".{self.path.name}.fap-index.npz"
        places = index_places(self.path.with_name(self._index_name), self.path)
        self._tree = TarTree(self.path)
        try:
            root = innermost_root(self._tree.names)
            found = self._class_folders(root)
            self.classes = found.classes
            self.labels = np.array(found.labels, np.int64)
            self.notes = notes_of(self._tree.passed_over + Counter(found.ignored))
            self._files = np.array(found.files, np.int64)
            # Below the class folders' own folder: a copy from elsewhere is the same data.
            self._names = [self._tree.names[file].removeprefix(root) for file in found.files]
            heights, widths = self._scan(places)
            self._use(self._tree.sizes[self._files], heights, widths)
        except BaseException:
            self._tree.close()
            raise

    def _class_folders(self, root: str) -> ClassFolders:
        """Raises ValueError where there are none."""
        where = readable(self.path)
        if looks_like_shards(self._tree.names):
            raise ValueError(
                f"{where}: WebDataset shards are not read in place: convert them with fap-convert"
            )
        try:
            return class_folders(self._tree.names, root)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.is_file() and has_tar_header(path)

    def file(self, index: int) -> Path:
        return self.path / self._tree.names[self._files[index]]

    def files(self) -> list[Path]:
        """The tar: a member is no file of its own."""
        return [self.path]

    def close(self) -> None:
        self._tree.close()

    def _file_content(self, index: int, most: int | None = None) -> bytes:
        return self._tree.read(int(self._files[index]), most)

    def _scan(self, places: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths, int64 (N,) each. Raises ValueError for members that are no images."""
        with open_regular(self.path) as file:
            stat = os.fstat(file.fileno())
        # A tar that was changed since is scanned again.
        version = hash((INDEX_VERSION, stat.st_size, stat.st_mtime_ns)) % (1 << 62)
        for place in places:
            with contextlib.suppress(Exception):  # bad, old or missing: it is made again
                names, table = read_index(place, version)
                assert names == self._names
                heights, widths = table.T
                return heights, widths

        def row(index: int) -> tuple[int, int] | str:
            try:
                sides = self._sides(index)
            except UNREADABLE as error:
                return reason(error, self.file(index))
            return refused_sides(sides) or sides

        order = np.argsort(self._tree.positions[self._files], kind="stable").tolist()
        rows: list[tuple[int, int] | str] = [""] * len(order)
        for index, found in zip(
            order, in_order(row, order, THREADS, CHUNK, "image headers"), strict=True
        ):
            rows[index] = found
        self._refuse_bad(rows)
        table = np.array(rows, np.int64)
        keep_index(places, self._names, table, version)
        heights, widths = table.T
        return heights, widths
