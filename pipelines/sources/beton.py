"""`.beton`, FFCV's format, version 2: a reader that trusts nothing in the file.

A file is a header, field descriptors, one row of metadata per sample, the samples' bytes, and an
allocation table. A sample's bytes lie within one page of the file, as FFCV's loader needs it.
Beside the file stands a sidecar with class names, checksums and boxes, if `fap-convert` made it.
"""

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.files import first_bytes, listed, readable
from pipelines.jpeg import PIXELS_PER_BYTE, jpeg_sides
from pipelines.sources.beton_layout import (
    ALLOCATING,
    ALLOCATION,
    FIELD,
    HEADER,
    MOST_TOLD,
    VERSION,
    Chosen,
    Field,
    choose,
    metadata_row,
    parse_fields,
    pointers_of,
)
from pipelines.sources.handles import Handle, OpenFiles
from pipelines.sources.sidecar import Sidecar, read_sidecar, sidecar_path
from pipelines.store import JPG, MAX_SIDE, PLANES, RAW, DamagedData, Store, planes_bytes

LEAST_FIELDS = 2  # an image and a label


class BetonStore(Store):
    """A `.beton` of one RGB image, or the planes of one, and one integer label per sample.

    It may have other fields: `beton_layout.choose` says which are read.

    Raises:
        DamagedData: neither image nor label, or header or tables contradict each other, the file's
            size or the sidecar.
    """

    described_as = "a .beton file"

    fields: list[Field]  # of a sample, in the file's order
    crc32: np.ndarray | None  # uint32 (N,), of the samples' bytes; None without a sidecar
    tables_crc32: int  # see `Sidecar`

    def __init__(
        self,
        path: str | Path,
        *,
        use_sidecar: bool = True,
        among: OpenFiles | None = None,  # None: the file stays open
    ) -> None:
        super().__init__(path)
        self.classes = None
        self.crc32 = None
        self._file = Handle(self.path, among)
        try:
            self._load_tables(self._file.size)
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
            self.notes += (f"{n:,} damaged images were left out when {path} was made",)

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

    def is_proven(self, index: int) -> bool:
        """Conversion checks every image, and its sidecar has the checksums."""
        return self.crc32 is not None

    def files(self) -> list[Path]:
        """See `Store.files`."""
        side = sidecar_path(self.path)
        return [self.path, side] if side.exists() else [self.path]

    def close(self) -> None:
        self._file.close()

    def _content_crc32(self) -> int:
        if self.crc32 is not None:
            return zlib.crc32(self.crc32.tobytes(), self.tables_crc32)
        return self._crc32_of_some_samples(self.tables_crc32)

    # ------------------------------------------------------------------ header and tables

    def _load_tables(self, file_bytes: int) -> None:
        """Read the header and both tables, and check them against each other."""
        head = self._read_head(file_bytes)
        n, row = head.n_samples, metadata_row(self.fields)
        data_start = len(head.raw) + n * row.itemsize
        self._require(data_start <= head.alloc_ptr, f"{n} metadata rows overlap the allocations")

        # One table after the other, since both are as large as all that is kept of them.
        metadata = self._pread(n * row.itemsize, len(head.raw), "metadata")
        crc32 = zlib.crc32(metadata, zlib.crc32(head.raw))
        told = self._take_metadata(np.frombuffer(metadata, row), head.chosen)
        del metadata

        alloc_bytes = n * self._n_allocations * ALLOCATION.itemsize
        allocations = self._pread(alloc_bytes, head.alloc_ptr, "allocation table")
        self.tables_crc32 = zlib.crc32(allocations, crc32)
        alloc = self._by_sample(np.frombuffer(allocations, ALLOCATION), n)
        del allocations
        sizes = self._sizes_of(alloc, told)
        self._check_inside(alloc["ptr"], alloc["size"], data_start, head.alloc_ptr)
        self._check_images(sizes)
        if told.others:
            self._check_apart(alloc["ptr"].ravel(), alloc["size"].ravel())
        else:
            self._check_apart(told.ptrs, sizes)
        # All of them are numbers of bytes in the file by now.
        self._ptrs = told.ptrs.view(np.int64)
        self.sizes = sizes.view(np.int64)

    def _read_head(self, file_bytes: int) -> "_Head":
        """Header and field descriptors; sets `fields`, and the note on those that are skipped."""
        header = self._pread(HEADER.itemsize, 0, "header")
        version, n_fields, page_bytes, n, alloc_ptr = np.frombuffer(header, HEADER)[0].item()
        self._require(version == VERSION, f"not a version 2 FFCV file (version {version})")
        self._require(page_bytes.bit_count() == 1, f"page size {page_bytes} is no power of two")
        self._require(
            n_fields >= LEAST_FIELDS, f"{n_fields} fields: need one RGB image and one integer label"
        )
        descriptors = self._pread(n_fields * FIELD.itemsize, HEADER.itemsize, "field descriptors")
        try:
            self.fields = parse_fields(descriptors)
            chosen = choose(self.fields)
        except ValueError as error:
            raise DamagedData(f"{readable(self.path)}: {error}") from None
        self._n_allocations = sum(field.type_id in ALLOCATING for field in self.fields)
        # Exact: no single wrong count or pointer survives.
        self._require(
            n > 0 and alloc_ptr + n * self._n_allocations * ALLOCATION.itemsize == file_bytes,
            f"{n} samples, allocation table at {alloc_ptr}: not a file of {file_bytes} bytes",
        )
        skipped = [str(field) for i, field in enumerate(self.fields) if i not in chosen]
        if skipped:
            path = readable(self.path)
            names = listed(skipped, MOST_TOLD)
            self.notes += (f"{len(skipped)} field(s) of {path} are not read: {names}",)
        return _Head(header + descriptors, n, alloc_ptr, chosen)

    def _take_metadata(self, table: np.ndarray, chosen: Chosen) -> "_Told":
        """Set modes, sides and labels."""
        pixels = table[str(chosen.pixels)]
        sizes = None
        if chosen.planes:
            self.modes = np.full(len(table), PLANES, np.uint8)
            heights = table[str(chosen.height)]
            widths = table[str(chosen.width)]
            sizes = pixels["size"].copy()
        else:
            self.modes = pixels["mode"].copy()
            self._check(self.modes <= RAW, "bad mode")
            heights = pixels["height"]
            widths = pixels["width"]
        for sides in (heights, widths):
            self._check((sides > 0) & (sides <= MAX_SIDE), "bad dimensions")
        self.heights = heights.astype(np.int32)
        self.widths = widths.astype(np.int32)
        self.labels = table[str(chosen.label)].copy()
        ptrs = pointers_of(self.fields, table, chosen.pixels).copy()
        others = []
        for i, field in enumerate(self.fields):
            if field.type_id in ALLOCATING and i != chosen.pixels:
                others.append(pointers_of(self.fields, table, i).copy())
        return _Told(ptrs, others, sizes)

    def _by_sample(self, alloc: np.ndarray, n: int) -> np.ndarray:
        """The allocation table as (N, allocations of a sample), in the order of the samples.

        The file has it in the order in which FFCV's workers wrote the samples.
        """
        samples = alloc["sample"]
        if (samples[1:] < samples[:-1]).any():
            alloc = alloc[np.argsort(samples, kind="stable")]
        alloc = alloc.reshape(n, self._n_allocations)
        self._require(
            bool((alloc["sample"] == np.arange(n, dtype=np.uint64)[:, None]).all()),
            "allocation table: not every sample once",
        )
        return alloc

    def _sizes_of(
        self,
        alloc: np.ndarray,  # ALLOCATION (N, allocations of a sample)
        told: "_Told",
    ) -> np.ndarray:
        """The bytes of every sample's pixels, uint64 (N,), as the allocation table has them."""
        if not told.others:
            agree = alloc["ptr"][:, 0] == told.ptrs
            sizes = alloc["size"][:, 0].copy()
        else:
            # Of each sample, the same pointers in any order.
            pointers = np.stack([told.ptrs, *told.others], 1)
            agree = np.sort(alloc["ptr"], 1) == np.sort(pointers, 1)
            # Nothing at all may lie where the pixels begin too, such as an empty text.
            ours = alloc["ptr"] == told.ptrs[:, None]
            sizes = np.where(ours, alloc["size"], 0).max(1)
        if told.sizes is not None:
            agree = agree & (told.sizes == sizes).reshape(len(sizes), -1)
        self._check(agree, "metadata and allocation table disagree")
        return sizes

    def _check_inside(
        self,
        ptrs: np.ndarray,  # uint64 (N, allocations of a sample), as the file has them: of any value
        sizes: np.ndarray,  # uint64, the same shape
        data_start: int,
        data_end: int,
    ) -> None:
        """Everything that a sample allocates lies inside the data."""
        # `ptrs + sizes` could wrap around. `data_end - ptrs` does so only where the pointer is
        # found to be outside anyway.
        starts_inside = (ptrs >= data_start) & (ptrs <= data_end)
        ends_inside = sizes <= data_end - ptrs
        self._check(starts_inside & ends_inside, "its pointer or size reaches outside the data")

    def _check_images(self, sizes: np.ndarray) -> None:
        """Sizes (uint64) fit modes and sides, and are no zeros."""
        if self.modes[0] == PLANES:  # then all are planes
            planes = planes_bytes(self.heights, self.widths)
            self._check(sizes == planes, "size is not that of its planes")
            return
        raw_bytes = 3 * self.heights.astype(np.uint64) * self.widths.astype(np.uint64)
        self._check(
            (self.modes != RAW) | (sizes == raw_bytes), "raw size is not height x width x 3"
        )
        self._check(
            (self.modes != JPG) | (raw_bytes <= 3 * PIXELS_PER_BYTE * sizes),
            "too few bytes for a JPEG of its dimensions",
        )

    def _check_apart(self, ptrs: np.ndarray, sizes: np.ndarray) -> None:
        """No two of the allocations, which lie inside the data, share a byte.

        Each ends before the next begins. Both are uint64, in the order of the samples.
        """
        if (ptrs[:-1] + sizes[:-1] <= ptrs[1:]).all():  # as fap-convert writes them
            return
        order = np.flatnonzero(sizes)  # an empty one shares none, wherever it points
        order = order[np.argsort(ptrs[order], kind="stable")]
        ends = (ptrs + sizes)[order]
        free = np.ones(len(ptrs), bool)
        free[order[1:]] = ends[:-1] <= ptrs[order[1:]]
        self._check(free.reshape(len(self.labels), -1), "its data overlap another sample's")

    # ------------------------------------------------------------------ bytes and errors

    def _pread(self, size: int, offset: int, what: str) -> bytes:
        try:
            raw = self._file.read(size, offset)
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
        """`ok`: bool (N,) or (N, k). The message names the first sample that is not."""
        if not ok.all():
            sample = np.argmin(ok) // (ok.size // len(ok))
            raise DamagedData(f"{readable(self.path)}: sample {sample}: {what}")


class _Head(NamedTuple):
    """What stands before the metadata."""

    raw: bytes  # header and field descriptors
    n_samples: int
    alloc_ptr: int  # where the allocation table begins
    chosen: Chosen


class _Told(NamedTuple):
    """What the metadata say of the allocations."""

    ptrs: np.ndarray  # uint64 (N,): of the pixels
    others: list[np.ndarray]  # uint64 (N,) each: of the fields that are skipped
    sizes: np.ndarray | None  # uint64 (N,): of the pixels, where the metadata tell them


def _begins_as_ffcv_files_do(path: Path) -> bool:
    try:
        start = first_bytes(path, HEADER.itemsize)
    except ValueError:  # no regular file
        return False
    if len(start) < HEADER.itemsize:
        return False
    version, n_fields, page_bytes, _, _ = np.frombuffer(start, HEADER)[0].item()
    # Few fields: what begins by chance with version 2 has not these bytes too.
    return version == VERSION and LEAST_FIELDS <= n_fields < 256 and page_bytes.bit_count() == 1
