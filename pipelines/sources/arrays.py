"""Images as arrays: the .npy files of CIFAR-10-C and CIFAR-100-C, read with suspicion."""

import io
import math
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from pipelines.files import GIGABYTE, one_line, read_regular, shown
from pipelines.store import MAX_SIDE, DamagedData

MOST_BYTES = 4 * GIGABYTE  # of one file; the published ones have 154 MB
MOST_HEADER_BYTES = 1000  # numpy's own are below 128
SEVERITIES = 5  # of a corruption, one behind the other in its file
PLAIN_NUMBERS = "iuf"  # numpy's letters: signed, unsigned, floating-point
INTEGERS = "iu"


class Severity(NamedTuple):
    """One severity of one corruption."""

    images: np.ndarray  # uint8 (N, H, W, 3)
    labels: np.ndarray  # int64 (N,), from 0 on
    content: str  # checksums of both files, all severities


def read_severity(file: Path, severity: int, n_classes: int = 10) -> Severity:
    """Severity 1 to 5 of `file`, whose labels lie beside it in labels.npy.

    Raises:
        DamagedData: anything but five equally large parts of RGB images, their labels below
            `n_classes`.
        OSError: a file cannot be read.
    """
    labels_file = file.with_name("labels.npy")
    images, images_crc32 = read_npy(file)
    labels, labels_crc32 = read_npy(labels_file)
    _check_images(images, file)
    _check_labels(labels, labels_file, n_classes)
    if len(images) != len(labels):
        raise DamagedData(
            f"{file}: {len(images)} images, but {labels_file} has {len(labels)} labels"
        )
    if len(images) == 0 or len(images) % SEVERITIES:
        raise DamagedData(f"{file}: {len(images)} images cannot be five severities of equally many")
    of_each = len(images) // SEVERITIES
    parts = labels.reshape(SEVERITIES, of_each)
    if (parts != parts[0]).any():
        raise DamagedData(
            f"{labels_file}: the five parts have different labels,"
            " so they are not severities of the same images"
        )
    rows = slice((severity - 1) * of_each, severity * of_each)
    content = f"{images_crc32:08x}-{labels_crc32:08x}"
    return Severity(images[rows], labels[rows].astype(np.int64), content)


def _check_images(images: np.ndarray, file: Path) -> None:
    sides = images.shape[1:3]
    is_rgb = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
    if not is_rgb or min(sides) < 1 or max(sides) > MAX_SIDE:
        raise DamagedData(
            f"{file}: {images.dtype} of shape {images.shape}: expected uint8 (N, height, width, 3)"
        )


def _check_labels(labels: np.ndarray, file: Path, n_classes: int) -> None:
    if labels.dtype.kind not in INTEGERS or labels.ndim != 1:
        raise DamagedData(f"{file}: {labels.dtype} of shape {labels.shape}: expected integers (N,)")
    if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
        raise DamagedData(
            f"{file}: labels {labels.min()} to {labels.max()}: "
            f"CIFAR-{n_classes} has 0 to {n_classes - 1}"
        )


def read_npy(file: Path) -> tuple[np.ndarray, int]:
    """A .npy file's array, read-only, and the CRC32 of the file.

    Raises:
        DamagedData: the header is not a plain array's, or does not agree with the file's size,
            which is bounded.
    """
    try:
        content = read_regular(file, MOST_BYTES)
    except ValueError as error:
        raise DamagedData(str(error)) from None
    header = io.BytesIO(content)
    try:
        shape, fortran_order, dtype = _read_header(header)
    except Exception as error:  # its parsers raise many types
        raise DamagedData(
            f"{file}: no .npy file of an array: {type(error).__name__}: {one_line(error, 200)}"
        ) from None
    start = header.tell()
    if dtype.kind not in PLAIN_NUMBERS:
        raise DamagedData(f"{file}: its elements are {shown(str(dtype))}, no plain numbers")
    expected_bytes = start + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or expected_bytes != len(content):
        raise DamagedData(
            f"{file}: {len(content)} bytes, but its header says shape {shown(shape)} of {dtype}"
        )
    array = np.frombuffer(content, dtype, offset=start)
    order: Literal["C", "F"] = "F" if fortran_order else "C"
    return array.reshape(shape, order=order), zlib.crc32(content)


def _read_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first dimension varies fastest, type. Raises any exception.

    numpy's parsers evaluate literals only, and no more of them than are allowed here.
    """
    match np.lib.format.read_magic(file):
        case (1, 0):
            return np.lib.format.read_array_header_1_0(file, max_header_size=MOST_HEADER_BYTES)
        case (2, 0):
            return np.lib.format.read_array_header_2_0(file, max_header_size=MOST_HEADER_BYTES)
        case version:
            raise ValueError(f"version {version}")
