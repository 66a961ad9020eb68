"""Conversion of an image folder: ours (bytes kept, every image checked) against FFCV's DatasetWriter (quality 90).

`python -m bench.convert [--count 2000] [--repeats 5]` times both in alternation on the same JPEGs (bench/jpegs.py)
and cores, files in the page cache, ours including its fsync. Writes bench/results/convert.json. Target: 2x, goal 3x.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.common import ROOT, spread, write_json
from bench.jpegs import make


def stock(src: Path, dst: Path, workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    DatasetWriter(str(dst), fields, num_workers=workers).from_indexed_dataset(ImageFolder(str(src)))


def ours(src: Path, dst: Path, workers: int) -> None:
    from pipelines.convert import convert_folder

    convert_folder(src, dst, threads=workers)


def reencoding(src: Path, dst: Path, workers: int) -> None:
    from pipelines.convert import Encoding, convert_folder

    convert_folder(src, dst, Encoding(quality=90), threads=workers)


WAYS: dict[str, Callable[[Path, Path, int], None]] = {
    "ours": ours,
    "ours, --quality 90": reencoding,
    "FFCV DatasetWriter": stock,
}


def main() -> None:
    parser = argparse.ArgumentParser("bench.convert", description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    a = parser.parse_args()
    workers = len(os.sched_getaffinity(0))
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=ROOT / "data", prefix="bench-") as folder:
        src, dst = make(Path(folder) / "jpegs", a.count), Path(folder) / "out.beton"
        encoded = sum(path.stat().st_size for path in src.rglob("*.JPEG"))
        for repeat in range(a.repeats + 1):  # the first round is warm-up: imports, page cache
            for name, way in WAYS.items():
                start = time.perf_counter()
                way(src, dst, workers)
                seconds = time.perf_counter() - start
                sizes[name] = dst.stat().st_size
                for path in (dst, Path(f"{dst}.json")):
                    path.unlink(missing_ok=True)
                if repeat:
                    rates[name].append(a.count / seconds)
    ratios = [x / y for x, y in zip(rates["ours"], rates["FFCV DatasetWriter"], strict=True)]
    results = {
        "images": a.count,
        "mean_bytes": round(encoded / a.count),
        "workers": workers,
        "load_average_after": os.getloadavg()[0],  # above the cores: others were using them too
        "images_per_second": {name: spread(values) for name, values in rates.items()},
        "file_bytes": sizes,
        "ours_over_ffcv": spread(ratios),
    }
    write_json(a.out / "convert.json", results)
    for name, values in rates.items():
        s = spread(values)
        print(f"{name:20s} {s['median']:7.0f} img/s  [{s['min']:.0f}, {s['max']:.0f}]  n = {s['n']}")
    r = spread(ratios)
    print(f"ours / FFCV: {r['median']:.2f} [{r['min']:.2f}, {r['max']:.2f}] on {workers} cores")


if __name__ == "__main__":
    main()
