"""An image folder in ImageNet's layout as a store: no conversion.

The headers of its files are scanned once, into a cached index. Each image is served as conversion
would store it: see images.py. Which files are images: see listing.py.
"""

import contextlib
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.files import GIGABYTE, open_regular, read_regular, readable
from pipelines.images import UNREADABLE, reason, upright_jpeg, upright_sides
from pipelines.jpeg import jpeg_header
from pipelines.progress import in_order
from pipelines.sources.listing import INDEX, list_images
from pipelines.store import JPG, MAX_SIDE, DamagedData, Store

THREADS = 16  # that wait for the disk
CHUNK = 256  # files of one task
HEAD_BYTES = 1 << 16  # nearly always hold what stands before a JPEG's pixels
INDEX_VERSION = 2  # 1 held the sides as stored, not the upright ones
MOST_INDEX_BYTES = GIGABYTE
MOST_TOLD = 5  # files that a message lists

Stamp = tuple[str, int, int]  # name, bytes, time of its last change in ns: the file as it was
Sides = tuple[int, int]  # height, width; of the upright picture


class FolderStore(Store):
    """`path`/CLASS/**/IMAGE.

    Upright RGB JPEGs are served byte for byte. What else can be read (a PNG named .JPEG, grey,
    CMYK, turned by Exif) becomes such a JPEG each time it is read: see images.py.

    Raises:
        ValueError: no class folders, a class without images, files that are no images.
    """

    described_as = "an image folder"

    classes: tuple[str, ...]

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        listing = list_images(self.path)
        self.classes = listing.classes
        self.notes = listing.notes()
        self._names = [os.path.relpath(file, path) for file, _ in listing.files]
        self.labels = np.array([label for _, label in listing.files], np.int64)
        sizes, _, heights, widths = self._scan().T
        self.sizes = sizes.copy()
        self.heights = heights.astype(np.int32)
        self.widths = widths.astype(np.int32)
        self.modes = np.full(len(listing.files), JPG, np.uint8)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.is_dir()

    def file(self, index: int) -> Path:
        """Where sample `index` lies."""
        return self.path / self._names[index]

    def read(self, index: int) -> np.ndarray:
        """A JPEG, uint8 (n,); n differs from `sizes[index]` if the file had to be re-encoded.

        See `Store.read`.
        """
        expected = (int(self.heights[index]), int(self.widths[index]))
        try:
            data, found = upright_jpeg(read_regular(self.file(index)))
        except UNREADABLE as error:
            raise self._damaged(index, reason(error, self.file(index))) from error
        if found != expected:
            raise self._damaged(
                index, f"{found} pixels, {expected} when it was scanned (into {INDEX})"
            )
        return np.frombuffer(data, np.uint8)

    def _damaged(self, index: int, what: str) -> DamagedData:
        return DamagedData(f"{self.name_of(index)}: {what}")

    def _content_crc32(self) -> int:
        # Neither where the folder lies nor when its files were written: a copy is the same data.
        names = "\0".join(self._names).encode(errors="surrogateescape")
        return self._crc32_of_some_samples(self._crc32_of_tables(zlib.crc32(names)))

    def _content(self, index: int) -> bytes:
        """The file as it is: what it is served as depends on the version of Pillow."""
        try:
            return read_regular(self.file(index))
        except (OSError, ValueError) as error:
            raise self._damaged(index, reason(error, self.file(index))) from error

    # ------------------------------------------------------------------ headers

    def _scan(self) -> np.ndarray:
        """int64 (N, 4): bytes, time of the last change in ns, height and width of every file.

        The cached index saves reading headers again.

        Raises:
            ValueError: files that are no images, or too large.
        """
        places = self._index_places()
        known: dict[Stamp, Sides] = {}
        for place in places:
            with contextlib.suppress(Exception):  # bad, old or missing: it is made again
                known |= _read_index(place)
        n_known = len(known)

        def row(name: str) -> tuple[int, int, int, int] | str:
            """The numbers of one file, or what is wrong with it."""
            path = os.path.join(self.path, name)
            try:
                stat = os.stat(path)
                stamp = (name, stat.st_size, stat.st_mtime_ns)
                if stamp not in known:
                    known[stamp] = self._sides(path)
            except UNREADABLE as error:
                return reason(error, path)
            height, width = known[stamp]
            if min(height, width) < 1 or max(height, width) > MAX_SIDE:
                return f"{height} x {width} pixels: sides must be 1 to {MAX_SIDE}"
            return stat.st_size, stat.st_mtime_ns, height, width

        rows = list(in_order(row, self._names, THREADS, CHUNK, "image headers"))
        self._refuse_bad(rows)
        table = np.array(rows, np.int64)
        if len(known) > n_known:
            self._keep(places, table)
        return table

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

    def _sides(self, path: str) -> Sides:
        """Upright (height, width) from the file's header. Raises any of UNREADABLE."""
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
        if jpeg_header(head) is not None:
            return upright_sides(head)
        return upright_sides(read_regular(path))

    # ------------------------------------------------------------------ their cache

    def _index_places(self) -> list[Path]:
        """In the folder, and in the user's cache if that is read-only."""
        places = [self.path / INDEX]
        with contextlib.suppress(RuntimeError):  # no HOME, and a user without an account
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            name = hashlib.sha256(bytes(self.path.resolve())).hexdigest()
            places.append(cache / "fap" / f"{name}.npz")
        return places

    def _keep(self, places: Sequence[Path], table: np.ndarray) -> None:
        """Write the index to the first place that takes it; with none, the next run scans again."""
        for place in places:
            with contextlib.suppress(OSError):  # read-only or full
                place.parent.mkdir(parents=True, exist_ok=True)
                _write_index(place, self._names, table)
                return


def _read_index(place: Path) -> dict[Stamp, Sides]:
    """What `_write_index` wrote. Raises any exception for what it did not write."""
    content = io.BytesIO(read_regular(place, MOST_INDEX_BYTES))
    with zipfile.ZipFile(content) as archive:  # compressed, it could be of any size
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    with np.load(content, allow_pickle=False) as index:
        assert index["version"] == INDEX_VERSION
        names = os.fsdecode(index["names"].tobytes()).split("\0")
        table = index["table"]
    assert table.dtype == np.int64
    return {
        (name, size, mtime_ns): (height, width)
        for name, (size, mtime_ns, height, width) in zip(names, table.tolist(), strict=True)
    }


def _write_index(place: Path, names: Sequence[str], table: np.ndarray) -> None:
    # Joined: an array of texts would take the longest name's room for each.
    joined = np.frombuffer(os.fsencode("\0".join(names)), np.uint8)
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp.npz")
    try:
        np.savez(temporary, version=np.array(INDEX_VERSION), names=joined, table=table)
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)
