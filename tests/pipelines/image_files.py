"""Random image files of every format and mode that Pillow writes and we read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.pipelines.samples import encoded, exif_of

LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "PPM": {},
    "GIF": {},
}
MODES = {
    "JPEG": ["RGB", "L", "CMYK"],
    "PNG": ["RGB", "L", "1", "P", "LA", "RGBA"],
    "TIFF": ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr"],
    "WEBP": ["RGB", "RGBA"],
    "BMP": ["RGB", "L", "1", "P", "RGBA"],
    "PPM": ["RGB", "L", "1"],
    "GIF": ["P", "L", "1"],
    "AVIF": ["RGB", "RGBA"],
}
HAVE_EXIF = ("JPEG", "PNG", "TIFF", "WEBP", "AVIF")


def picture(rng: np.random.Generator, mode: str = "RGB") -> Image.Image:
    """Smooth colours, and a ramp of transparency where the mode has one; the sides differ."""
    width, height = (int(n) for n in rng.choice(np.arange(40, 90), 2, replace=False))
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode[:-1])
        ramp = np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)
        image.putalpha(Image.fromarray(ramp))
        return image
    if mode == "P":
        return image.quantize(32)
    return image.convert(mode)


def saved(image: Image.Image, image_format: str, turn: int = 1, **save: object) -> bytes:
    if turn != 1:
        save["exif"] = exif_of(turn)
    return encoded(image, image_format, **save)


def random_file(rng: np.random.Generator) -> tuple[str, bytes]:
    """What it is, and its content."""
    image_format = str(rng.choice(list(MODES)))
    mode = str(rng.choice(MODES[image_format]))
    turn = int(rng.integers(0, 10))  # 0 and 9 are none
    if image_format not in HAVE_EXIF:
        turn = 1
    if image_format == "JPEG":
        save = {"quality": 92, "progressive": bool(rng.integers(2))}
    else:
        save = LOSSLESS.get(image_format, {})
    if mode == "P" and rng.integers(2) and image_format == "PNG":
        save = {"transparency": int(rng.integers(32))}
    what = f"{image_format} {mode} {turn}"
    return what, saved(picture(rng, mode), image_format, turn, **save)


def write(
    path: Path,
    seed: int,
    size: tuple[int, int] = (40, 30),  # width, height
    mode: str = "RGB",
    image_format: str = "JPEG",
    **save: object,
) -> np.ndarray:
    """Write a smooth picture, so that JPEG hardly changes it; uint8 (H, W, 3) before encoding."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    image.convert(mode).save(path, image_format, **save)
    return np.asarray(image)


def write_folder(root: Path) -> Path:
    """Five images of three classes, a folder within a class, and a text file."""
    for i, name in enumerate(["b/1.JPEG", "a/2.jpeg", "a/10.jpg", "a/deep/0.JPEG", "c/x.JPEG"]):
        write(root / name, i, (40 + i, 30 + 2 * i))
    (root / "a" / "notes.txt").write_text("no image")
    return root
