"""Images as arrays: CIFAR-10-C's CORRUPTION.npy and labels.npy, read with suspicion."""

import io
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.files import GIGABYTE, read_regular, shown
from pipelines.sources.cifar10 import CLASSES
from pipelines.store import MAX_SIDE, DamagedData

MOST_BYTES = 4 * GIGABYTE  # of one file; CIFAR-10-C's have 154 MB
MOST_HEADER = 1000  # bytes; numpy's own are below 128
SEVERITIES = 5


class Severity(NamedTuple):
    """One severity of one corruption."""

    images: np.ndarray  # uint8 (N, H, W, 3)
    labels: np.ndarray  # int64 (N,), 0 to 9
    content: str  # checksums of both files, all severities


def read_severity(file: Path, severity: int) -> Severity:
    """Severity 1 to 5 of `file`, whose labels lie beside it in labels.npy.

    Raises DamagedData for anything but five equally large parts of RGB images and CIFAR-10's
    labels, or OSError.
    """
    labels_file = file.with_name("labels.npy")
    images, images_crc32 = read_npy(file)
    labels, labels_crc32 = read_npy(labels_file)
    sides = images.shape[1:3]
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] != 3
        or min(sides) < 1
        or max(sides) > MAX_SIDE
    ):
        raise DamagedData(
            f"{file}: {images.dtype} of shape {images.shape}: expected uint8 (N, height, width, 3)"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DamagedData(
            f"{labels_file}: {labels.dtype} of shape {labels.shape}: expected integers (N,)"
        )
    if len(images) != len(labels):
        raise DamagedData(
            f"{file}: {len(images)} images, but {labels_file} has {len(labels)} labels"
        )
    if len(images) == 0 or len(images) % SEVERITIES:
        raise DamagedData(f"{file}: {len(images)} images cannot be five severities of equally many")
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise DamagedData(
            f"{labels_file}: labels {labels.min()} to {labels.max()}: CIFAR-10 has 0 to"
            f" {len(CLASSES) - 1}"
        )
    of_each = len(images) // SEVERITIES
    parts = labels.reshape(SEVERITIES, of_each)
    if (parts != parts[0]).any():
        raise DamagedData(
            f"{labels_file}: the five parts have different labels, so they are not severities of"
            " the same images"
        )
    rows = slice((severity - 1) * of_each, severity * of_each)
    return Severity(
        images[rows], labels[rows].astype(np.int64), f"{images_crc32:08x}-{labels_crc32:08x}"
    )


def read_npy(file: Path) -> tuple[np.ndarray, int]:
    """A .npy file's array, read-only, and the CRC32 of the file.

    Raises DamagedData unless the header is a plain array's and agrees with the file's size, which
    is bounded.
    """
    try:
        content = read_regular(file, MOST_BYTES)
    except ValueError as error:
        raise DamagedData(str(error)) from None
    at = io.BytesIO(content)
    try:
        match np.lib.format.read_magic(at):
            case (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(
                    at, max_header_size=MOST_HEADER
                )
            case (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(
                    at, max_header_size=MOST_HEADER
                )
            case version:
                raise ValueError(f"version {version}")
    except Exception as error:  # its parsers raise many types
        why = str(error)[:200]
        raise DamagedData(
            f"{file}: no .npy file of an array: {type(error).__name__}: {why}"
        ) from None
    if dtype.kind not in "iuf":
        raise DamagedData(f"{file}: its elements are {shown(str(dtype))}, no plain numbers")
    expected = at.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or expected != len(content):
        raise DamagedData(
            f"{file}: {len(content)} bytes, but its header says shape {shown(shape)} of {dtype}"
        )
    array = np.frombuffer(content, dtype, offset=at.tell())
    return array.reshape(shape, order="F" if fortran else "C"), zlib.crc32(content)
