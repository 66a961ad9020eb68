"""Corrupted copies of a store's images: as files in class folders, or as one `.beton`.

The pixels are those that `corrupt` makes of what an evaluation shows: image n of the store is
corrupted as number n, after resize and crop. So a set on the disk is the set that `fap-eval
--corrupt` computes, but for what JPEG loses.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from pipelines.ahead import run_ahead
from pipelines.archives.listing import is_foreign
from pipelines.corrupt import corrupt
from pipelines.files import readable, shown
from pipelines.images import UNREADABLE, reason
from pipelines.loaders import best_loader, open_loader
from pipelines.loaders.reference import decoded
from pipelines.plan import PADDING, eval_plan
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.sources.image_files import ImageFilesStore
from pipelines.store import RAW, DamagedData, Store

Format = Literal["jpeg", "png", "beton"]
SUFFIXES = {"jpeg": ".JPEG", "png": ".png"}  # of files; the published ones are called .JPEG
QUALITY = 85  # of the published files
MOST_NAME_BYTES = 255  # of a file's or folder's name, on all usual file systems
BATCH = 64  # images that are read at once
IMAGES_PER_CALL = 8  # sent to a process at once
BATCHES_AHEAD = 3


class Fit(NamedTuple):
    """What an image goes through before it is corrupted: torchvision's Resize and CenterCrop."""

    size: int  # pixels: the sides of the square that is cut out
    resize: int  # pixels: the shorter side before


class How(NamedTuple):
    """What is made of every image of a set."""

    name: str  # of the corruption
    severity: int
    seed: int
    format: Format
    quality: int | None  # of a JPEG


class Stored(NamedTuple):
    """An image as its store has it, to be decoded by a worker."""

    encoded: np.ndarray  # uint8 (n,)
    mode: int
    height: int
    width: int
    shown: str  # for messages


Picture = np.ndarray | Stored  # pixels are uint8 (H, W, 3)


# ------------------------------------------------------------------ one image; in a worker


def copy_of(number: int, picture: Picture, how: How) -> np.ndarray:
    """The corrupted pixels, uint8 (H, W, 3). Raises DamagedData."""
    pixels = _decoded(picture) if isinstance(picture, Stored) else picture
    return corrupt(pixels, how.name, how.severity, how.seed, number)


def _decoded(image: Stored) -> np.ndarray:
    try:
        return decoded(image.encoded, image.mode, image.height, image.width)
    except UNREADABLE as error:
        raise DamagedData(f"{image.shown}: {reason(error)}") from None


def content_of(number: int, picture: Picture, how: How) -> bytes:
    """The content of a file. Raises DamagedData."""
    file = io.BytesIO()
    image = Image.fromarray(copy_of(number, picture, how))
    if how.format == "png":
        image.save(file, "PNG")
    else:
        # As the published generator saves; `optimize` makes a file smaller and changes no pixel.
        image.save(file, "JPEG", quality=how.quality, optimize=True)
    return file.getvalue()


def size_of(number: int, picture: Picture, how: How) -> int:
    """The bytes of a file, or of the pixels. Raises DamagedData."""
    if how.format == "beton":
        return copy_of(number, picture, how).nbytes
    return len(content_of(number, picture, how))


def _write(number: int, picture: Picture, path: str, how: How) -> None:
    """Raises DamagedData, OSError."""
    content = content_of(number, picture, how)
    try:
        with open(path, "xb") as file:
            file.write(content)
    except OSError as error:
        error.filename = path  # that of a full disk names no file
        raise


# ------------------------------------------------------------------ a set


def write_files(
    store: Store, fit: Fit | None, how: How, paths: Sequence[str], pool: Executor
) -> Generator[int, None, None]:
    """Write image n to `paths[n]`, in folders that are there. Gives how many more are done.

    `fit`: None leaves the images in their own size. Raises DamagedData, OSError.
    """
    chunks = (
        [(number, picture, paths[number], how) for number, picture in some]
        for some in pictures(store, fit)
    )
    with closing(_in_pool(pool, _write, chunks)) as done:
        for some in done:
            yield len(some)


def write_beton(
    store: Store,
    fit: Fit | None,
    how: How,
    dst: Path,
    pool: Executor,
    *,
    encoding: dict[str, Any],  # says what the samples are
    check: Callable[[], None],  # called before the file gets its name
) -> Generator[int, None, None]:
    """The same as one `.beton` of raw pixels, whole or absent."""
    chunks = ([(number, picture, how) for number, picture in some] for some in pictures(store, fit))
    labels = store.labels.tolist()
    with BetonWriter(dst, len(store)) as writer:
        with closing(_in_pool(pool, copy_of, chunks)) as done:
            for some in done:
                for image in some:
                    height, width = image.shape[:2]
                    writer.add(Sample(image.tobytes(), RAW, height, width), labels[writer.count])
                yield len(some)
        check()
        writer.commit(store.classes, encoding)


def pictures(store: Store, fit: Fit | None) -> Generator[list[tuple[int, Picture]], None, None]:
    """The images of a store in order, BATCH at a time, each with its number."""
    if fit is None:
        for start in range(0, len(store), BATCH):
            numbers = range(start, min(start + BATCH, len(store)))
            contents = store.read_many(numbers)
            yield [(n, _stored(store, n, each)) for n, each in zip(numbers, contents, strict=True)]
        return
    plan = eval_plan(store.heights, store.widths, size=fit.size, resize=fit.resize, batch=BATCH)
    loader = open_loader(best_loader([store], gpu=False), store, size=fit.size)
    with closing(loader.load(plan)) as batches:
        for batch in batches:
            # Copied: the loader fills its buffer again.
            images = batch.images.permute(0, 2, 3, 1).numpy().copy()
            numbers = plan.index[batch.step].tolist()
            yield [(n, image) for n, image in zip(numbers, images, strict=True) if n != PADDING]


def _stored(store: Store, number: int, encoded: np.ndarray) -> Stored:
    sides = (int(store.heights[number]), int(store.widths[number]))
    return Stored(encoded, int(store.modes[number]), *sides, store.name_of(number))


def _in_pool(
    pool: Executor,
    work: Callable[..., Any],
    chunks: Iterable[list[tuple[Any, ...]]],  # arguments of calls
) -> Generator[list[Any], None, None]:
    """The results of `work`, chunk by chunk in order; few chunks are read ahead."""

    def of(some: list[tuple[Any, ...]]) -> Callable[[], list[Any]]:
        def results() -> list[Any]:
            return list(pool.map(work, *zip(*some, strict=True), chunksize=IMAGES_PER_CALL))

        return results

    # The threads only wait for the pool.
    calls = (of(some) for some in chunks)
    yield from run_ahead(calls, threads=BATCHES_AHEAD, ahead=BATCHES_AHEAD)


# ------------------------------------------------------------------ names of files


def class_folders(store: Store) -> list[str]:
    """The name of each label's folder: its class, or its number where labels have no names.

    Raises ValueError for labels without a folder that would be read back as this class.
    """
    way_out = "; a .beton holds them: --format beton"
    if store.classes is not None:
        for name in store.classes:
            if not _is_folder_name(name):
                raise ValueError(
                    f"{readable(store.path)}: the class {shown(name)} cannot be the name of a "
                    f"folder{way_out}"
                )
        return list(store.classes)
    found = np.unique(store.labels)
    if not np.array_equal(found, np.arange(len(found))):
        raise ValueError(
            f"{readable(store.path)}: its labels have no names, and they are not 0 to "
            f"{len(found) - 1}: folders would be counted otherwise{way_out}"
        )
    digits = len(str(len(found) - 1))
    return [f"{label:0{digits}}" for label in found]  # sorted as text, as a folder is


def _is_folder_name(name: str) -> bool:
    return (
        "/" not in name
        and "\0" not in name
        and len(os.fsencode(name)) <= MOST_NAME_BYTES
        and not is_foreign(name)  # hidden ones, "." and ".." among them
    )


def file_names(store: Store, folders: Sequence[str], suffix: str) -> list[str]:
    """CLASS/NAME of every image, no two of them alike.

    NAME is that of the image's own file where it has one, else its number.
    """
    found = []
    taken: set[tuple[int, str]] = set()
    digits = len(str(len(store) - 1))
    named = isinstance(store, ImageFilesStore)
    for number, label in enumerate(store.labels.tolist()):
        order = f"{number:0{digits}}"
        name = store.file(number).stem if named else order
        room = MOST_NAME_BYTES - len(suffix) - len(order) - 1
        name = os.fsdecode(os.fsencode(name)[:room])
        # Two images of one class may have one name: 1.jpg and 1.png, or in folders below. Without
        # case: on some file systems A and a are one.
        if (label, name.casefold()) in taken:
            name = f"{name}-{order}"
        while (label, name.casefold()) in taken:
            name = f"{name}-"
        taken.add((label, name.casefold()))
        found.append(f"{folders[label]}/{name}{suffix}")
    return found
