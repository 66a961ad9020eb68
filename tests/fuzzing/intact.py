"""Inputs before they are damaged: a `.beton`, its sidecar, an image folder, a run's checkpoint."""

from __future__ import annotations

import io
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fap.config import Config, make_config
from fap.nets.build import build
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_writer import write_sidecar
from tests.conftest import write_beton
from tests.pipelines.many_fields import (
    ARRAY,
    BYTES,
    FLOAT,
    INT,
    JSON,
    RGB,
    Column,
    planes_columns,
    write_fields,
)

COUNT = 12  # images
LABELS = list(range(COUNT))
PAGE = 1 << 14  # small files; a raw image still fits into a page

# The samples of a `.beton`: which of them are raw.
RAW_SAMPLES = {"jpg": [0] * COUNT, "raw": [1] * COUNT, "mixed": [0, 1] * (COUNT // 2)}

# The image folder: (class, file) in the order of the samples.
FILES = [
    ("a", "0.JPEG"),
    ("a", "1.JPEG"),
    ("a", "2.JPEG"),
    ("a", "3.JPEG"),
    ("a", "4.png"),
    ("b", "0.JPEG"),
    ("b", "1.jpg"),
    ("b", "deep/2.JPEG"),
]
# Format and mode of the files that are no RGB JPEGs, whatever their names say.
FORMATS = {2: ("JPEG", "L"), 3: ("PNG", "RGB"), 4: ("PNG", "RGB"), 5: ("JPEG", "CMYK")}
PROGRESSIVE = 7


def mosaic(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): 5 x 5 coloured tiles. No row of one is like the same row of another."""
    tiles = rng.choice(np.array([20, 90, 165, 235], np.uint8), (5, 5, 3))
    image = np.asarray(Image.fromarray(tiles).resize((width, height), Image.Resampling.NEAREST))
    return (image + rng.normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8)


@cache
def images() -> list[np.ndarray]:
    """Twelve, the first six of one size."""
    rng = np.random.default_rng(2)
    sides = [(64, 64)] * 6 + [tuple(rng.integers(40, 100, 2)) for _ in range(6)]
    return [mosaic(rng, *side) for side in sides]


def save(image: np.ndarray, form: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def make_beton(folder: Path, encoding: str) -> Path:
    """A `.beton` of the images, labels 0 to 11.

    `encoding` is a key of RAW_SAMPLES, or "fields": with other fields beside, one of which shows
    another sample's image; or "planes".
    """
    if encoding == "planes":
        columns = planes_columns(images(), LABELS)
        return write_fields(folder / "planes.beton", columns, page=PAGE)
    if encoding == "fields":
        return write_fields(folder / "fields.beton", many_columns(), page=2 * PAGE)
    samples: list[bytes | np.ndarray] = []
    for image, raw in zip(images(), RAW_SAMPLES[encoding], strict=True):
        samples.append(image if raw else save(image, "JPEG", quality=90))
    return write_beton(folder / f"{encoding}.beton", samples, LABELS, page=PAGE)


def many_columns() -> list[Column]:
    """Of a `.beton` with every sort of field; some texts are empty."""
    jpegs = [save(image, "JPEG", quality=90) for image in images()]
    texts = [b"text" * (i % 3) for i in LABELS]
    boxes = [np.full((2, 2), i, np.float32) for i in LABELS]
    return [
        Column("note", BYTES, texts),
        Column("index", INT, LABELS[::-1]),
        Column("image", RGB, jpegs),
        Column("next", RGB, jpegs[1:] + jpegs[:1]),
        Column("box", ARRAY, boxes),
        Column("weight", FLOAT, LABELS),
        Column("tags", JSON, [{"tag": i} for i in LABELS]),
        Column("label", INT, LABELS),
    ]


def add_sidecar(path: Path) -> None:
    """Class names and a checksum for every sample, beside a `.beton`."""
    store = BetonStore(path)
    crc32 = np.array([zlib.crc32(store.read(i)) for i in range(len(store))], np.uint32)
    store.close()
    write_sidecar(path, classes=tuple("abcdefghijkl"), encoding={"quality": 90}, crc32=crc32)


def make_folder(folder: Path) -> Path:
    """Eight images in two classes.

    RGB JPEGs, a PNG, and under JPEG names a grey, a CMYK, a progressive one and a PNG.
    """
    root = folder / "images"
    for i, (name, image_file) in enumerate(FILES):
        file = root / name / image_file
        file.parent.mkdir(parents=True, exist_ok=True)
        form, mode = FORMATS.get(i, ("JPEG", "RGB"))
        options: dict[str, object] = {}
        if form == "JPEG":
            options = {"quality": 90, "progressive": i == PROGRESSIVE}
        file.write_bytes(save(images()[i], form, mode, **options))
    return root


@cache
def tiny_run() -> tuple[Config, dict[str, torch.Tensor]]:
    """The config of a small run, and its model as a checkpoint holds it."""
    config = make_config(
        {"model": {"name": "cifar_resnet8", "num_classes": 3}, "data": {"size": 32, "resize": 32}}
    )
    torch.manual_seed(0)
    model = build("cifar_resnet8", 3, size=32)
    return config, {f"model.{name}": value for name, value in model.state_dict().items()}
