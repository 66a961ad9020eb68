"""What stores of image files share, wherever the files lie: in a folder, or in a tar.

The headers of the files are scanned once, into an index that is kept. Each image is served as
conversion would store it: see images.py.
"""

import contextlib
import hashlib
import io
import os
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.files import GIGABYTE, read_regular, readable
from pipelines.images import UNREADABLE, reason, upright_jpeg, upright_sides
from pipelines.jpeg import jpeg_header
from pipelines.store import JPG, MAX_SIDE, DamagedData, Store

THREADS = 16  # that wait for the disk
CHUNK = 256  # files of one task
HEADS_BYTES = (1 << 13, 1 << 16)  # nearly always hold what stands before a JPEG's pixels
MOST_INDEX_BYTES = GIGABYTE
MOST_TOLD = 5  # files that a message lists

Sides = tuple[int, int]  # height, width; of the upright picture


class ImageFilesStore(Store):
    """Image files, which a subclass lists and reads.

    Upright RGB JPEGs are served byte for byte. What else can be read (a PNG named .JPEG, grey,
    CMYK, turned by Exif) becomes such a JPEG each time it is read: see images.py.
    """

    classes: tuple[str, ...]

    _names: Sequence[str]  # of the files, below the store's path
    _index_name: str  # of the kept index, for messages

    def file(self, index: int) -> Path:
        """Where sample `index` lies; in an archive, what its path would be."""
        return self.path / self._names[index]

    def read(self, index: int) -> np.ndarray:
        """A JPEG, uint8 (n,); n differs from `sizes[index]` if the file had to be re-encoded.

        See `Store.read`.
        """
        expected = (int(self.heights[index]), int(self.widths[index]))
        try:
            data, found = upright_jpeg(self._file_content(index))
        except UNREADABLE as error:
            raise self._damaged(index, reason(error, self.file(index))) from error
        if found != expected:
            raise self._damaged(
                index, f"{found} pixels, {expected} when it was scanned (into {self._index_name})"
            )
        return np.frombuffer(data, np.uint8)

    @abstractmethod
    def _file_content(self, index: int, most: int | None = None) -> bytes:
        """A file's content, or its first `most` bytes. Raises any of UNREADABLE."""

    def _use(self, sizes: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> None:
        """Take what is known of the files, int64 (N,) each."""
        self.sizes = sizes.copy()
        self.heights = heights.astype(np.int32)
        self.widths = widths.astype(np.int32)
        self.modes = np.full(len(self._names), JPG, np.uint8)

    def _damaged(self, index: int, what: str) -> DamagedData:
        return DamagedData(f"{self.name_of(index)}: {what}")

    def _content_crc32(self) -> int:
        # Neither where the files lie nor when they were written: a copy is the same data.
        names = "\0".join(self._names).encode(errors="surrogateescape")
        return self._crc32_of_some_samples(self._crc32_of_tables(zlib.crc32(names)))

    def content(self, index: int) -> bytes:
        """The file as it is: what it is served as depends on the version of Pillow."""
        try:
            return self._file_content(index)
        except (OSError, ValueError) as error:
            raise self._damaged(index, reason(error, self.file(index))) from error

    # ------------------------------------------------------------------ headers

    def _sides(self, index: int) -> Sides:
        """Upright (height, width) from a file's header. Raises any of UNREADABLE."""
        for most in HEADS_BYTES:
            head = self._file_content(index, most)
            if jpeg_header(head) is not None:
                return upright_sides(head)
            if len(head) < most:
                return upright_sides(head)  # that was all of it
        return upright_sides(self._file_content(index))

    def _refuse_bad(self, rows: Sequence[object]) -> None:
        """ValueError for those that say what is wrong with a file."""
        bad = [
            f"{name}: {row}"
            for name, row in zip(self._names, rows, strict=True)
            if isinstance(row, str)
        ]
        if not bad:
            return
        lines = [
            f"{readable(self.path)}: {len(bad):,} files cannot be used: mend or remove them"
            " (fap-convert lists all, and --skip-bad leaves them out)"
        ]
        lines += [readable(line) for line in bad[:MOST_TOLD]]
        if len(bad) > MOST_TOLD:
            lines.append(f"and {len(bad) - MOST_TOLD:,} more")
        raise ValueError("\n  ".join(lines))


def refused_sides(sides: Sides) -> str | None:
    """Why an image of such sides cannot be used; None where it can."""
    height, width = sides
    if min(height, width) < 1 or max(height, width) > MAX_SIDE:
        return f"{height} x {width} pixels: sides must be 1 to {MAX_SIDE}"
    return None


# ------------------------------------------------------------------ kept indexes


def index_places(beside: Path, path: Path) -> list[Path]:
    """Where an index of the data at `path` may be kept: there, or in the user's cache."""
    places = [beside]
    with contextlib.suppress(RuntimeError):  # no HOME, and a user without an account
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(bytes(path.resolve())).hexdigest()
        places.append(cache / "fap" / f"{name}.npz")
    return places


def read_index(place: Path, version: int) -> tuple[list[str], np.ndarray]:
    """Names and a table, int64 (N, columns), as `write_index` wrote them.

    Raises any exception for what it did not write.
    """
    content = io.BytesIO(read_regular(place, MOST_INDEX_BYTES))
    with zipfile.ZipFile(content) as archive:  # compressed, it could be of any size
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    with np.load(content, allow_pickle=False) as index:
        assert index["version"] == version
        names = os.fsdecode(index["names"].tobytes()).split("\0")
        table = index["table"]
    assert table.dtype == np.int64
    assert len(table) == len(names)
    return names, table


def keep_index(
    places: Sequence[Path], names: Sequence[str], table: np.ndarray, version: int
) -> None:
    """Write an index to the first place that takes it; with none, the next run scans again."""
    # Joined: an array of texts would take the longest name's room for each.
    joined = np.frombuffer(os.fsencode("\0".join(names)), np.uint8)
    for place in places:
        temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp.npz")
        with contextlib.suppress(OSError):  # read-only or full
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                np.savez(temporary, version=np.array(version), names=joined, table=table)
                os.replace(temporary, place)
            finally:
                temporary.unlink(missing_ok=True)
            return
