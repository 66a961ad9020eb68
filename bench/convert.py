"""How fast is our conversion of an image folder beside FFCV's DatasetWriter?

    python -m bench.convert [--count 2000] [--repeats 5]

Ours keeps the bytes of every image and checks it; FFCV's writer encodes it again at quality 90.
Both convert the same JPEGs (bench/jpegs.py) on the same cores in turns, files in the page cache,
ours including its fsync. Writes bench/results/convert.json, .md and .png. Target: 2x, goal 3x.
"""

import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from torchvision.datasets import ImageFolder

from bench.common import ROOT, alternate, options, ratio, report, settings_of, spread
from bench.jpegs import make
from pipelines.convert import Encoding
from pipelines.convert_images import convert_images
from pipelines.machine import usable_cores


def reencoded(src: Path, dst: Path) -> None:
    convert_images(src, dst, encoding=Encoding(quality=90))


def stock(src: Path, dst: Path) -> None:
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    writer = DatasetWriter(str(dst), fields, num_workers=usable_cores())
    writer.from_indexed_dataset(ImageFolder(str(src)))


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "ours": convert_images,
    "ours, --quality 90": reencoded,
    "FFCV": stock,
}


def main() -> None:
    a = options(__doc__, count=2000, repeats=5).parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT / "data", prefix="bench-") as folder:
        src = make(Path(folder) / "jpegs", a.count)
        total_bytes = sum(path.stat().st_size for path in src.rglob("*.JPEG"))

        def timed(way: str) -> tuple[float, float]:
            """Seconds of a conversion and the bytes it wrote."""
            with tempfile.TemporaryDirectory(dir=folder) as target:
                dst = Path(target) / "out.beton"

                def convert() -> None:
                    WAYS[way](src, dst)

                return timeit.timeit(convert, number=1), dst.stat().st_size

        found = alternate(timed, WAYS, a.repeats, warm_up=1)
    ffcv_seconds = found[-1, 0]
    results = []
    for way, (seconds, written) in zip(WAYS, found, strict=True):
        results.append(
            {
                "way": way,
                "images/s": spread(a.count / seconds),
                "it / FFCV": ratio(ffcv_seconds, seconds),
                "file MB": written[0] / 1e6,
            }
        )
    settings = settings_of(a, mean_bytes=total_bytes / a.count)
    print(*report(a.out / "convert", settings, results, ["images/s"]), sep="\n")


if __name__ == "__main__":
    main()
