"""Encoded images by index. `BetonStore` reads FFCV's format, version 2, and trusts nothing in the file."""

import base64
import json
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

JPG, RAW = 0, 1  # FFCV's mode byte
MAX_SIDE = 32767  # pixels; an epoch plan's windows are int16
IDENTITY_SAMPLES = 256  # samples whose bytes say what data without checksums is
PIXELS_PER_BYTE = 512  # a JPEG's block of 64 takes at least a bit: damaged sides must not ask for gigabytes
HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_ptr", "<u8")])
FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
INT_FIELD, IMAGE_FIELD = 1, 2  # FFCV's type ids
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
        classes = None if self.classes is None else list(self.classes)
        return {"count": len(self), "classes": classes, "content": f"{self._content_crc32():08x}"}

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
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        self._load_tables(os.fstat(self._file.fileno()).st_size)
        sidecar = read_sidecar(self.path) if use_sidecar else None
        same = sidecar is None or (sidecar.tables_crc32, len(sidecar.crc32)) == (self.tables_crc32, len(self))
        self._require(same, f"header or tables are not those that {sidecar_path(self.path)} describes")
        self.classes = sidecar.classes if sidecar else None
        self.crc32 = sidecar.crc32 if sidecar else None

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
            raise DamagedData(f"{self.path}: {what}: {error}") from error
        self._require(len(raw) == size, f"{what}: {size} bytes expected at {offset}, {len(raw)} found")
        return raw

    def _require(self, ok: bool, what: str) -> None:
        if not ok:
            raise DamagedData(f"{self.path}: {what}")

    def _check(self, ok: np.ndarray, what: str) -> None:
        self._require(bool(ok.all()), f"sample {np.argmin(ok)}: {what}")


def jpeg_sides(data: bytes) -> tuple[int, int] | None:
    """(height, width) from a JPEG's frame header; None where there is none. Markers: ITU T.81, table B.1."""
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length, _, height, width = struct.unpack_from(">BHBHH", data, at + 1)
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker < 0xC0 or 0xD0 <= marker <= 0xD7:  # not before a frame: a decoder may go on elsewhere than we would
            return None
        elif marker > 0xCF or marker in (0xC4, 0xC8, 0xCC):
            at += 2 + length
        else:
            return height, width
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
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"  # not its repr, which may hold the whole file
        raise DamagedData(f"{side}: {why}: convert again, or delete it to read without checksums") from error


def write_sidecar(path: str | Path, *, classes: tuple[str, ...] | None, encoding: dict[str, Any], crc32: np.ndarray) -> None:
    """Write the sidecar of the complete `.beton` at `path`, whose tables are validated first. crc32: uint32 (N,)."""
    store = BetonStore(path, use_sidecar=False)
    store.close()
    assert len(crc32) == len(store)
    encoded = base64.b64encode(np.asarray(crc32, "<u4").tobytes()).decode()
    content = {"version": 1, "count": len(crc32), "classes": classes, "encoding": encoding, "crc32": encoded}
    with open(sidecar_path(path), "w") as f:
        json.dump(content | {"tables_crc32": store.tables_crc32}, f)
        f.flush()
        os.fsync(f.fileno())
