"""`.beton`, FFCV's format, version 2: its layout, a reader that trusts nothing in the file, a
writer, the checksum sidecar.
"""

import base64
import json
import os
import stat
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np

from pipelines.files import lock, open_regular, read_regular, readable, shown, sync_folder
from pipelines.jpeg import PIXELS_PER_BYTE, jpeg_sides
from pipelines.names import checked_names
from pipelines.store import JPG, MAX_SIDE, RAW, DamagedData, Store

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_ptr", "<u8"),
    ]
)

FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])

IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])

ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

INT_FIELD, IMAGE_FIELD = 1, 2  # FFCV's type ids

SIDECAR_VERSION = 2

SIDECAR_BYTES = 1 << 28  # at most; 40 million samples' checksums

COLUMNS = {INT_FIELD: ("label", "<i8"), IMAGE_FIELD: ("image", IMAGE)}  # of the metadata table


class BetonStore(Store):
    """A `.beton` of one RGB image and one integer label per sample.

    Raises:
        DamagedData: other fields, or header or tables contradict each other, the file's size or the
        sidecar.
    """

    def __init__(self, path: str | Path, *, use_sidecar: bool = True) -> None:
        self.path = Path(path)
        self._file = open_regular(self.path)
        try:
            self._load_tables(os.fstat(self._file.fileno()).st_size)
            self._use(read_sidecar(self.path) if use_sidecar else None)
        except BaseException:
            self._file.close()
            raise

    def _use(self, sidecar: "Sidecar | None") -> None:
        """Class names and checksums, which must fit this file."""
        self.classes = None
        self.crc32 = None
        if sidecar is None:
            return
        side = readable(sidecar_path(self.path))
        same = (sidecar.tables_crc32, len(sidecar.crc32)) == (self.tables_crc32, len(self))
        self._require(same, f"header or tables are not those that {side} describes")
        if sidecar.classes is not None:
            least, most = int(self.labels.min()), int(self.labels.max())
            named = least >= 0 and most < len(sidecar.classes)
            self._require(
                named, f"labels {least} to {most}, but {side} names {len(sidecar.classes)} classes"
            )
        self.classes = sidecar.classes
        self.crc32 = sidecar.crc32
        self.odd_classes_are_meant = sidecar.encoding.get("allow_odd_classes") is True
        skipped = sidecar.encoding.get("skipped")
        if isinstance(skipped, list) and skipped:
            self.notes = (
                (
                    f"{len(skipped):,} damaged images were left out when {readable(self.path)} was"
                    " made"
                ),
            )

    def _load_tables(self, file_size: int) -> None:
        head = self._pread(HEADER.itemsize, 0, "header")
        version, fields, page, n, alloc_ptr = np.frombuffer(head, HEADER)[0].item()
        self._require(version == 2, f"not a version 2 FFCV file (version {version})")
        self._require(page.bit_count() == 1, f"page size {page} is no power of two")
        # exact: no single wrong count or pointer survives
        fits = n > 0 and alloc_ptr + n * ALLOCATION.itemsize == file_size
        self._require(
            fits, f"{n} samples, allocation table at {alloc_ptr}: not a file of {file_size} bytes"
        )
        head += self._pread(2 * FIELD.itemsize, len(head), "field descriptors")
        types = np.frombuffer(head, FIELD, offset=HEADER.itemsize)["type_id"].tolist()
        known = fields == 2 and sorted(types) == [INT_FIELD, IMAGE_FIELD]
        self._require(
            known, f"{fields} fields, types {types}: need one RGB image and one integer label"
        )
        row = np.dtype([COLUMNS[t] for t in types], align=True)
        data_start = len(head) + n * row.itemsize
        self._require(data_start <= alloc_ptr, f"{n} metadata rows overlap the allocation table")
        metadata = self._pread(n * row.itemsize, len(head), "metadata")
        allocations = self._pread(n * ALLOCATION.itemsize, alloc_ptr, "allocation table")
        self.tables_crc32 = zlib.crc32(head + metadata + allocations)

        table, alloc = np.frombuffer(metadata, row), np.frombuffer(allocations, ALLOCATION)
        alloc = alloc[np.argsort(alloc["sample"])]
        self._require(
            np.array_equal(alloc["sample"], np.arange(n)), "allocation table: not every sample once"
        )
        image, sizes, ptrs = table["image"], alloc["size"], alloc["ptr"]
        self.modes, self.labels = image["mode"].copy(), table["label"].copy()
        self.heights, self.widths = (
            image["height"].astype(np.int32),
            image["width"].astype(np.int32),
        )
        self.sizes, self._ptrs = sizes.astype(np.int64), ptrs.astype(np.int64)
        self._check(ptrs == image["data_ptr"], "metadata and allocation table disagree")
        inside = (
            (ptrs >= data_start) & (ptrs < alloc_ptr) & (sizes > 0) & (sizes <= alloc_ptr - ptrs)
        )
        self._check(inside, "its pointer or size reaches outside the data")
        pixels = 3 * self.heights.astype(np.uint64) * self.widths.astype(np.uint64)
        sides = np.maximum(self.heights, self.widths) <= MAX_SIDE
        self._check((self.modes <= RAW) & (pixels > 0) & sides, "bad mode or dimensions")
        self._check((self.modes == JPG) | (sizes == pixels), "raw size is not height x width x 3")
        self._check(
            (self.modes == RAW) | (pixels <= 3 * PIXELS_PER_BYTE * sizes),
            "too few bytes for a JPEG of its dimensions",
        )
        order, free = np.argsort(ptrs), np.ones(n, bool)
        free[order[1:]] = (ptrs + sizes)[order[:-1]] <= ptrs[order[1:]]
        self._check(free, "its data overlap another sample's")

    def read(self, index: int) -> np.ndarray:
        raw = self._pread(int(self.sizes[index]), int(self._ptrs[index]), f"sample {index}")
        if self.crc32 is not None:
            self._require(zlib.crc32(raw) == self.crc32[index], f"sample {index}: wrong checksum")
        if self.modes[index] == JPG:
            found, expected = jpeg_sides(raw), (int(self.heights[index]), int(self.widths[index]))
            self._require(
                found == expected,
                f"sample {index}: JPEG of {found} pixels, the table says {expected}",
            )
        return np.frombuffer(raw, np.uint8)

    def _content_crc32(self) -> int:
        if self.crc32 is not None:
            return zlib.crc32(self.crc32.tobytes(), self.tables_crc32)
        return self._crc32_of_some(self.tables_crc32, lambda index: self.read(index).tobytes())

    def close(self) -> None:
        self._file.close()

    def _pread(self, size: int, offset: int, what: str) -> bytes:
        """pread, not mmap: a file that shrinks under us is a short count instead of a SIGBUS."""
        raw = b""
        try:  # Linux reads at most 2 GiB at once
            while len(raw) < size and (
                more := os.pread(self._file.fileno(), size - len(raw), offset + len(raw))
            ):
                raw += more
        except OSError as error:
            raise DamagedData(f"{readable(self.path)}: {what}: {error}") from error
        self._require(
            len(raw) == size, f"{what}: {size} bytes expected at {offset}, {len(raw)} found"
        )
        return raw

    def _require(self, ok: bool, what: str) -> None:
        if not ok:
            raise DamagedData(f"{readable(self.path)}: {what}")

    def _check(self, ok: np.ndarray, what: str) -> None:
        self._require(bool(ok.all()), f"sample {np.argmin(ok)}: {what}")


class Sidecar(NamedTuple):
    """What a `.beton` cannot say about itself."""

    classes: tuple[str, ...] | None
    encoding: dict[str, Any]  # how convert made it
    crc32: np.ndarray  # uint32 (N,), one per sample's encoded bytes
    tables_crc32: int  # header, field descriptors, metadata and allocation table, in this order


def sidecar_path(path: str | Path) -> Path:
    """`NAME.beton.json` for `NAME.beton`."""
    return Path(f"{path}.json")


def _content_checksum(content: dict[str, Any]) -> int:
    """CRC-32 of a sidecar's entries, of all but the checksum itself."""
    entries = {name: value for name, value in content.items() if name != "checksum"}
    return zlib.crc32(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode())


def read_sidecar(path: str | Path) -> Sidecar | None:
    """The sidecar of the `.beton` at `path`, None where there is none."""
    side = sidecar_path(path)
    if not os.path.lexists(side):
        return None
    try:
        return _parse_sidecar(json.loads(read_regular(side, SIDECAR_BYTES)))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        why = readable(f"{type(error).__name__}: {error}", 400)  # never the whole file
        remedy = "convert again, or delete it to read without checksums"
        raise DamagedData(f"{readable(side)}: {why}: {remedy}") from error


def _parse_sidecar(content: Any) -> Sidecar:
    """Raises one of many errors for what `write_sidecar` would not write."""
    if content["version"] != SIDECAR_VERSION:
        raise ValueError(f"version {shown(content['version'], 40)}, not {SIDECAR_VERSION}")
    if content["checksum"] != _content_checksum(content):
        raise ValueError("its content is not that of its checksum")
    crc32 = np.frombuffer(base64.b64decode(content["crc32"], validate=True), "<u4")
    classes, encoding, tables_crc32 = (
        content["classes"],
        content["encoding"],
        content["tables_crc32"],
    )
    if type(content["count"]) is not int or content["count"] != len(crc32):
        raise ValueError("count is not the number of checksums")
    if type(tables_crc32) is not int or type(encoding) is not dict:
        raise ValueError("tables_crc32 must be a number and encoding an object")
    return Sidecar(checked_names(classes), encoding, crc32, tables_crc32)


def write_sidecar(
    path: str | Path,
    *,
    classes: tuple[str, ...] | None,
    encoding: dict[str, Any],
    crc32: np.ndarray,
) -> None:
    """Write the sidecar of the complete `.beton` at `path`, whose tables are validated first.
    crc32: uint32 (N,).

    Raises:
        ValueError, DamagedData: class names that are not unique or fewer than the labels, or more
        than fits.
    """
    store = BetonStore(path, use_sidecar=False)
    store.close()
    assert len(crc32) == len(store)
    checked_names(classes)
    encoded = base64.b64encode(np.asarray(crc32, "<u4").tobytes()).decode()
    content: dict[str, Any] = {
        "version": SIDECAR_VERSION,
        "count": len(crc32),
        "classes": classes,
        "encoding": encoding,
    }
    content |= {"crc32": encoded, "tables_crc32": store.tables_crc32}
    content["checksum"] = _content_checksum(content)
    # As it will be read: what would be refused then is refused now.
    text = json.dumps(content)
    if len(text) > SIDECAR_BYTES:
        raise ValueError(
            f"{readable(sidecar_path(path))}: {len(text):,} bytes, and at most {SIDECAR_BYTES:,}"
            " are read again"
        )
    store._use(_parse_sidecar(json.loads(text)))
    side = sidecar_path(path)
    side.unlink(missing_ok=True)
    with open(side, "x") as f:  # never through a link that lies there
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


ROW = np.dtype([COLUMNS[IMAGE_FIELD], COLUMNS[INT_FIELD]], align=True)

PAGE = 8 << 20  # FFCV's default


class Sample(NamedTuple):
    data: bytes
    mode: int  # JPG or RAW
    height: int
    width: int
    verbatim: bool = False


class BetonWriter:
    """Writes `DST.part` in a `with` block; `commit` makes it DST. Leaving without it removes the
    partial file.
    """

    def __init__(self, dst: str | Path, capacity: int) -> None:
        self.dst, self.part = Path(dst), Path(f"{dst}.part")
        self._renaming = False
        self._refuse_existing()
        self._file = self._open_part()
        try:
            self._refuse_existing()  # what another conversion has finished since
            self._file.truncate(0)
            self.count, self._page = 0, PAGE
            self._rows, self._alloc = np.zeros(capacity, ROW), np.zeros(capacity, ALLOCATION)
            self._crc32 = np.zeros(capacity, np.uint32)
            tables = HEADER.itemsize + 2 * FIELD.itemsize + self._rows.nbytes
            self._file.seek(-(-tables // PAGE) * PAGE)
        except BaseException:
            self._remove()
            raise

    def _refuse_existing(self) -> None:
        for path in (self.dst, sidecar_path(self.dst)):
            if os.path.lexists(path):
                raise ValueError(
                    f"{readable(path)} exists and is not overwritten; remove it or choose another"
                    " name"
                )

    def _open_part(self) -> IO[bytes]:
        """`DST.part`, locked: new, or left by a conversion that was killed; never one that another
        is writing.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW  # never through a link that lies there
        try:
            descriptor = os.open(self.part, flags | os.O_CREAT | os.O_EXCL, 0o666)
            new = True
        except FileExistsError:
            if not stat.S_ISREG(os.lstat(self.part).st_mode):
                raise ValueError(
                    f"{readable(self.part)}: exists and is not a file; choose another name"
                ) from None
            descriptor = os.open(self.part, flags)
            new = False
        file = open(descriptor, "r+b", 1 << 20)  # noqa: SIM115
        try:
            self._claim(file, new)
        except BaseException:
            file.close()
            raise
        return file

    def _claim(self, file: IO[bytes], new: bool) -> None:
        """ValueError if the open `DST.part` is another conversion's, or may be."""
        part = readable(self.part)
        try:
            locked = lock(file)  # gone with its process, even a killed one
        except BlockingIOError:
            raise ValueError(f"{part}: another conversion is writing it") from None
        if locked:
            # Its writer may have finished, and renamed or removed it, before the lock was ours.
            if not (
                os.path.lexists(self.part)
                and os.path.samestat(os.fstat(file.fileno()), os.lstat(self.part))
            ):
                raise ValueError(f"{part}: another conversion was writing it")
        elif new:
            print(
                f"warning: {part}: no locks on this file system; leave the file alone while it is"
                " written",
                file=sys.stderr,
            )
        else:
            unknown = "no locks on this file system say whether another conversion is writing it"
            raise ValueError(f"{part}: exists, and {unknown}: if none is, remove it")

    def add(self, sample: Sample, label: int) -> None:
        at, size = self._file.tell(), len(sample.data)
        # samples placed for smaller pages straddle none of the larger ones
        self._page = max(self._page, 1 << (size - 1).bit_length())
        if size > (room := -at % self._page):
            at = self._file.seek(at + room)
        self._rows[self.count] = ((sample.mode, sample.width, sample.height, at), label)
        self._alloc[self.count] = (self.count, at, size)
        self._crc32[self.count] = zlib.crc32(sample.data)
        self._file.write(sample.data)
        self.count += 1

    def commit(self, classes: Sequence[str] | None, encoding: dict[str, Any]) -> None:
        """Write tables and sidecar, sync, rename. `classes` is None where the labels have no names."""
        n, end = self.count, self._file.tell()
        self._file.write(self._alloc[:n].tobytes())
        fields = np.zeros(2, FIELD)
        fields["type_id"] = IMAGE_FIELD, INT_FIELD
        fields["name"][:, :5] = np.frombuffer(b"imagelabel", "u1").reshape(2, 5)
        header = np.array((2, 2, self._page, n, end), HEADER)
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes() + self._rows[:n].tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        write_sidecar(
            self.part,
            classes=None if classes is None else tuple(classes),
            encoding=encoding,
            crc32=self._crc32[:n],
        )
        self._renaming = True
        os.replace(sidecar_path(self.part), sidecar_path(self.dst))
        os.replace(self.part, self.dst)
        try:
            sync_folder(self.dst.parent)
        except OSError as error:
            error.filename = os.fspath(self.dst)  # it is there, but a power cut may undo that
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if (
            isinstance(error, OSError) and error.filename is None
        ):  # such as a full disk: say which file
            error.filename = os.fspath(self.part)
        self._remove()

    def _remove(self) -> None:
        for path in (self.part, sidecar_path(self.part)):
            path.unlink(missing_ok=True)
        if self._renaming and not os.path.lexists(self.dst):  # stopped between the two
            sidecar_path(self.dst).unlink(missing_ok=True)
        with suppress(OSError):  # a full disk fails again when the buffer is flushed
            self._file.close()
