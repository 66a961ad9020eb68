"""An image folder in ImageNet's layout as a store: no conversion.

Which files are images: see listing.py.
"""

import contextlib
import os
from pathlib import Path

import numpy as np

from pipelines.archives.listing import INDEX, list_images
from pipelines.files import first_bytes, read_regular
from pipelines.images import UNREADABLE, reason
from pipelines.progress import in_order
from pipelines.sources.image_files import (
    CHUNK,
    THREADS,
    ImageFilesStore,
    Sides,
    index_places,
    keep_index,
    read_index,
    refused_sides,
)

INDEX_VERSION = 2  # 1 held the sides as stored, not the upright ones

Stamp = tuple[str, int, int]  # name, bytes, time of its last change in ns: the file as it was


class FolderStore(ImageFilesStore):
    """`path`/CLASS/**/IMAGE.

    Raises:
        ValueError: no class folders, a class without images, files that are no images.
    """

    described_as = "an image folder"

    _index_name = INDEX

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        listing = list_images(self.path)
        self.classes = listing.classes
        self.notes = listing.notes()
        self._names = [os.path.relpath(file, path) for file, _ in listing.files]
        self.labels = np.array([label for _, label in listing.files], np.int64)
        sizes, _, heights, widths = self._scan().T
        self._use(sizes, heights, widths)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.is_dir()

    def _file_content(self, index: int, most: int | None = None) -> bytes:
        path = self.file(index)
        return read_regular(path) if most is None else first_bytes(path, most)

    def _scan(self) -> np.ndarray:
        """int64 (N, 4): bytes, time of the last change in ns, height and width of every file.

        The kept index saves reading headers again.

        Raises:
            ValueError: files that are no images, or too large.
        """
        places = index_places(self.path / INDEX, self.path)
        known: dict[Stamp, Sides] = {}
        for place in places:
            with contextlib.suppress(Exception):  # bad, old or missing: it is made again
                names, table = read_index(place, INDEX_VERSION)
                for name, (size, mtime_ns, height, width) in zip(
                    names, table.tolist(), strict=True
                ):
                    known[name, size, mtime_ns] = (height, width)
        n_known = len(known)

        def row(index: int) -> tuple[int, int, int, int] | str:
            """The numbers of one file, or what is wrong with it."""
            path = self.file(index)
            try:
                stat = os.stat(path)
                stamp = (self._names[index], stat.st_size, stat.st_mtime_ns)
                if stamp not in known:
                    known[stamp] = self._sides(index)
            except UNREADABLE as error:
                return reason(error, path)
            sides = known[stamp]
            return refused_sides(sides) or (stat.st_size, stat.st_mtime_ns, *sides)

        numbers = range(len(self._names))
        rows = list(in_order(row, numbers, THREADS, CHUNK, "image headers"))
        self._refuse_bad(rows)
        table = np.array(rows, np.int64)
        if len(known) > n_known:
            keep_index(places, self._names, table, INDEX_VERSION)
        return table
