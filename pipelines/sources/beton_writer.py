"""Writes a `.beton` that FFCV reads too, and its sidecar: both completely, or neither.

Everything is written to `DST.part` and `DST.part.json`, synced, and renamed at the end.
"""

import os
import stat
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np

from pipelines.boxes import Annotations
from pipelines.files import lock, readable, sync_folder
from pipelines.names import checked_names
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_layout import (
    ALLOCATION,
    FIELD,
    HEADER,
    IMAGES,
    PLANES_AND_SIDES,
    VERSION,
    field_descriptors,
    metadata_row,
)
from pipelines.sources.sidecar import Sidecar, parse_sidecar, sidecar_path, sidecar_text
from pipelines.store import PLANES

PAGE_BYTES = 8 << 20  # FFCV's default
BUFFER_BYTES = 1 << 20
HAND_OVER_BYTES = 16 << 20  # that the disk is given to write at a time
ROWS_AT_ONCE = 1 << 20  # of a table that is written
READABLE_AND_WRITABLE = 0o666  # by all, less the user's umask


class Sample(NamedTuple):
    """One image as it is stored."""

    data: bytes
    mode: int  # JPG, RAW or PLANES
    height: int
    width: int
    verbatim: bool = False  # the bytes are those of the source
    crc32: int | None = None  # of the data, where a thread has computed it already


class BetonWriter:
    """Writes `DST.part` in a `with` block; `commit` makes it DST.

    Leaving without it removes the partial file.

    Raises:
        ValueError: there is a DST, or another conversion is writing it.
    """

    def __init__(
        self,
        dst: str | Path,
        capacity: int,  # samples at most
        planes: bool = False,  # all samples are of mode PLANES; else none is
    ) -> None:
        self.dst = Path(dst)
        self.part = Path(f"{dst}.part")
        self._renaming = False
        refuse_existing(self.dst)
        self._file = self._open_part()
        try:
            refuse_existing(self.dst)  # what another conversion has finished since
            self._file.truncate(0)
            self.count = 0
            self._page_bytes = PAGE_BYTES
            self._planes = planes
            self._fields = PLANES_AND_SIDES if planes else IMAGES
            self._rows = np.zeros(capacity, metadata_row(self._fields))
            self._ptrs = np.zeros(capacity, np.uint64)
            self._sizes = np.zeros(capacity, np.uint64)  # 0: no sample is there
            self._crc32 = np.zeros(capacity, np.uint32)
            # The data begin at the first page behind room for the header and all rows.
            tables_bytes = HEADER.itemsize + len(self._fields) * FIELD.itemsize + self._rows.nbytes
            self._handed_over = self._file.seek(tables_bytes + -tables_bytes % PAGE_BYTES)
        except BaseException:
            self._remove()
            raise

    def add(self, sample: Sample, label: int, place: int | None = None) -> None:
        """Write a sample's bytes, on the next page if this one has no room for them.

        `place`, below `capacity`, is its number among the samples, if they come in another order
        than they are to have; places that stay empty are closed up. None: it is the next one.
        """
        if place is None:
            place = self.count
        size = len(sample.data)
        assert size > 0
        assert (sample.mode == PLANES) == self._planes
        assert not self._sizes[place], f"two samples for place {place}"
        at = self._file.tell()
        # The page is the smallest power of two that holds the largest sample. Samples placed for
        # smaller pages straddle none of the larger ones.
        self._page_bytes = max(self._page_bytes, 1 << (size - 1).bit_length())
        room = -at % self._page_bytes
        if size > room:
            at = self._file.seek(at + room)
        if self._planes:
            self._rows[place] = ((at, size), label, sample.height, sample.width)
        else:
            self._rows[place] = ((sample.mode, sample.width, sample.height, at), label)
        self._ptrs[place] = at
        self._sizes[place] = size
        crc32 = sample.crc32
        if crc32 is None:
            crc32 = zlib.crc32(sample.data)
        self._crc32[place] = crc32
        self._file.write(sample.data)
        self.count += 1
        if at + size - self._handed_over >= HAND_OVER_BYTES:
            self._hand_over(at + size)

    def _hand_over(self, end: int) -> None:
        """Let the disk begin with what lies before `end`, so that `commit` waits for little.

        The name of the advice says something else, but on Linux it starts to write what the disk
        does not have yet. An error of the disk comes when `commit` syncs.
        """
        n_bytes = end - self._handed_over
        with suppress(OSError):  # it is advice only
            os.posix_fadvise(
                self._file.fileno(), self._handed_over, n_bytes, os.POSIX_FADV_DONTNEED
            )
        self._handed_over = end

    def commit(
        self,
        classes: Sequence[str] | None,
        encoding: dict[str, Any],
        *,
        annotations: Annotations | None = None,
    ) -> None:
        """Write tables and sidecar, sync, rename.

        `classes` is None where the labels have no names; `encoding` says how the file was made.
        With `annotations` the labels must be 0, 1, ... in the order of the samples.
        """
        n = self.count
        end = self._file.tell()
        filled = np.flatnonzero(self._sizes)
        assert len(filled) == n
        for start in range(0, n, ROWS_AT_ONCE):
            rows = filled[start : start + ROWS_AT_ONCE]
            allocations = np.zeros(len(rows), ALLOCATION)
            allocations["sample"] = np.arange(start, start + len(rows))
            allocations["ptr"] = self._ptrs[rows]
            allocations["size"] = self._sizes[rows]
            self._file.write(allocations.tobytes())
        header = np.array((VERSION, len(self._fields), self._page_bytes, n, end), HEADER)
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.write(field_descriptors(self._fields).tobytes())
        self._write_rows(filled)
        self._file.flush()
        os.fsync(self._file.fileno())
        del self._rows, self._ptrs, self._sizes  # of a large set, before the file is read again
        if classes is not None:
            classes = tuple(classes)
        write_sidecar(
            self.part,
            classes=classes,
            encoding=encoding,
            crc32=self._crc32[filled],
            annotations=annotations,
        )
        # The sidecar first: a `.beton` without one would be read without checksums.
        self._renaming = True
        os.replace(sidecar_path(self.part), sidecar_path(self.dst))
        os.replace(self.part, self.dst)
        try:
            sync_folder(self.dst.parent)
        except OSError as error:
            error.filename = os.fspath(self.dst)  # it is there, but a power cut may undo that
            raise

    def _write_rows(self, filled: np.ndarray) -> None:
        """The metadata of the places that are `filled`, in their order.

        Picked as bytes: of rows that numpy picks, what lies in the gaps between entries is whatever
        the memory held.
        """
        rows = self._rows.view(np.uint8).reshape(len(self._rows), self._rows.itemsize)
        for start in range(0, len(filled), ROWS_AT_ONCE):
            self._file.write(rows[filled[start : start + ROWS_AT_ONCE]].tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: object, error: BaseException | None, traceback: object) -> None:
        # Such as the error of a full disk: say which file.
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(self.part)
        self._remove()

    def _remove(self) -> None:
        for path in (self.part, sidecar_path(self.part)):
            path.unlink(missing_ok=True)
        if self._renaming and not os.path.lexists(self.dst):  # stopped between the two
            sidecar_path(self.dst).unlink(missing_ok=True)
        with suppress(OSError):  # a full disk fails again when the buffer is flushed
            self._file.close()

    # ------------------------------------------------------------------ who writes DST

    def _open_part(self) -> IO[bytes]:
        """`DST.part`, locked; never one that another conversion is writing.

        It is new, or left by a conversion that was killed.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW  # never through a link that lies there
        try:
            descriptor = os.open(self.part, flags | os.O_CREAT | os.O_EXCL, READABLE_AND_WRITABLE)
            is_new = True
        except FileExistsError:
            if not stat.S_ISREG(os.lstat(self.part).st_mode):
                raise ValueError(
                    f"{readable(self.part)}: exists and is not a file; choose another name"
                ) from None
            descriptor = os.open(self.part, flags)
            is_new = False
        file = open(descriptor, "r+b", BUFFER_BYTES)  # noqa: SIM115
        try:
            self._claim(file, is_new)
        except BaseException:
            file.close()
            raise
        return file

    def _claim(self, file: IO[bytes], is_new: bool) -> None:
        """ValueError if the open `DST.part` is another conversion's, or may be."""
        part = readable(self.part)
        try:
            locked = lock(file)  # gone with its process, even a killed one
        except BlockingIOError:
            raise ValueError(f"{part}: another conversion is writing it") from None
        if locked:
            # Its writer may have finished, and renamed or removed it, before the lock was ours.
            if not self._is_part(file):
                raise ValueError(f"{part}: another conversion was writing it")
        elif is_new:
            print(
                f"warning: {part}: no locks on this file system;"
                " leave the file alone while it is written",
                file=sys.stderr,
            )
        else:
            raise ValueError(
                f"{part}: exists, and no locks on this file system say whether another conversion"
                " is writing it: if none is, remove it"
            )

    def _is_part(self, file: IO[bytes]) -> bool:
        """Whether the open file is still the one called `DST.part`."""
        if not os.path.lexists(self.part):
            return False
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(self.part))


def refuse_existing(dst: Path) -> None:
    """ValueError where a conversion to `dst` would overwrite something."""
    for path in (dst, sidecar_path(dst)):
        if os.path.lexists(path):
            raise ValueError(
                f"{readable(path)} exists and is not overwritten; remove it or choose another name"
            )


def write_sidecar(
    path: str | Path,
    *,
    classes: tuple[str, ...] | None,
    encoding: dict[str, Any],
    crc32: np.ndarray,  # uint32 (N,), of the samples' bytes
    annotations: Annotations | None = None,
) -> None:
    """Write the sidecar of the complete `.beton` at `path`, whose tables are validated first.

    Raises:
        ValueError: class names that are not unique texts, or more than fits into a sidecar.
        DamagedData: the tables contradict each other, there are fewer classes than labels, or the
            annotations are not of these images.
    """
    store = BetonStore(path, use_sidecar=False)
    store.close()
    assert len(crc32) == len(store)
    checked_names(classes)
    side = sidecar_path(path)
    try:
        text = sidecar_text(Sidecar(classes, encoding, crc32, store.tables_crc32, annotations))
    except ValueError as error:
        raise ValueError(f"{readable(side)}: {error}") from None
    # As it will be read: what would be refused then is refused now.
    store.use(parse_sidecar(text))
    side.unlink(missing_ok=True)
    with open(side, "x") as file:  # never through a link that lies there
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
