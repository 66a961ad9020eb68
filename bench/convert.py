"""How fast is our conversion of an image folder beside FFCV's DatasetWriter?

    python -m bench.convert [--count 2000] [--repeats 5]

By default ours keeps the bytes of every image and checks it; FFCV's writer always encodes again. So
ours is also measured where it encodes again, at the same quality and to the same sides. dB: the
PSNR of the stored images against their originals, which are shrunk by area average first where the
stored ones are; it is equal where both encode again.

All convert the same JPEGs (bench/jpegs.py) on the same cores in turns, files in the page cache,
ours including its fsync. CPU-ms are those of all processes. Writes bench/results/convert.json, .md
and .png. Targets: 3x as it is by default, 1.2x where both encode again.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from PIL import Image
from torchvision.datasets import ImageFolder

from bench.common import ROOT, alternate, options, ratio, report, settings_of, spread
from bench.jpegs import make
from pipelines.convert import AS_THEY_ARE, Encoding
from pipelines.convert_images import convert_images
from pipelines.images import shrink
from pipelines.machine import usable_cores
from pipelines.sources.beton import BetonStore

QUALITY = 90
MAX_SIDE = 400  # pixels: less than what the images have
COMPARED = 40  # images whose PSNR is told
MS = 1000  # of a second


class Way(NamedTuple):
    """One way to convert."""

    convert: Callable[[Path, Path], object]  # source and target
    beside: str  # FFCV's way that does the same
    max_side: int | None = None


def ours(encoding: Encoding) -> Callable[[Path, Path], object]:
    def convert(src: Path, dst: Path) -> None:
        convert_images(src, dst, encoding)

    return convert


def ffcvs(max_side: int | None = None) -> Callable[[Path, Path], object]:
    def convert(src: Path, dst: Path) -> None:
        image = RGBImageField(write_mode="jpg", jpeg_quality=QUALITY, max_resolution=max_side)
        fields = {"image": image, "label": IntField()}
        writer = DatasetWriter(str(dst), fields, num_workers=usable_cores())
        writer.from_indexed_dataset(ImageFolder(str(src)))

    return convert


WAYS = {
    "ours": Way(ours(AS_THEY_ARE), "FFCV"),
    "ours, --quality 90": Way(ours(Encoding(quality=QUALITY)), "FFCV"),
    "FFCV": Way(ffcvs(), "FFCV"),
    "ours, --max-side 400 --quality 90": Way(
        ours(Encoding(max_side=MAX_SIDE, quality=QUALITY)), "FFCV, 400 pixels", MAX_SIDE
    ),
    "FFCV, 400 pixels": Way(ffcvs(MAX_SIDE), "FFCV, 400 pixels", MAX_SIDE),
}


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def decibel(
    beton: Path,
    originals: Sequence[np.ndarray],  # uint8 (H, W, 3)
    max_side: int | None,
) -> float:
    """Mean PSNR of the first images of a file."""
    found = []
    with closing(BetonStore(beton)) as store:
        for index, original in enumerate(originals):
            stored = Image.open(BytesIO(store.read(index).tobytes()))
            difference = np.asarray(stored, np.float64) - shrink(original, max_side)
            # Of equal images it has no bound: one level in one value is counted.
            error = max(np.square(difference).mean(), 1 / difference.size)
            found.append(10 * np.log10(255**2 / error))
    return float(np.mean(found))


def main() -> None:
    a = options(__doc__, count=2000, repeats=5).parse_args()
    data = ROOT / "data"
    data.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data, prefix="bench-") as folder:
        src = make(Path(folder) / "jpegs", a.count)
        total_bytes = sum(path.stat().st_size for path in src.rglob("*.JPEG"))
        files = [path for path, _ in ImageFolder(str(src)).samples[:COMPARED]]
        originals = [np.asarray(Image.open(path)) for path in files]

        def measured(name: str) -> tuple[float, float, int, float]:
            """Seconds and CPU seconds of a conversion; the bytes and the PSNR of its result."""
            way = WAYS[name]
            with tempfile.TemporaryDirectory(dir=folder) as target:
                dst = Path(target) / "out.beton"
                cpu_before = cpu_seconds()
                before = time.perf_counter()
                way.convert(src, dst)
                seconds = time.perf_counter() - before
                for child in multiprocessing.active_children():
                    child.join()  # FFCV's writer leaves its own; then their CPU time counts
                cpu = cpu_seconds() - cpu_before
                return seconds, cpu, dst.stat().st_size, decibel(dst, originals, way.max_side)

        found = dict(zip(WAYS, alternate(measured, WAYS, a.repeats, warm_up=1), strict=True))
    results = []
    for name, (seconds, cpu, written, quality) in found.items():
        beside_seconds, beside_cpu, *_ = found[WAYS[name].beside]
        results.append(
            {
                "way": name,
                "images/s": spread(a.count / seconds),
                "it / FFCV": ratio(beside_seconds, seconds),
                "CPU-ms per image": spread(MS * cpu / a.count),
                "CPU time: FFCV / it": ratio(beside_cpu, cpu),
                "file MB": written[0] / 1e6,
                "dB": quality[0],
            }
        )
    settings = settings_of(a, mean_bytes=total_bytes / a.count)
    print(*report(a.out / "convert", settings, results, ["images/s"]), sep="\n")


if __name__ == "__main__":
    main()
