"""Conversion of an image folder: ours (bytes kept, every image checked) against FFCV's
DatasetWriter (quality 90).

`python -m bench.convert [--count 2000] [--repeats 5]` times both in alternation on the same JPEGs
(bench/jpegs.py) and cores, files in the page cache, ours including its fsync. Writes
bench/results/convert.json. Target: 2x, goal 3x.
"""

import tempfile
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from torchvision.datasets import ImageFolder

from bench.common import ROOT, alternate, options, ratio, report, spread
from bench.jpegs import make
from pipelines.convert import Encoding, convert_folder
from pipelines.machine import usable_cores


def stock(src: Path, dst: Path) -> None:
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    DatasetWriter(str(dst), fields, num_workers=usable_cores()).from_indexed_dataset(
        ImageFolder(str(src))
    )


WAYS = {
    "ours": convert_folder,
    "ours, --quality 90": partial(convert_folder, encoding=Encoding(quality=90)),
    "FFCV": stock,
}


def timed(way: Callable[[Path, Path], object], src: Path) -> tuple[float, float]:
    """Seconds of a conversion and the bytes it wrote."""
    with tempfile.TemporaryDirectory(dir=src.parent) as folder:
        dst = Path(folder) / "out.beton"
        return timeit.timeit(partial(way, src, dst), number=1), dst.stat().st_size


def main() -> None:
    a = options(__doc__, count=2000, repeats=5).parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT / "data", prefix="bench-") as folder:
        src = make(Path(folder) / "jpegs", a.count)
        a.mean_bytes = sum(path.stat().st_size for path in src.rglob("*.JPEG")) / a.count
        found = alternate([partial(timed, way, src) for way in WAYS.values()], a.repeats, warm_up=1)
    results = [
        {
            "way": way,
            "images/s": spread(a.count / s),
            "it / FFCV": ratio(found[-1, 0], s),
            "file MB": size[0] / 1e6,
        }
        for way, (s, size) in zip(WAYS, found, strict=True)
    ]
    print(*report("convert", a, results, ["images/s"]), sep="\n")


if __name__ == "__main__":
    main()
