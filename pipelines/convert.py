"""Image files, CIFAR-10 or arrays -> samples of a `.beton`, and the check of one.

JPEG files are stored byte for byte. What not every decoder would show as an upright RGB image (a
PNG named .JPEG, grey, CMYK, turned by Exif) is re-encoded once: images.py says how, and an image
folder shows the same pixels. Every JPEG is decoded once; libjpeg-turbo's warnings count as damage.
That decoding is at 1/8 size: all entropy-coded data are read, which is where damage can be noticed,
and the pixels nobody looks at are not computed (a test compares its verdicts with full-size ones).
"""

import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipelines.files import readable
from pipelines.images import QUALITY, as_jpeg, decode, plain_jpeg, reason, shrink
from pipelines.jpeg import is_jpeg
from pipelines.machine import usable_cores
from pipelines.planes import encode_planes, planes_of_picture
from pipelines.progress import in_order
from pipelines.sources import cifar10
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.sources.shards import ShardedStore, is_pattern, shards_of
from pipelines.store import JPG, MAX_SIDE, PLANES, RAW, DamagedData
from pipelines.turbojpeg import check_jpeg

CHUNK = 8  # images of one task
MOST_TOLD = 20  # damaged images that a message lists
BEST_QUALITY = 100


@dataclass(frozen=True)
class Encoding:
    """What to store. The default keeps JPEG files as they are."""

    max_side: int | None = None  # pixels; larger images are shrunk (area average) and re-encoded
    quality: int | None = None  # 1-100: re-encode every image; None: 95 for those that need it
    raw: bool = False  # RGB pixels instead of JPEG
    planes: bool = False  # decoded planes instead of JPEG: see pipelines/planes.py

    def __post_init__(self) -> None:
        _check_range("max_side", self.max_side, MAX_SIDE)
        _check_range("quality", self.quality, BEST_QUALITY)
        if (self.raw or self.planes) and self.quality is not None:
            raise ValueError(
                f"quality = {self.quality}: only JPEGs have one; leave it out, or raw and planes"
            )
        if self.raw and self.planes:
            raise ValueError("raw and planes: choose one of them")

    def keeps(self, sides: tuple[int, int]) -> bool:
        """Whether a plain JPEG of (height, width) is stored as it is."""
        if self.raw or self.planes or self.quality is not None:
            return False
        return max(sides) <= (self.max_side or MAX_SIDE)


def _check_range(name: str, value: int | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise ValueError(f"{name} = {value}: must be 1 to {most}")


AS_THEY_ARE = Encoding()


class BadImages(ValueError):  # noqa: N818
    """Some images of the source are damaged or refused; `bad` lists (path, reason)."""

    def __init__(self, bad: list[tuple[str, str]]) -> None:
        lines = [
            f"{len(bad):,} image(s) cannot be used: mend or remove them, or use --skip-bad",
            *told(bad),
        ]
        super().__init__("\n  ".join(lines))
        self.bad = bad


def told(bad: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each of the first damaged images, and how many there are beyond."""
    lines = [f"{readable(path)}: {why}" for path, why in bad[:MOST_TOLD]]
    if len(bad) > MOST_TOLD:
        lines.append(f"and {len(bad) - MOST_TOLD:,} more")
    return lines


# ------------------------------------------------------------------ conversion


def encode(data: bytes, encoding: Encoding) -> Sample:
    """The sample to store for one image file's bytes. Raises any exception for a damaged image."""
    if encoding.planes:
        if is_jpeg(data):
            check_jpeg(data)  # a warning of the decoder is damage
        planes, height, width = encode_planes(data, encoding.max_side)
        return Sample(planes, PLANES, height, width)
    sides = plain_jpeg(data)
    if sides is not None and encoding.keeps(sides):
        decoded_sides = check_jpeg(data)
        if sides != decoded_sides:
            raise ValueError(f"its header says {sides} pixels, the decoder {decoded_sides}")
        return Sample(data, JPG, *sides, verbatim=True)
    picture = decode(data, encoding.max_side)
    if encoding.raw:
        return Sample(picture.tobytes(), RAW, picture.height, picture.width)
    return Sample(as_jpeg(picture, encoding.quality or QUALITY), JPG, picture.height, picture.width)


def encode_pixels(
    pixels: np.ndarray,  # uint8 (H, W, 3), RGB
    encoding: Encoding,
) -> Sample:
    """The sample to store for pixels: raw ones, unless a quality or planes are asked for."""
    picture = Image.fromarray(shrink(pixels, encoding.max_side))
    if encoding.planes:
        return Sample(planes_of_picture(picture), PLANES, picture.height, picture.width)
    if encoding.quality is None:
        return Sample(picture.tobytes(), RAW, picture.height, picture.width)
    return Sample(as_jpeg(picture, encoding.quality), JPG, picture.height, picture.width)


def encode_content(
    read: Callable[[], bytes | np.ndarray],
    encoding: Encoding,
    where: str,  # the image, for messages
    look_at: Callable[[bytes], object] | None = None,
) -> Sample | str:
    """The sample to store for what `read` gives, an image file's content or pixels.

    Why there is none, if there is none. `look_at` is given the content, and may refuse it by an
    exception.
    """
    try:
        content = read()
        if isinstance(content, np.ndarray):
            sample = encode_pixels(content, encoding)
        else:
            if look_at is not None:
                look_at(content)
            sample = encode(content, encoding)
        # Here, because this runs in many threads, and the writer in one.
        return sample._replace(crc32=zlib.crc32(sample.data))
    except MemoryError:  # not the image's fault: it must not be left out
        raise MemoryError(
            f"{readable(where)}: not enough memory; fewer --threads need less"
        ) from None
    except Exception as error:  # Pillow's decoders raise many types
        return reason(error, where)


def convert_cifar10(
    dst: str | Path, split: Literal["train", "test"] = "train", limit: int | None = None
) -> dict[str, Any]:
    """CIFAR-10 as raw samples in published order; `limit`: only the first ones."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: must be at least 1")
    images, labels = cifar10.load(split)
    return convert_arrays(dst, images[:limit], labels[:limit], cifar10.CLASSES, f"cifar10 {split}")


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
        progress = tqdm(images, "convert", delay=1, disable=None)
        for image, label in zip(progress, labels, strict=True):
            height, width, _ = image.shape
            writer.add(Sample(image.tobytes(), RAW, height, width), label)
        writer.commit(classes, done)
    return done


# ------------------------------------------------------------------ the check


def check(path: str | Path, threads: int | None = None) -> list[str]:
    """The faults of a `.beton`, or of several as one data set: structure and every CRC.

    Where there is no sidecar every JPEG is decoded instead. Raises ValueError for a pattern that
    `shards_of` refuses.
    """
    if is_pattern(path):
        return _check_shards(path, threads)
    try:
        beton = BetonStore(path)
    except DamagedData as error:
        return [str(error)]

    def fault_of(index: int) -> str | None:
        try:
            data = beton.read(index)
            if beton.crc32 is None and beton.modes[index] == JPG:
                check_jpeg(data.tobytes())
        except (DamagedData, ValueError) as error:
            return f"sample {index}: {error}"
        return None

    with closing(beton):
        indices = range(len(beton))
        faults = in_order(fault_of, indices, cores(threads), CHUNK, "check")
        return [fault for fault in faults if fault is not None]


def _check_shards(pattern: str | Path, threads: int | None) -> list[str]:
    faults = [fault for shard in shards_of(pattern) for fault in check(shard, threads)]
    try:
        ShardedStore(pattern).close()
    except DamagedData:  # which is among the faults
        assert faults
    except ValueError as error:  # whole files that do not belong together
        faults.append(str(error))
    return faults


def cores(threads: int | None) -> int:
    """The threads asked for, or as many as there are cores."""
    return threads or usable_cores()
