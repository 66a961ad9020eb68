"""`.beton`, FFCV's format, version 2: its layout, and a reader that trusts nothing in the file.

A file is a header, two field descriptors, one row of metadata per sample, the samples' bytes, and
an allocation table. A sample's bytes lie within one page of the file, as FFCV's loader needs it.
Beside the file stands a sidecar with class names, checksums and boxes, if `fap-convert` made it.
"""

import os
import zlib
from pathlib import Path

import numpy as np

from pipelines.files import open_regular, readable
from pipelines.jpeg import PIXELS_PER_BYTE, jpeg_sides
from pipelines.sources.sidecar import Sidecar, read_sidecar, sidecar_path
from pipelines.store import JPG, MAX_SIDE, RAW, DamagedData, Store

# ------------------------------------------------------------------ the layout

VERSION = 2  # of FFCV's format
N_FIELDS = 2  # of a sample: one image, one label

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("fields", "<u2"),
        ("page_size", "<u4"),  # bytes, a power of two
        ("num_samples", "<u8"),
        ("alloc_ptr", "<u8"),  # where the allocation table begins
    ]
)

FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])

# FFCV's type ids.
INT_FIELD = 1
IMAGE_FIELD = 2

IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
COLUMNS = {INT_FIELD: ("label", "<i8"), IMAGE_FIELD: ("image", IMAGE)}  # of the metadata

ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

# A file begins with them.
VERSION_AND_FIELDS = np.array([VERSION, N_FIELDS], "<u2").tobytes()


def metadata_row(type_ids: list[int]) -> np.dtype:
    """A row of the metadata, for fields in this order."""
    return np.dtype([COLUMNS[type_id] for type_id in type_ids], align=True)


# ------------------------------------------------------------------ the reader


class BetonStore(Store):
    """A `.beton` of one RGB image and one integer label per sample.

    Raises:
        DamagedData: other fields, or header or tables contradict each other, the file's size or the
            sidecar.
    """

    described_as = "a .beton file"

    crc32: np.ndarray | None  # uint32 (N,), of the samples' bytes; None without a sidecar
    tables_crc32: int  # see `Sidecar`

    def __init__(self, path: str | Path, *, use_sidecar: bool = True) -> None:
        super().__init__(path)
        self.classes = None
        self.crc32 = None
        self._file = open_regular(self.path)
        try:
            self._load_tables(os.fstat(self._file.fileno()).st_size)
            sidecar = read_sidecar(self.path) if use_sidecar else None
            if sidecar is not None:
                self.use(sidecar)
        except BaseException:
            self._file.close()
            raise

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """A file of that name, or one that begins as FFCV's files do, whatever its name."""
        if path.is_dir():
            return False
        return path.suffix == ".beton" or _begins_as_ffcv_files_do(path)

    def use(self, sidecar: Sidecar) -> None:
        """Take class names, checksums and annotations.

        Raises:
            DamagedData: they do not fit this file.
        """
        side = readable(sidecar_path(self.path))
        same_tables = sidecar.tables_crc32 == self.tables_crc32
        same_count = len(sidecar.crc32) == len(self)
        self._require(
            same_tables and same_count, f"header or tables are not those that {side} describes"
        )
        if sidecar.annotations is not None:
            self._check_annotations(sidecar, side)
        elif sidecar.classes is not None:
            least = int(self.labels.min())
            most = int(self.labels.max())
            self._require(
                least >= 0 and most < len(sidecar.classes),
                f"labels {least} to {most}, but {side} names {len(sidecar.classes)} classes",
            )
        self.classes = sidecar.classes
        self.annotations = sidecar.annotations
        self.crc32 = sidecar.crc32
        self.odd_classes_are_meant = sidecar.encoding.get("allow_odd_classes") is True
        skipped = sidecar.encoding.get("skipped")
        if isinstance(skipped, list) and skipped:
            n = len(skipped)
            path = readable(self.path)
            self.notes = (f"{n:,} damaged images were left out when {path} was made",)

    def _check_annotations(self, sidecar: Sidecar, side: str) -> None:
        """The annotations of a sidecar are of these images. `side`: its path, for messages."""
        assert sidecar.annotations is not None
        self._require(sidecar.classes is not None, f"{side} has annotations, but names no classes")
        self._check(
            self.labels == np.arange(len(self)),
            f"{side} has annotations, but the label is not the sample's number",
        )
        try:
            sidecar.annotations.check(self.heights, self.widths, len(sidecar.classes or ()))
        except ValueError as error:
            raise DamagedData(f"{readable(self.path)}: annotations in {side}: {error}") from None

    def read(self, index: int) -> np.ndarray:
        """See `Store.read`."""
        raw = self._pread(int(self.sizes[index]), int(self._ptrs[index]), f"sample {index}")
        if self.crc32 is not None:
            self._require(zlib.crc32(raw) == self.crc32[index], f"sample {index}: wrong checksum")
        if self.modes[index] == JPG:
            found = jpeg_sides(raw)
            expected = (int(self.heights[index]), int(self.widths[index]))
            self._require(
                found == expected,
                f"sample {index}: JPEG of {found} pixels, the table says {expected}",
            )
        return np.frombuffer(raw, np.uint8)

    def close(self) -> None:
        self._file.close()

    def _content_crc32(self) -> int:
        if self.crc32 is not None:
            return zlib.crc32(self.crc32.tobytes(), self.tables_crc32)
        return self._crc32_of_some_samples(self.tables_crc32)

    # ------------------------------------------------------------------ header and tables

    def _load_tables(self, file_bytes: int) -> None:
        """Read the header and both tables, and check them against each other."""
        head, n, alloc_ptr, row = self._read_head(file_bytes)
        data_start = len(head) + n * row.itemsize
        self._require(data_start <= alloc_ptr, f"{n} metadata rows overlap the allocation table")
        metadata = self._pread(n * row.itemsize, len(head), "metadata")
        allocations = self._pread(n * ALLOCATION.itemsize, alloc_ptr, "allocation table")
        self.tables_crc32 = zlib.crc32(head + metadata + allocations)

        # The allocation table has the samples in the order in which FFCV's workers wrote them.
        table = np.frombuffer(metadata, row)
        alloc = np.frombuffer(allocations, ALLOCATION)
        alloc = alloc[np.argsort(alloc["sample"])]
        self._require(
            np.array_equal(alloc["sample"], np.arange(n)), "allocation table: not every sample once"
        )
        image = table["image"]
        self.modes = image["mode"].copy()
        self.labels = table["label"].copy()
        self.heights = image["height"].astype(np.int32)
        self.widths = image["width"].astype(np.int32)
        self.sizes = alloc["size"].astype(np.int64)
        self._ptrs = alloc["ptr"].astype(np.int64)
        self._check(alloc["ptr"] == image["data_ptr"], "metadata and allocation table disagree")
        self._check_inside(alloc["ptr"], alloc["size"], data_start, alloc_ptr)
        self._check_images(alloc["size"])
        self._check_apart(alloc["ptr"], alloc["size"])

    def _read_head(self, file_bytes: int) -> tuple[bytes, int, int, np.dtype]:
        """Header and field descriptors; samples, place of the allocation table, metadata row."""
        header = self._pread(HEADER.itemsize, 0, "header")
        version, n_fields, page_bytes, n, alloc_ptr = np.frombuffer(header, HEADER)[0].item()
        self._require(version == VERSION, f"not a version 2 FFCV file (version {version})")
        self._require(page_bytes.bit_count() == 1, f"page size {page_bytes} is no power of two")
        # Exact: no single wrong count or pointer survives.
        self._require(
            n > 0 and alloc_ptr + n * ALLOCATION.itemsize == file_bytes,
            f"{n} samples, allocation table at {alloc_ptr}: not a file of {file_bytes} bytes",
        )
        fields = self._pread(N_FIELDS * FIELD.itemsize, HEADER.itemsize, "field descriptors")
        type_ids = np.frombuffer(fields, FIELD)["type_id"].tolist()
        self._require(
            n_fields == N_FIELDS and sorted(type_ids) == sorted(COLUMNS),
            f"{n_fields} fields, types {type_ids}: need one RGB image and one integer label",
        )
        return header + fields, n, alloc_ptr, metadata_row(type_ids)

    def _check_inside(
        self,
        ptrs: np.ndarray,  # uint64 (N,), as the file has them: of any value
        sizes: np.ndarray,  # uint64 (N,)
        data_start: int,
        data_end: int,
    ) -> None:
        """Every sample lies inside the data."""
        # `ptrs + sizes` could wrap around. `data_end - ptrs` does so only where the pointer is
        # found to be outside anyway.
        starts_inside = (ptrs >= data_start) & (ptrs < data_end)
        ends_inside = (sizes > 0) & (sizes <= data_end - ptrs)
        self._check(starts_inside & ends_inside, "its pointer or size reaches outside the data")

    def _check_images(self, sizes: np.ndarray) -> None:
        """Modes, sides and sizes (uint64) are possible, and fit each other."""
        raw_bytes = 3 * self.heights.astype(np.uint64) * self.widths.astype(np.uint64)
        sides = np.maximum(self.heights, self.widths)
        possible = (self.modes <= RAW) & (raw_bytes > 0) & (sides <= MAX_SIDE)
        self._check(possible, "bad mode or dimensions")
        self._check(
            (self.modes == JPG) | (sizes == raw_bytes), "raw size is not height x width x 3"
        )
        self._check(
            (self.modes == RAW) | (raw_bytes <= 3 * PIXELS_PER_BYTE * sizes),
            "too few bytes for a JPEG of its dimensions",
        )

    def _check_apart(self, ptrs: np.ndarray, sizes: np.ndarray) -> None:
        """No two samples, which lie inside the data, share a byte: each ends before the next."""
        order = np.argsort(ptrs)
        ends = (ptrs + sizes)[order]
        free = np.ones(len(ptrs), bool)
        free[order[1:]] = ends[:-1] <= ptrs[order[1:]]
        self._check(free, "its data overlap another sample's")

    # ------------------------------------------------------------------ bytes and errors

    def _pread(self, size: int, offset: int, what: str) -> bytes:
        """pread, not mmap: a file that shrinks under us is a short count instead of a SIGBUS."""
        raw = b""
        try:
            # Linux reads at most 2 GiB at once.
            while len(raw) < size:
                more = os.pread(self._file.fileno(), size - len(raw), offset + len(raw))
                if not more:
                    break
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
        """`ok`: bool (N,). The message names the first sample that is not."""
        self._require(bool(ok.all()), f"sample {np.argmin(ok)}: {what}")


def _begins_as_ffcv_files_do(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(VERSION_AND_FIELDS)) == VERSION_AND_FIELDS
    except ValueError:  # no regular file
        return False
