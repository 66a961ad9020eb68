"""A data set of small images as few lossless files: sheets of many images, labels beside them.

A library of the kit (`bench.gpu.build_kit`) and of the study that uses it (`bench.gpu.study`).
Lossless WebP holds CIFAR-10 in 55% of the bytes of its pixels, which an upload of limited size
needs. `train_00.webp` shows the first 2,500 training images in rows of 50 and `train_00.npy` has
their labels, so any subset of the sheets is a smaller data set.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.convert import convert_arrays
from pipelines.machine import usable_cores
from pipelines.sources import cifar10

COLUMNS = 50
IMAGES_PER_SHEET = 2500


def write(
    folder: Path,
    split: str,
    images: np.ndarray,  # uint8 (N, S, S, 3)
    labels: np.ndarray,  # integers (N,), 0 to 255
) -> list[Path]:
    """Write the sheets of one split into `folder`; returns them in order."""
    if labels.min() < 0 or labels.max() > 255:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}: must be 0 to 255")
    starts = range(0, len(images), IMAGES_PER_SHEET)
    sheets = [folder / f"{split}_{number:02d}.webp" for number in range(len(starts))]

    def write_one(sheet: Path, start: int) -> None:
        part = slice(start, start + IMAGES_PER_SHEET)
        pixels = Image.fromarray(tiled(images[part]))
        pixels.save(sheet, "WEBP", lossless=True, method=4, quality=50)
        np.save(labels_of(sheet), labels[part].astype(np.uint8))

    with ThreadPoolExecutor(usable_cores()) as pool:  # Pillow's encoder holds no GIL
        jobs = []
        for sheet, start in zip(sheets, starts, strict=True):
            jobs.append(pool.submit(write_one, sheet, start))
    for job in jobs:
        job.result()
    return sheets


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The images of all sheets of one split that are there: uint8 (N, S, S, 3) and int64 (N,).

    Raises:
        ValueError: no sheets of this split.
        OSError: a damaged sheet, or one without labels.
    """
    sheets = sorted(folder.glob(f"{split}_*.webp"))
    if not sheets:
        raise ValueError(f"no sheets {split}_*.webp in {folder}")

    def read_one(sheet: Path) -> tuple[np.ndarray, np.ndarray]:
        labels = np.load(labels_of(sheet)).astype(np.int64)
        pixels = np.asarray(Image.open(sheet).convert("RGB"))
        return untiled(pixels)[: len(labels)], labels

    with ThreadPoolExecutor(usable_cores()) as pool:
        jobs = [pool.submit(read_one, sheet) for sheet in sheets]
    images = []
    labels = []
    for job in jobs:
        some_images, some_labels = job.result()
        images.append(some_images)
        labels.append(some_labels)
    return np.concatenate(images), np.concatenate(labels)


def beton(folder: Path, split: str, dst: Path) -> int:
    """The CIFAR-10 sheets of one split as `.beton`; returns the number of images.

    Raises:
        ValueError: `dst` exists, or there are no such sheets.
    """
    images, labels = read(folder, split)
    convert_arrays(dst, images, labels, cifar10.CLASSES, f"cifar10 {split}, from sheets")
    return len(images)


def labels_of(sheet: Path) -> Path:
    return sheet.with_suffix(".npy")


def tiled(images: np.ndarray) -> np.ndarray:
    """(N, S, S, 3) -> (rows * S, 50 * S, 3), black where the last row has no image."""
    n, side, _, channels = images.shape
    rows = math.ceil(n / COLUMNS)
    grid = np.zeros((rows * COLUMNS, side, side, channels), np.uint8)
    grid[:n] = images
    # From image after image to line after line of pixels: the images of a row side by side.
    grid = grid.reshape(rows, COLUMNS, side, side, channels).swapaxes(1, 2)
    return grid.reshape(rows * side, COLUMNS * side, channels)


def untiled(pixels: np.ndarray) -> np.ndarray:
    """(rows * S, 50 * S, 3) -> (rows * 50, S, S, 3): `tiled` undone, but for its black images."""
    height, width, channels = pixels.shape
    side = width // COLUMNS
    grid = pixels.reshape(height // side, side, COLUMNS, side, channels).swapaxes(1, 2)
    return grid.reshape(-1, side, side, channels)
