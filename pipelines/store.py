"""Encoded images by index. `BetonStore` reads FFCV's format, version 2, and trusts nothing in the file."""

from __future__ import annotations

import base64
import json
import os
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

JPG, RAW = 0, 1  # FFCV's mode byte
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELD_TYPES = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: IMAGE}
INT_FIELD, IMAGE_FIELD = 1, 2


class DamagedData(RuntimeError):
    """A data file is not what it says it is. The message names the file and, where there is one, the sample index."""


class Store(ABC):
    """N encoded images with labels; `read` may be called from any thread."""

    path: Path
    classes: tuple[str, ...] | None
    heights: np.ndarray  # int32 (N,), pixels
    widths: np.ndarray  # int32 (N,)
    labels: np.ndarray  # int64 (N,)
    modes: np.ndarray  # uint8 (N,): JPG or RAW
    sizes: np.ndarray  # int64 (N,), encoded bytes

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Encoded bytes of one sample, uint8 (sizes[index],): a JPEG, or raw RGB in HWC order.

        Raises:
            DamagedData: the bytes cannot be read, or are not those of the tables or of the checksum.
        """

    @abstractmethod
    def close(self) -> None:
        """Release file handles."""


class BetonStore(Store):
    """A `.beton` of one RGB image and one integer label per sample.

    Raises:
        ValueError: a valid FFCV file with other fields.
        DamagedData: header or tables contradict each other, the file's size or the sidecar.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            tables_crc = self._load_tables(os.fstat(self._fd).st_size)
            self._load_sidecar(tables_crc)
        except BaseException:
            self.close()
            raise

    def _load_tables(self, file_size: int) -> int:
        raw = self._pread(HEADER.itemsize, 0, "header")
        crc = zlib.crc32(raw)
        header = np.frombuffer(raw, HEADER)[0]
        version, fields, page, n, alloc_ptr = (int(header[name]) for name in HEADER.names or ())
        self._require(version == 2 and 0 < fields < 64, f"not a version 2 FFCV file (version {version})")
        self._require(page.bit_count() == 1, f"page size {page} is no power of two")
        # both sides are exact integers, so no single wrong count or pointer survives
        self._require(
            n > 0 and alloc_ptr + n * ALLOCATION.itemsize == file_size,
            f"{n} samples, allocation table at {alloc_ptr}: does not fit a file of {file_size} bytes",
        )
        raw = self._pread(fields * FIELD.itemsize, HEADER.itemsize, "field descriptors")
        crc = zlib.crc32(raw, crc)
        types = np.frombuffer(raw, FIELD)["type_id"].tolist()
        if sorted(types) != [INT_FIELD, IMAGE_FIELD]:
            raise DamagedData(f"{self.path}: field types {types}: need one RGB image and one integer label")
        row = np.dtype([("", FIELD_TYPES[t]) for t in types], align=True)
        start = HEADER.itemsize + fields * FIELD.itemsize
        data_start = start + n * row.itemsize
        self._require(data_start <= alloc_ptr, f"{n} metadata rows overlap the allocation table")
        raw = self._pread(n * row.itemsize, start, "metadata")
        crc = zlib.crc32(raw, crc)
        table = np.frombuffer(raw, row)
        image, label = (table[f"f{types.index(t)}"] for t in (IMAGE_FIELD, INT_FIELD))
        raw = self._pread(n * ALLOCATION.itemsize, alloc_ptr, "allocation table")
        crc = zlib.crc32(raw, crc)
        alloc = np.frombuffer(raw, ALLOCATION)

        self._require(
            bool((np.sort(alloc["sample"]) == np.arange(n)).all()), "allocation table: wrong sample numbers"
        )
        sizes = np.empty(n, np.uint64)
        ptrs = np.empty(n, np.uint64)
        sizes[alloc["sample"]], ptrs[alloc["sample"]] = alloc["size"], alloc["ptr"]
        self.modes = np.ascontiguousarray(image["mode"])
        self.heights, self.widths = image["height"].astype(np.int32), image["width"].astype(np.int32)
        self.labels = label.astype(np.int64)
        pixels = 3 * self.heights.astype(np.uint64) * self.widths.astype(np.uint64)
        self._check(ptrs == image["data_ptr"], "metadata and allocation table disagree")
        # sizes first: ptr + size cannot wrap once both are below the file's size
        self._check(
            (sizes > 0) & (sizes < file_size) & (ptrs >= data_start) & (ptrs < file_size), "bad pointer"
        )
        self._check(ptrs + sizes <= alloc_ptr, "data reach outside the file")
        self._check((self.modes <= RAW) & (pixels > 0), "bad mode or dimensions")
        self._check((self.modes == JPG) | (sizes == pixels), "raw size is not height x width x 3")
        order = np.argsort(ptrs, kind="stable")
        overlap = np.zeros(n, bool)
        overlap[order[1:]] = (ptrs + sizes)[order[:-1]] > ptrs[order[1:]]
        self._check(~overlap, "data overlap another sample's")
        self.sizes, self._ptrs = sizes.astype(np.int64), ptrs.astype(np.int64)
        return crc

    def _load_sidecar(self, tables_crc: int) -> None:
        sidecar = read_sidecar(self.path)
        self.classes, self._crc32 = None, None
        if sidecar is None:
            return
        if sidecar.tables_crc32 != tables_crc or len(sidecar.crc32) != len(self.labels):
            raise DamagedData(
                f"{self.path}: header or tables are not those that {sidecar_path(self.path)} describes"
            )
        self.classes, self._crc32 = sidecar.classes, sidecar.crc32

    def read(self, index: int) -> np.ndarray:
        size = int(self.sizes[index])
        raw = self._pread(size, int(self._ptrs[index]), f"sample {index}")
        if self._crc32 is not None and zlib.crc32(raw) != self._crc32[index]:
            raise DamagedData(f"{self.path}: sample {index}: wrong checksum")
        if self.modes[index] == JPG:
            expected = (int(self.heights[index]), int(self.widths[index]))
            if (found := jpeg_sides(raw)) != expected:
                raise DamagedData(
                    f"{self.path}: sample {index}: JPEG of {found} pixels, the table says {expected}"
                )
        return np.frombuffer(raw, np.uint8)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _pread(self, size: int, offset: int, what: str) -> bytes:
        """pread, not mmap: a file that shrinks under us is a short count instead of a SIGBUS."""
        try:
            raw = os.pread(self._fd, size, offset)
            while 0 < len(raw) < size and (more := os.pread(self._fd, size - len(raw), offset + len(raw))):
                raw += more  # Linux reads at most 2 GiB at once
        except OSError as error:
            raise DamagedData(f"{self.path}: {what}: {error}") from error
        self._require(len(raw) == size, f"{what}: {size} bytes expected at {offset}, {len(raw)} found")
        return raw

    def _require(self, ok: bool, what: str) -> None:
        if not ok:
            raise DamagedData(f"{self.path}: {what}")

    def _check(self, ok: np.ndarray, what: str) -> None:
        if not ok.all():
            raise DamagedData(f"{self.path}: sample {int(np.argmin(ok))}: {what}")


def jpeg_sides(data: bytes) -> tuple[int, int] | None:
    """(height, width) from a JPEG's frame header; None where there is none. Markers: ITU T.81, table B.1."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a length
            at += 2
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


class Sidecar(NamedTuple):
    """What a `.beton` cannot say about itself."""

    classes: tuple[str, ...] | None
    encoding: dict[str, Any]  # how convert made it
    crc32: np.ndarray  # uint32 (N,), one per sample's encoded bytes
    tables_crc32: int  # header, field descriptors, metadata and allocation table, in this order


def sidecar_path(path: str | Path) -> Path:
    """`NAME.beton.json` for `NAME.beton`."""
    return Path(f"{path}.json")


def read_sidecar(path: str | Path) -> Sidecar | None:
    """The sidecar of the `.beton` at `path`, None where there is none."""
    side = sidecar_path(path)
    if not side.exists():
        return None
    try:
        d = json.loads(side.read_bytes())
        crc32 = np.frombuffer(base64.b64decode(d["crc32"], validate=True), "<u4")
        classes = None if d["classes"] is None else tuple(map(str, d["classes"]))
        if d["version"] != 1 or d["count"] != len(crc32):
            raise ValueError("wrong version or count")
        return Sidecar(classes, dict(d["encoding"]), crc32, int(d["tables_crc32"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedData(
            f"{side}: {error!r}: convert again, or delete it to read without checksums"
        ) from error


def write_sidecar(
    path: str | Path,
    *,
    classes: tuple[str, ...] | None,
    encoding: dict[str, Any],
    crc32: np.ndarray,  # uint32 (N,)
) -> None:
    """Write the sidecar of the complete `.beton` at `path`, atomically."""
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(HEADER.itemsize), HEADER)[0]
        fields = np.frombuffer(f.read(int(header["num_fields"]) * FIELD.itemsize), FIELD)["type_id"]
        row = np.dtype([("", FIELD_TYPES[int(t)]) for t in fields], align=True)
        f.seek(0)
        tables = f.read(
            HEADER.itemsize + fields.size * FIELD.itemsize + int(header["num_samples"]) * row.itemsize
        )
        f.seek(int(header["alloc_ptr"]))
        tables_crc32 = zlib.crc32(f.read(), zlib.crc32(tables))
    content = {
        "version": 1,
        "count": len(crc32),
        "classes": classes,
        "encoding": encoding,
        "tables_crc32": tables_crc32,
        "crc32": base64.b64encode(np.asarray(crc32, "<u4").tobytes()).decode(),
    }
    side = sidecar_path(path)
    temporary = side.with_name(side.name + ".tmp")
    with open(temporary, "w") as f:
        json.dump(content, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, side)
