"""Image folder or CIFAR-10 -> `.beton`, FFCV's format, version 2 (store.py has the layout), with a checksum sidecar.

JPEG files are stored byte for byte. What not every decoder would show as an upright RGB image (a PNG named .JPEG,
grey, CMYK, turned by Exif) is re-encoded once: images.py says how, and an image folder shows the same pixels. Every
JPEG is decoded once; libjpeg-turbo's warnings count as damage. That decoding is at 1/8 size: all entropy-coded data
are read, which is where damage can be noticed, and the pixels nobody looks at are not computed (a test compares its
verdicts with full-size ones).
"""

import os
import stat
import sys
import zlib
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Self

import numpy as np
from tqdm import tqdm

from . import cifar10, store
from .files import lock, read_regular, readable, sync_folder
from .folder import in_order, list_images
from .images import QUALITY, as_jpeg, check_jpeg, decode, plain_jpeg, reason, turbojpeg
from .machine import usable_cores
from .store import JPG, MAX_SIDE, RAW, DamagedData, check_class_names, sidecar_path

ROW = np.dtype([store.COLUMNS[store.IMAGE_FIELD], store.COLUMNS[store.INT_FIELD]], align=True)
PAGE = 8 << 20  # FFCV's default
CHUNK = 8  # images of one task
MOST_TOLD = 20  # damaged images that a message lists


@dataclass(frozen=True)
class Encoding:
    """What to store. The default keeps JPEG files as they are."""

    max_side: int | None = None  # pixels; larger images are shrunk (area average) and re-encoded
    quality: int | None = None  # 1-100: re-encode every image; None: 95 for those that need it
    raw: bool = False  # RGB pixels instead of JPEG

    def __post_init__(self) -> None:
        for name, value, most in (("max_side", self.max_side, MAX_SIDE), ("quality", self.quality, 100)):
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} = {value}: must be 1 to {most}")
        if self.raw and self.quality is not None:
            raise ValueError(f"quality = {self.quality}: raw samples have none; leave out raw or quality")


class Sample(NamedTuple):
    data: bytes
    mode: int  # JPG or RAW
    height: int
    width: int
    verbatim: bool = False


class BadImages(ValueError):  # noqa: N818
    """Some images of the source are damaged or refused; `bad` lists (path, reason)."""

    def __init__(self, bad: list[tuple[str, str]]) -> None:
        lines = [f"{len(bad):,} image(s) cannot be used: mend or remove them, or use --skip-bad", *told(bad)]
        super().__init__("\n  ".join(lines))
        self.bad = bad


def told(bad: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each of the first damaged images, and how many there are beyond."""
    lines = [f"{readable(path)}: {why}" for path, why in bad[:MOST_TOLD]]
    if len(bad) > MOST_TOLD:
        lines.append(f"and {len(bad) - MOST_TOLD:,} more")
    return lines


def encode(data: bytes, encoding: Encoding) -> Sample:
    """The sample to store for one image file's bytes. Raises any exception for a damaged image."""
    limit = encoding.max_side or MAX_SIDE
    if data[:2] == b"\xff\xd8":
        decoded = check_jpeg(data)
        sides = plain_jpeg(data)
        if sides is not None and sides != decoded:
            raise ValueError(f"its header says {sides} pixels, the decoder {decoded}")
        if sides is not None and encoding.quality is None and not encoding.raw and max(sides) <= limit:
            return Sample(data, JPG, *sides, verbatim=True)
    picture = decode(data, encoding.max_side)
    if encoding.raw:
        return Sample(picture.tobytes(), RAW, picture.height, picture.width)
    return Sample(as_jpeg(picture, encoding.quality or QUALITY), JPG, picture.height, picture.width)


class BetonWriter:
    """Writes `DST.part` in a `with` block; `commit` makes it DST. Leaving without it removes the partial file."""

    def __init__(self, dst: str | Path, capacity: int) -> None:
        self.dst, self.part = Path(dst), Path(f"{dst}.part")
        self._renaming = False
        self._refuse_existing()
        self._file = self._open_part()
        try:
            self._refuse_existing()  # what another conversion has finished since
            self._file.truncate(0)
            self.count, self._page = 0, PAGE
            self._rows, self._alloc = np.zeros(capacity, ROW), np.zeros(capacity, store.ALLOCATION)
            self._crc32 = np.zeros(capacity, np.uint32)
            tables = store.HEADER.itemsize + 2 * store.FIELD.itemsize + self._rows.nbytes
            self._file.seek(-(-tables // PAGE) * PAGE)
        except BaseException:
            self._remove()
            raise

    def _refuse_existing(self) -> None:
        for path in (self.dst, sidecar_path(self.dst)):
            if os.path.lexists(path):
                raise ValueError(f"{readable(path)} exists and is not overwritten; remove it or choose another name")

    def _open_part(self) -> IO[bytes]:
        """`DST.part`, locked: new, or left by a conversion that was killed; never one that another is writing."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW  # never through a link that lies there
        try:
            descriptor = os.open(self.part, flags | os.O_CREAT | os.O_EXCL, 0o666)
            new = True
        except FileExistsError:
            if not stat.S_ISREG(os.lstat(self.part).st_mode):
                raise ValueError(f"{readable(self.part)}: exists and is not a file; choose another name") from None
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
            if not (os.path.lexists(self.part) and os.path.samestat(os.fstat(file.fileno()), os.lstat(self.part))):
                raise ValueError(f"{part}: another conversion was writing it")
        elif new:
            print(f"warning: {part}: no locks on this file system; leave the file alone while it is written", file=sys.stderr)
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
        fields = np.zeros(2, store.FIELD)
        fields["type_id"] = store.IMAGE_FIELD, store.INT_FIELD
        fields["name"][:, :5] = np.frombuffer(b"imagelabel", "u1").reshape(2, 5)
        header = np.array((2, 2, self._page, n, end), store.HEADER)
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes() + self._rows[:n].tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        store.write_sidecar(
            self.part, classes=None if classes is None else tuple(classes), encoding=encoding, crc32=self._crc32[:n]
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
        if isinstance(error, OSError) and error.filename is None:  # such as a full disk: say which file
            error.filename = os.fspath(self.part)
        self._remove()

    def _remove(self) -> None:
        for path in (self.part, sidecar_path(self.part)):
            path.unlink(missing_ok=True)
        if self._renaming and not os.path.lexists(self.dst):  # stopped between the two
            sidecar_path(self.dst).unlink(missing_ok=True)
        with suppress(OSError):  # a full disk fails again when the buffer is flushed
            self._file.close()


def _cores(threads: int | None) -> int:
    return threads or usable_cores()


def convert_folder(
    src: str | Path,
    dst: str | Path,
    encoding: Encoding = Encoding(),
    *,
    skip_bad: bool = False,
    allow_odd_classes: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """An image folder in ImageNet's layout. Returns the sidecar's `encoding` entry.

    Its `skipped` holds the files left out, `ignored` what was passed over (see `Listing`). A class that loses all its
    images keeps its name and its place.

    Raises:
        BadImages: damaged images, unless `skip_bad`.
        ValueError, OSError: wrong arguments, odd class names (unless allowed), no images, nothing can be written.
    """
    turbojpeg()
    classes, files, ignored = list_images(Path(src))
    if not allow_odd_classes:
        check_class_names(Path(src), classes)

    def one(item: tuple[str, int]) -> Sample | str:
        try:
            return encode(read_regular(item[0]), encoding)
        except MemoryError:
            raise MemoryError(f"{readable(item[0])}: not enough memory; fewer --threads need less") from None
        except Exception as error:  # Pillow's decoders raise many types
            return reason(error, item[0])

    bad: list[tuple[str, str]] = []
    verbatim = 0
    with BetonWriter(dst, len(files)) as writer, closing(in_order(one, files, _cores(threads), CHUNK, "convert")) as results:
        for (path, label), result in zip(files, results, strict=True):
            if isinstance(result, str):
                bad.append((path, result))
            elif not bad or skip_bad:
                writer.add(result, label)
                verbatim += result.verbatim
        if bad and not (skip_bad and writer.count):
            raise BadImages(bad)
        skipped = [os.path.relpath(path, src) for path, _ in bad]
        done = asdict(encoding) | {"count": writer.count, "verbatim": verbatim, "skipped": skipped}
        done |= {"ignored": ignored, "allow_odd_classes": allow_odd_classes}
        writer.commit(classes, done)
    return done


def convert_cifar10(dst: str | Path, split: Literal["train", "test"] = "train", limit: int | None = None) -> dict[str, Any]:
    """CIFAR-10 as raw samples in published order; `limit`: only the first ones."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: must be at least 1")
    images, labels = (array[:limit] for array in cifar10.load(split))
    return convert_arrays(dst, images, labels, cifar10.CLASSES, f"cifar10 {split}")


def convert_arrays(
    dst: str | Path,
    images: np.ndarray,  # uint8 (N, H, W, 3)
    labels: np.ndarray,  # integers (N,), places in `classes`
    classes: Sequence[str],
    source: str,  # where the images are from, for the sidecar
) -> dict[str, Any]:
    """Images in memory as raw samples, in their order. Returns the sidecar's `encoding` entry."""
    done = {"source": source, "raw": True, "count": len(images), "skipped": []}
    with BetonWriter(dst, len(images)) as writer:
        for image, label in zip(tqdm(images, "convert", delay=1, disable=None), labels, strict=True):
            height, width, _ = image.shape
            writer.add(Sample(image.tobytes(), RAW, height, width), label)
        writer.commit(classes, done)
    return done


def check(path: str | Path, threads: int | None = None) -> list[str]:
    """The faults of a `.beton`: structure and every CRC; where there is no sidecar every JPEG is decoded instead."""
    try:
        beton = store.BetonStore(path)
    except DamagedData as error:
        return [str(error)]

    def one(index: int) -> str | None:
        try:
            data = beton.read(index)
            if beton.crc32 is None and beton.modes[index] == JPG:
                check_jpeg(data.tobytes())
        except (DamagedData, ValueError) as error:
            return f"sample {index}: {error}"
        return None

    with closing(beton):
        return [fault for fault in in_order(one, range(len(beton)), _cores(threads), CHUNK, "check") if fault]
