"""ImageNet-like JPEGs for the benchmarks: `python -m bench.jpegs DST [--count 2000] [--seed 0]`.

Random crops, flips and colour changes of photos that two packages ship (the wheels are fetched, not installed):
foolbox's 20 ImageNet photos and deepforest's aerial ones. About 500 x 375 pixels and 95 KB each, the mean of
ImageNet's training set being 110 KB; one class folder per photo, numbered files, the same for the same seed.
"""

import argparse
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from tqdm import tqdm

from bench.common import ROOT

WHEELS = ("foolbox==3.3.4", "deepforest==2.1.0")
PHOTOS = ("foolbox/data/imagenet_", "deepforest/data/AWPE", "deepforest/data/2019_YELL_2_541000")
LONG, SHORT, QUALITY = 500, 375, 96  # pixels, pixels, JPEG quality


def photos(cache: Path = ROOT / "data" / "photos") -> list[Image.Image]:
    """The source photos, sides of at least 375 pixels; the wheels are downloaded into `cache` once."""
    cache.mkdir(parents=True, exist_ok=True)
    found = []
    for wheel in WHEELS:
        name, version = wheel.split("==")
        file = cache / f"{name}-{version}-py3-none-any.whl"
        if not file.exists():
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache), wheel]
            subprocess.run(command, check=True)
        with zipfile.ZipFile(file) as archive:
            for member in sorted(archive.namelist()):
                if member.startswith(PHOTOS) and member.lower().endswith(("jpg", "png")):
                    found.append(Image.open(BytesIO(archive.read(member))).convert("RGB"))
    return found


def _write(sources: list[Image.Image], dst: Path, seed: int, index: int) -> None:
    rng = np.random.default_rng([seed, index])
    label = index % len(sources)
    photo = sources[label]
    width, height = (LONG, SHORT) if rng.random() < 0.75 else (SHORT, LONG)
    scale = rng.uniform(0.6, 1) * min(photo.width / width, photo.height / height)
    w, h = int(width * scale), int(height * scale)
    left, top = rng.integers(photo.width - w + 1), rng.integers(photo.height - h + 1)
    box = (left, top, left + w, top + h)
    image = photo.resize((width, height), Image.Resampling.LANCZOS, box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(0.8, 1.2))
    image.save(dst / f"n{label:08d}" / f"n{label:08d}_{index}.JPEG", quality=QUALITY)


def make(dst: str | Path, count: int = 2000, seed: int = 0) -> Path:
    """`count` JPEGs in ImageNet's folder layout under `dst`, which is returned; existing files are replaced."""
    dst, sources = Path(dst), photos()
    for label in range(min(len(sources), count)):
        (dst / f"n{label:08d}").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(partial(_write, sources, dst, seed), range(count)), "jpegs", count, unit="img"))
    return dst


if __name__ == "__main__":
    parser = argparse.ArgumentParser("bench.jpegs", description=__doc__)
    parser.add_argument("dst", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    make(a.dst, a.count, a.seed)
