"""Image folder or CIFAR-10 -> `.beton`, FFCV's format, version 2 (store.py has the layout), with a checksum sidecar.

JPEG files are stored byte for byte. What FFCV's decoder would not show as an upright RGB image (a PNG named .JPEG,
grey, CMYK, EXIF-rotated) is re-encoded once: RGB, quality 95, 4:2:0. Every JPEG is decoded once; libjpeg-turbo's
warnings count as damage. That decoding is at 1/8 size: all entropy-coded data are read, which is where damage can
be noticed, and the pixels nobody looks at are not computed (a test compares its verdicts with full-size ones).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from . import cifar10, store
from .batch import run_ahead
from .folder import list_images
from .machine import usable_cores
from .store import JPG, MAX_SIDE, RAW, DamagedData, sidecar_path

ROW = np.dtype([store.COLUMNS[store.IMAGE_FIELD], store.COLUMNS[store.INT_FIELD]], align=True)
PAGE = 8 << 20  # FFCV's default
CHUNK = 8  # images of one task


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
    """Some images of the source are damaged; `bad` lists (path, reason)."""

    def __init__(self, bad: list[tuple[str, str]]) -> None:
        lines = [f"{len(bad)} damaged image(s): mend or remove them, or use --skip-bad"]
        super().__init__("\n  ".join(lines + [f"{path}: {reason}" for path, reason in bad]))
        self.bad = bad


@cache
def _turbojpeg() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL("libturbojpeg.so.0")
    except OSError as error:
        raise ImportError(f"libturbojpeg is missing ({error}): apt-get install libturbojpeg0") from error
    lib.tjInitDecompress.restype, lib.tjGetErrorStr2.restype = ctypes.c_void_p, ctypes.c_char_p
    return lib


def check_jpeg(data: bytes, shrink: int = 8) -> tuple[int, int, bool]:
    """Decode at 1/shrink size: (height, width, whether it is an RGB or YCbCr image). Holds no GIL.

    Raises:
        ValueError: libjpeg-turbo's error or warning.
    """
    lib = _turbojpeg()
    handle = ctypes.c_void_p(lib.tjInitDecompress())
    try:
        width, height, _, colour = numbers = [ctypes.c_int() for _ in range(4)]
        source = handle, data, ctypes.c_ulong(len(data))
        failed = lib.tjDecompressHeader3(*source, *map(ctypes.byref, numbers))
        if width.value * height.value > store.PIXELS_PER_BYTE * len(data):
            raise ValueError("too few bytes for its dimensions")
        if not failed:
            w, h = (-(-side.value // shrink) for side in (width, height))
            pixels = 11 if colour.value in (3, 4) else 0  # TJPF_CMYK for TJCS_CMYK, TJCS_YCCK; TJPF_RGB
            failed = lib.tjDecompress2(*source, ctypes.create_string_buffer(w * h * 4), w, 0, h, pixels, 0)
        if failed:
            raise ValueError(lib.tjGetErrorStr2(handle).decode(errors="replace"))
        return height.value, width.value, colour.value in (0, 1)  # TJCS_RGB, TJCS_YCbCr
    finally:
        lib.tjDestroy(handle)


def _is_rotated(image: Image.Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) in range(2, 9)  # Exif 2.3, table 4: Orientation
    except Exception:  # ImageNet has unreadable EXIF blocks around sound images
        return False


def encode(data: bytes, encoding: Encoding) -> Sample:
    """The sample to store for one image file's bytes. Raises any exception for a damaged image."""
    limit = encoding.max_side or MAX_SIDE
    if data[:2] == b"\xff\xd8":
        height, width, coloured = check_jpeg(data)
        as_wanted = encoding.quality is None and not encoding.raw and max(height, width) <= limit
        upright = b"Exif\0\0" not in data[: 1 << 16] or not _is_rotated(Image.open(BytesIO(data)))
        if coloured and as_wanted and upright and store.jpeg_sides(data) == (height, width):
            return Sample(data, JPG, height, width, verbatim=True)
    image: Image.Image = Image.open(BytesIO(data))
    image.load()
    image = (ImageOps.exif_transpose(image) if _is_rotated(image) else image).convert("RGB")
    if max(image.size) > MAX_SIDE and encoding.max_side is None:
        raise ValueError(f"{image.width} x {image.height} pixels: sides above {MAX_SIDE} need --max-side")
    image.thumbnail((limit, limit), Image.Resampling.BOX, reducing_gap=None)
    if encoding.raw:
        return Sample(image.tobytes(), RAW, image.height, image.width)
    image.save(out := BytesIO(), "JPEG", quality=encoding.quality or 95)
    return Sample(out.getvalue(), JPG, image.height, image.width)


class BetonWriter:
    """Writes `DST.part` in a `with` block; `commit` makes it DST. Leaving without it removes the partial file."""

    def __init__(self, dst: str | Path, capacity: int) -> None:
        self.dst, self.part = Path(dst), Path(f"{dst}.part")
        for path in (self.dst, sidecar_path(self.dst)):
            if path.exists():
                raise ValueError(f"{path} exists and is not overwritten; remove it or choose another name")
        self._file = open(os.open(self.part, os.O_RDWR | os.O_CREAT, 0o666), "r+b", 1 << 20)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with its process, even a killed one
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{self.part}: another conversion is writing it") from None
        self._file.truncate(0)
        self.count, self._page = 0, PAGE
        self._rows, self._alloc = np.zeros(capacity, ROW), np.zeros(capacity, store.ALLOCATION)
        self._crc32 = np.zeros(capacity, np.uint32)
        tables = store.HEADER.itemsize + 2 * store.FIELD.itemsize + self._rows.nbytes
        self._file.seek(-(-tables // PAGE) * PAGE)

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

    def commit(self, classes: Sequence[str], encoding: dict[str, Any]) -> None:
        """Write tables and sidecar, sync, rename."""
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
        store.write_sidecar(self.part, classes=tuple(classes), encoding=encoding, crc32=self._crc32[:n])
        os.replace(sidecar_path(self.part), sidecar_path(self.dst))
        os.replace(self.part, self.dst)

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.filename is None:  # such as a full disk: say which file
            error.filename = str(self.part)
        for path in (self.part, sidecar_path(self.part)):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk fails again when the buffer is flushed
            self._file.close()


def _ordered(work: Callable[[Any], Any], items: Sequence[Any], threads: int | None, what: str) -> Iterator[Any]:
    """`map` on a thread pool, in order, with few results waiting and a progress bar."""
    threads = threads or usable_cores()
    calls = (partial(list[Any], map(work, items[i : i + CHUNK])) for i in range(0, len(items), CHUNK))
    with tqdm(total=len(items), desc=what, unit="img") as progress, closing(run_ahead(calls, threads, 4 * threads)) as done:
        for results in done:
            yield from results
            progress.update(len(results))


def convert_folder(
    src: str | Path, dst: str | Path, encoding: Encoding = Encoding(), *, skip_bad: bool = False, threads: int | None = None
) -> dict[str, Any]:
    """An image folder in ImageNet's layout. Returns the sidecar's `encoding` entry, `skipped` files included.

    Raises:
        BadImages: damaged images, unless `skip_bad`.
        ValueError, OSError: wrong arguments, no images, nothing can be written.
    """
    _turbojpeg()
    Image.init()
    classes, files = list_images(Path(src))

    def one(item: tuple[str, int]) -> Sample | str:
        try:
            return encode(Path(item[0]).read_bytes(), encoding)
        except Exception as error:  # Pillow's decoders raise many types
            return f"{type(error).__name__}: {error}"

    bad: list[tuple[str, str]] = []
    verbatim = 0
    with BetonWriter(dst, len(files)) as writer:
        for (path, label), result in zip(files, _ordered(one, files, threads, "convert"), strict=True):
            if isinstance(result, str):
                bad.append((path, result))
            elif not bad or skip_bad:
                writer.add(result, label)
                verbatim += result.verbatim
        if bad and not (skip_bad and writer.count):
            raise BadImages(bad)
        skipped = [os.path.relpath(path, src) for path, _ in bad]
        done = {**asdict(encoding), "count": writer.count, "verbatim": verbatim, "skipped": skipped}
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
        for image, label in zip(tqdm(images, "convert"), labels, strict=True):
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
        return [fault for fault in _ordered(one, range(len(beton)), threads, "check") if fault]
