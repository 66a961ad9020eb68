"""Small images, image folders and `.beton` files that several tests start from."""

from __future__ import annotations

import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.boxes import Annotations
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_writer import write_sidecar
from pipelines.store import RAW, Store
from tests.conftest import as_jpeg, write_beton

ORIENTATION = 0x0112  # Exif's tag


def picture(seed: int, height: int = 60, width: int = 80) -> Image.Image:
    """A smooth random image: neighbouring seeds differ, JPEG changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str, **save: object) -> bytes:
    out = BytesIO()
    image.save(out, image_format, **save)
    return out.getvalue()


def jpeg(seed: int, **save: object) -> bytes:
    return encoded(picture(seed), "JPEG", quality=92, **save)


def exif_of(turn: int) -> bytes:
    """A block of Exif that says how an image is turned."""
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    return exif.tobytes()


def image_folder(root: Path) -> Path:
    """Two classes of three JPEGs; `dog` is written first, and a text file lies about."""
    for c, name in enumerate(("dog", "cat")):
        (root / name).mkdir(parents=True)
        for i in range(3):
            (root / name / f"{i}.JPEG").write_bytes(jpeg(10 * c + i))
    (root / "cat" / "notes.txt").write_text("not an image")
    return root


def small_beton(path: Path, photos: list[np.ndarray]) -> Path:
    """Six samples, the last two raw."""
    return write_beton(path, [as_jpeg(image) for image in photos[:4]] + photos[4:6], range(6))


def contents(path: Path) -> list[tuple[int, bytes]]:
    """Everything a loader would get: (label, encoded bytes) of every sample."""
    store = BetonStore(path)
    try:
        return [(int(store.labels[i]), store.read(i).tobytes()) for i in range(len(store))]
    finally:
        store.close()


def add_sidecar(
    path: Path,
    classes: tuple[str, ...] = tuple("abcdef"),
    encoding: dict[str, object] | None = None,
    annotations: Annotations | None = None,
) -> None:
    """With true checksums of the samples."""
    crc32 = np.array([zlib.crc32(data) for _, data in contents(path)], np.uint32)
    write_sidecar(
        path,
        classes=classes,
        encoding=encoding or {"quality": 90},
        crc32=crc32,
        annotations=annotations,
    )


def flip_bit(path: Path, at: int, bit: int) -> None:
    """In place; twice is as before."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def decoded(store: Store, index: int) -> np.ndarray:
    data = store.read(index)
    if store.modes[index] == RAW:
        return data.reshape(store.heights[index], store.widths[index], 3)
    return np.asarray(Image.open(BytesIO(data.tobytes())))


def no_trace(folder: Path) -> bool:
    """Whether a conversion to out.beton has left nothing behind."""
    return not [path for path in folder.iterdir() if "out.beton" in path.name]
