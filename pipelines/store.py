"""Encoded images by index. `BetonStore` reads FFCV's format, version 2, and trusts nothing in the file."""

import base64
import json
import os
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .files import open_regular, read_regular, readable, shown
from .names import checked_names

JPG, RAW = 0, 1  # FFCV's mode byte
MAX_SIDE = 32767  # pixels; an epoch plan's windows are int16
IDENTITY_SAMPLES = 256  # samples whose bytes say what data without checksums is
PIXELS_PER_BYTE = 512  # a JPEG's block of 64 takes at least a bit: damaged sides must not ask for gigabytes
HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_ptr", "<u8")])
FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
INT_FIELD, IMAGE_FIELD = 1, 2  # FFCV's type ids
SIDECAR_VERSION = 2
SIDECAR_BYTES = 1 << 28  # at most; 40 million samples' checksums
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG's markers of frame headers
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}  # not names of classes
COLUMNS = {INT_FIELD: ("label", "<i8"), IMAGE_FIELD: ("image", IMAGE)}  # of the metadata table


class DamagedData(RuntimeError):  # noqa: N818
    """A data file is not what it says it is. The message names the file and, if it is one, the sample."""


class Store(ABC):
    """N encoded images with labels; `read` may be called from any thread."""

    path: Path
    classes: tuple[str, ...] | None
    heights: np.ndarray  # int32 (N,), pixels
    widths: np.ndarray  # int32 (N,), pixels
    labels: np.ndarray  # int64 (N,)
    modes: np.ndarray  # uint8 (N,): JPG or RAW
    sizes: np.ndarray  # int64 (N,), encoded bytes
    notes: tuple[str, ...] = ()  # lines to print where the data is opened: what was passed over
    odd_classes_are_meant = False  # see `check_classes`

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Encoded bytes of one sample, uint8 (sizes[index],): a JPEG, or raw RGB in HWC order.

        Raises:
            DamagedData: the bytes cannot be read, or are not those of the tables or of the checksum.
        """

    def file(self, index: int) -> Path:
        """The file that holds sample `index`, for messages."""
        return self.path

    def identity(self) -> dict[str, Any]:
        """What this data is, wherever it lies: `count`, `classes`, and `content`, a checksum of tables and images.

        Without a sidecar, and for a folder, `content` covers the bytes of some images only, spread evenly.
        """
        return {"count": len(self), "classes": self.classes, "content": f"{self._content_crc32():08x}"}

    def describe(self) -> list[str]:
        """Lines that reveal a mistake before a long run: images, classes, the first and last names, images per class.

        `notes` are others.
        """
        if self.classes is None:
            names = f"labels {self.labels.min()} to {self.labels.max()} without class names"
            counts = np.unique(self.labels, return_counts=True)[1]
        else:
            ends = dict.fromkeys(readable(name, 60) for name in (self.classes[0], self.classes[-1]))
            names = f"{len(self.classes):,} class(es) {' to '.join(ends)}"
            counts = np.bincount(self.labels, minlength=len(self.classes))
        each = " to ".join(dict.fromkeys([f"{counts.min():,}", f"{counts.max():,}"]))
        lines = [f"{len(self):,} images, {names}, {each} images per class"]
        empty = [] if self.classes is None else [self.classes[i] for i in np.flatnonzero(counts == 0)]
        if empty:
            few = ", ".join([readable(name, 60) for name in empty[:5]] + ["..."] * (len(empty) > 5))
            lines.append(f"no images of {len(empty):,} class(es): {few}; the labels of the others do not move")
        return lines

    def check_classes(self) -> None:
        """ValueError where the class names say that this is not training data but, say, the folder above it.

        Data converted with `fap-convert --allow-odd-classes` passes.
        """
        if self.classes is not None and not self.odd_classes_are_meant:
            check_class_names(self.path, self.classes)

    @abstractmethod
    def _content_crc32(self) -> int:
        """See `identity`."""

    def _crc32_of_some(self, crc32: int, read: Callable[[int], bytes]) -> int:
        """Continue a checksum with the bytes that `read` gives for IDENTITY_SAMPLES samples."""
        for index in np.linspace(0, len(self) - 1, min(IDENTITY_SAMPLES, len(self)), dtype=int).tolist():
            crc32 = zlib.crc32(read(index), crc32)
        return crc32

    def close(self) -> None:  # noqa: B027
        """Release file handles."""


class BetonStore(Store):
    """A `.beton` of one RGB image and one integer label per sample.

    Raises:
        DamagedData: other fields, or header or tables contradict each other, the file's size or the sidecar.
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
            self._require(named, f"labels {least} to {most}, but {side} names {len(sidecar.classes)} classes")
        self.classes = sidecar.classes
        self.crc32 = sidecar.crc32
        self.odd_classes_are_meant = sidecar.encoding.get("allow_odd_classes") is True
        skipped = sidecar.encoding.get("skipped")
        if isinstance(skipped, list) and skipped:
            self.notes = (f"{len(skipped):,} damaged images were left out when {readable(self.path)} was made",)

    def _load_tables(self, file_size: int) -> None:
        head = self._pread(HEADER.itemsize, 0, "header")
        version, fields, page, n, alloc_ptr = np.frombuffer(head, HEADER)[0].item()
        self._require(version == 2, f"not a version 2 FFCV file (version {version})")
        self._require(page.bit_count() == 1, f"page size {page} is no power of two")
        # exact: no single wrong count or pointer survives
        fits = n > 0 and alloc_ptr + n * ALLOCATION.itemsize == file_size
        self._require(fits, f"{n} samples, allocation table at {alloc_ptr}: not a file of {file_size} bytes")
        head += self._pread(2 * FIELD.itemsize, len(head), "field descriptors")
        types = np.frombuffer(head, FIELD, offset=HEADER.itemsize)["type_id"].tolist()
        known = fields == 2 and sorted(types) == [INT_FIELD, IMAGE_FIELD]
        self._require(known, f"{fields} fields, types {types}: need one RGB image and one integer label")
        row = np.dtype([COLUMNS[t] for t in types], align=True)
        data_start = len(head) + n * row.itemsize
        self._require(data_start <= alloc_ptr, f"{n} metadata rows overlap the allocation table")
        metadata = self._pread(n * row.itemsize, len(head), "metadata")
        allocations = self._pread(n * ALLOCATION.itemsize, alloc_ptr, "allocation table")
        self.tables_crc32 = zlib.crc32(head + metadata + allocations)

        table, alloc = np.frombuffer(metadata, row), np.frombuffer(allocations, ALLOCATION)
        alloc = alloc[np.argsort(alloc["sample"])]
        self._require(np.array_equal(alloc["sample"], np.arange(n)), "allocation table: not every sample once")
        image, sizes, ptrs = table["image"], alloc["size"], alloc["ptr"]
        self.modes, self.labels = image["mode"].copy(), table["label"].copy()
        self.heights, self.widths = image["height"].astype(np.int32), image["width"].astype(np.int32)
        self.sizes, self._ptrs = sizes.astype(np.int64), ptrs.astype(np.int64)
        self._check(ptrs == image["data_ptr"], "metadata and allocation table disagree")
        inside = (ptrs >= data_start) & (ptrs < alloc_ptr) & (sizes > 0) & (sizes <= alloc_ptr - ptrs)
        self._check(inside, "its pointer or size reaches outside the data")
        pixels = 3 * self.heights.astype(np.uint64) * self.widths.astype(np.uint64)
        sides = np.maximum(self.heights, self.widths) <= MAX_SIDE
        self._check((self.modes <= RAW) & (pixels > 0) & sides, "bad mode or dimensions")
        self._check((self.modes == JPG) | (sizes == pixels), "raw size is not height x width x 3")
        self._check((self.modes == RAW) | (pixels <= 3 * PIXELS_PER_BYTE * sizes), "too few bytes for a JPEG of its dimensions")
        order, free = np.argsort(ptrs), np.ones(n, bool)
        free[order[1:]] = (ptrs + sizes)[order[:-1]] <= ptrs[order[1:]]
        self._check(free, "its data overlap another sample's")

    def read(self, index: int) -> np.ndarray:
        raw = self._pread(int(self.sizes[index]), int(self._ptrs[index]), f"sample {index}")
        if self.crc32 is not None:
            self._require(zlib.crc32(raw) == self.crc32[index], f"sample {index}: wrong checksum")
        if self.modes[index] == JPG:
            found, expected = jpeg_sides(raw), (int(self.heights[index]), int(self.widths[index]))
            self._require(found == expected, f"sample {index}: JPEG of {found} pixels, the table says {expected}")
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
            while len(raw) < size and (more := os.pread(self._file.fileno(), size - len(raw), offset + len(raw))):
                raw += more
        except OSError as error:
            raise DamagedData(f"{readable(self.path)}: {what}: {error}") from error
        self._require(len(raw) == size, f"{what}: {size} bytes expected at {offset}, {len(raw)} found")
        return raw

    def _require(self, ok: bool, what: str) -> None:
        if not ok:
            raise DamagedData(f"{readable(self.path)}: {what}")

    def _check(self, ok: np.ndarray, what: str) -> None:
        self._require(bool(ok.all()), f"sample {np.argmin(ok)}: {what}")


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the content of a JPEG's segments, the last being the scan's (0xDA). ITU T.81, table B.1.

    It ends before a marker that does not belong there: a decoder may go on elsewhere than we would.
    """
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            return
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        yield marker, at + 4, end
        if marker == 0xDA:
            return
        at = end


def jpeg_sides(data: bytes) -> tuple[int, int] | None:
    """(height, width) from a JPEG's frame header, as stored; None where there is none."""
    for marker, start, _ in jpeg_segments(data):
        if marker in FRAMES:
            return struct.unpack_from(">HH", data, start + 1) if start + 5 <= len(data) else None
    return None


def check_class_names(path: Path, classes: Sequence[str]) -> None:
    """ValueError for a single class, and for names such as train and val, which are an ImageNet root's folders."""
    splits = [name for name in classes if re.sub("[^a-z]", "", name.lower()) in SPLITS]
    meant = "if they are meant, convert with --allow-odd-classes"
    # Half of them or two, but not one among many: vehicles include a train.
    if splits and (2 * len(splits) >= len(classes) or len(splits) > 1):
        inner = readable(path / splits[0])
        names = shown(", ".join(splits))
        raise ValueError(
            f"{readable(path)}: class folders called {names} look like parts of a data set: give {inner}, or, {meant}"
        )
    if len(classes) == 1:
        only = shown(classes[0])
        raise ValueError(f"{readable(path)}: the only class is {only}: give a folder with one folder per class, or, {meant}")


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
    classes, encoding, tables_crc32 = content["classes"], content["encoding"], content["tables_crc32"]
    if type(content["count"]) is not int or content["count"] != len(crc32):
        raise ValueError("count is not the number of checksums")
    if type(tables_crc32) is not int or type(encoding) is not dict:
        raise ValueError("tables_crc32 must be a number and encoding an object")
    return Sidecar(checked_names(classes), encoding, crc32, tables_crc32)


def write_sidecar(path: str | Path, *, classes: tuple[str, ...] | None, encoding: dict[str, Any], crc32: np.ndarray) -> None:
    """Write the sidecar of the complete `.beton` at `path`, whose tables are validated first. crc32: uint32 (N,).

    Raises:
        ValueError, DamagedData: class names that are not unique or fewer than the labels, or more than fits.
    """
    store = BetonStore(path, use_sidecar=False)
    store.close()
    assert len(crc32) == len(store)
    checked_names(classes)
    encoded = base64.b64encode(np.asarray(crc32, "<u4").tobytes()).decode()
    content: dict[str, Any] = {"version": SIDECAR_VERSION, "count": len(crc32), "classes": classes, "encoding": encoding}
    content |= {"crc32": encoded, "tables_crc32": store.tables_crc32}
    content["checksum"] = _content_checksum(content)
    # As it will be read: what would be refused then is refused now.
    text = json.dumps(content)
    if len(text) > SIDECAR_BYTES:
        raise ValueError(f"{readable(sidecar_path(path))}: {len(text):,} bytes, and at most {SIDECAR_BYTES:,} are read again")
    store._use(_parse_sidecar(json.loads(text)))
    side = sidecar_path(path)
    side.unlink(missing_ok=True)
    with open(side, "x") as f:  # never through a link that lies there
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
