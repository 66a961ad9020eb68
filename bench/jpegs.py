"""ImageNet-like JPEGs for the benchmarks: `python -m bench.jpegs DST [--count 2000] [--beton]`.

Random crops, flips and colour changes of photos that two packages ship (the wheels are fetched, not
installed): foolbox's 20 ImageNet photos and deepforest's aerial ones. About 500 x 375 pixels and 95
KB each, the mean of ImageNet's training set being 110 KB; one class folder per photo, numbered
files, the same for the same seed.
"""

import argparse
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from tqdm.contrib.concurrent import thread_map

from bench.common import ROOT
from pipelines.convert import convert_folder

WHEELS = ("foolbox==3.3.4", "deepforest==2.1.0")
PHOTOS = ("foolbox/data/imagenet_", "deepforest/data/AWPE", "deepforest/data/2019_YELL_2_541000")
LONG, SHORT, QUALITY = 500, 375, 96  # pixels, pixels, JPEG quality


def wheels(cache: Path = ROOT / "data" / "photos") -> list[Path]:
    """The wheels with the source photos, downloaded into `cache` once."""
    cache.mkdir(parents=True, exist_ok=True)
    files = []
    for wheel in WHEELS:
        file = cache / f"{wheel.replace('==', '-')}-py3-none-any.whl"
        if not file.exists():
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "-q",
                    "--no-deps",
                    "-d",
                    str(cache),
                    wheel,
                ],
                check=True,
            )
        files.append(file)
    return files


def members(wheel: zipfile.ZipFile) -> list[str]:
    """The photos in a wheel."""
    return [
        m
        for m in sorted(wheel.namelist())
        if m.startswith(PHOTOS) and m.lower().endswith(("jpg", "png"))
    ]


def photos(cache: Path = ROOT / "data" / "photos") -> list[Image.Image]:
    """The source photos, sides of at least 375 pixels."""
    found = []
    for file in wheels(cache):
        with zipfile.ZipFile(file) as archive:
            found += [Image.open(archive.open(m)).convert("RGB") for m in members(archive)]
    return found


def made_up(count: int = 4) -> list[Image.Image]:
    """Smooth random colours of 640 x 480 pixels, for where nothing can be fetched and no figure
    matters.
    """
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    return [
        Image.fromarray(colours).resize((640, 480), Image.Resampling.BICUBIC) for colours in coarse
    ]


def _write(sources: list[Image.Image], dst: Path, seed: int, index: int) -> None:
    rng = np.random.default_rng([seed, index])
    label = index % len(sources)
    photo, name = sources[label], f"n{label:08d}"
    width, height = (LONG, SHORT) if rng.random() < 0.75 else (SHORT, LONG)
    scale = rng.uniform(0.6, 1) * min(photo.width / width, photo.height / height)
    w, h = int(width * scale), int(height * scale)
    left, top = rng.integers(photo.width - w + 1), rng.integers(photo.height - h + 1)
    image = photo.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + w, top + h))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(0.8, 1.2))
    (dst / name).mkdir(parents=True, exist_ok=True)
    image.save(dst / name / f"{name}_{index}.JPEG", quality=QUALITY)


def make(
    dst: str | Path, count: int = 2000, seed: int = 0, sources: list[Image.Image] | None = None
) -> Path:
    """`count` JPEGs in ImageNet's folder layout under `dst`, which is returned; existing files are
    replaced.
    """
    dst, sources = Path(dst), sources or photos()
    thread_map(partial(_write, sources, dst, seed), range(count), desc="jpegs", unit="img")
    return dst


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
        make(a.dst, a.count, sources=made_up() if a.made_up else None)
    beton = a.dst.with_suffix(".beton")
    if a.beton and not beton.exists():
        convert_folder(a.dst, beton)
    print(
        f"{a.dst}: {sum(1 for _ in a.dst.rglob('*.JPEG'))} JPEGs{f', {beton}' if a.beton else ''}"
    )


if __name__ == "__main__":
    main()
