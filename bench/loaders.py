"""How many images per second do the loaders give? Same images, same cores, taking turns.

    python -m bench.loaders [--images DIR] [--beton FILE] [--only NAME ...] [--memory-limit MB]

Training crops of 224 px as uint8; ours by the area filter where the name says nothing else (`dali`
has bilinear alone). Each contestant is a process of its own, and a round runs every contestant
once. Throughput is steady state: the first batches are dropped, epochs follow each other without a
pause. CPU time is that of all its processes, and images per second and core are those of a second
of it; memory their proportional set size (mapped files included), the largest of five samples;
start-up the time from the start of the interpreter to the first batch. What the others are times
stock FFCV comes with its 95% bootstrap interval. With a GPU, decoding there joins in. Writes
bench/results/loaders.json, .md and .png, or loaders_memory_limit with a limit.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench.common import ROOT, alternate, options, ratio, report, settings_of, spread
from bench.jpegs import make
from pipelines import BACK_ENDS, PlanSpec, draw_epoch, open_loader, open_store
from pipelines.back_ends import Filter
from pipelines.convert_images import convert_images
from pipelines.machine import usable_cores
from pipelines.planes import encode_planes
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.store import PLANES

SIZE = 224  # pixels a side
EPOCHS = 60  # more than a measurement takes
THREADS = usable_cores()
WARM_UP = 4  # batches after the first one
MEMORY_SAMPLES = 5
MEASURES = (
    "images/s",
    "CPU-ms per image",
    "images/s per core",
    "memory MB",
    "start-up s",
    "KB from disk per image",
)

HW_LOADS = ("0.65", "0.9", "0.99")  # of the GPU's JPEG decoder
DALI_GPU = "dali, GPU, hw "
BILINEAR = ", bilinear"  # behind one: Pillow's filter and pixels instead of the area filter
YARDSTICK = "stock FFCV"  # what the others are compared with
PLANES_OF = ", planes"  # behind a back end's name: the images as decoded planes

Batches = Iterator[int]  # rows of each batch


# ------------------------------------------------------------------ contestants


def names() -> list[str]:
    """The contestants of this machine."""
    found = list(BACK_ENDS)
    found += ["turbojpeg" + BILINEAR, "turbojpeg" + PLANES_OF, "turbojpeg" + BILINEAR + PLANES_OF]
    found += ["dali, folder", "torchvision", "stock FFCV", "stock DALI"]
    if torch.cuda.is_available():
        found += [DALI_GPU + load for load in HW_LOADS]
        found.append("stock DALI, GPU")
    return found


def batches_of(name: str, images: Path, beton: Path, batch: int) -> Batches:
    """What the contestant gives, without an end or for 60 epochs."""
    match name:
        case "dali, folder":
            return ours("dali", images, batch)
        case "torchvision":
            return torchvision_folder(images, batch)
        case "stock FFCV":
            return stock_ffcv(beton, batch)
        case "stock DALI":
            return stock_dali(images, batch)
        case "stock DALI, GPU":
            return stock_dali(images, batch, "mixed")
    if name.startswith(DALI_GPU):
        load = float(name.removeprefix(DALI_GPU))
        return ours("dali", beton, batch, "cuda", hw_decoder_load=load)
    source = planes_file(beton) if name.endswith(PLANES_OF) else beton
    name = name.removesuffix(PLANES_OF)
    back_end = name.removesuffix(BILINEAR)
    filter_ = BACK_ENDS[back_end].filters[0]
    if name != back_end:
        filter_ = "bilinear"
    return ours(back_end, source, batch, filter_=filter_)


def ours(
    name: str,
    source: Path,
    batch: int,
    device: str = "cpu",
    filter_: Filter = "bilinear",
    **options: float,
) -> Batches:
    """One of this project's pipelines on a `.beton` or a folder; `options` are the back end's."""
    store = open_store(source)
    # One plan for all epochs, so that there is no pause between them.
    heights = np.tile(store.heights, EPOCHS)
    widths = np.tile(store.widths, EPOCHS)
    spec = PlanSpec(0, SIZE, batch, clean_group_rows=batch, filter=filter_)
    plan = draw_epoch(spec, heights, widths, 0)
    plan = replace(plan, index=plan.index % len(store))
    loader = open_loader(name, store, size=SIZE, device=device, **options)
    for one in loader.load(plan):
        yield len(one.images)


def stock_ffcv(beton: Path, batch: int) -> Batches:
    """FFCV's Loader with its own decoder and augmentations."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor

    decoder = RandomResizedCropRGBImageDecoder((SIZE, SIZE))
    loader = Loader(
        str(beton),
        batch,
        THREADS,
        order=OrderOption.RANDOM,
        os_cache=True,
        indices=np.tile(np.arange(len(open_store(beton))), EPOCHS),
        pipelines={
            "image": [decoder, RandomHorizontalFlip(), ToTensor()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )
    for images, _ in loader:
        yield len(images)


def torchvision_folder(images: Path, batch: int) -> Batches:
    """ImageFolder + DataLoader, one worker per core."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    data = ImageFolder(str(images), steps)
    sampler = RandomSampler(data, num_samples=EPOCHS * len(data))
    for rows, _ in DataLoader(data, batch, sampler=sampler, num_workers=THREADS):
        yield len(rows)


def stock_dali(images: Path, batch: int, device: str = "cpu") -> Batches:
    """NVIDIA's ImageNet example: readers.file, image_random_crop, resize, flip."""
    from nvidia.dali import Pipeline, fn

    gpu = 0 if device == "mixed" else None
    with Pipeline(batch, THREADS, gpu, prefetch_queue_depth=3) as pipeline:
        jpegs, labels = fn.readers.file(file_root=str(images), random_shuffle=True)
        crops = fn.decoders.image_random_crop(jpegs, device=device)
        resized = fn.resize(crops, size=[SIZE, SIZE])
        pipeline.set_outputs(fn.flip(resized, horizontal=fn.random.coin_flip()), labels)
    pipeline.build()
    while True:
        yield len(torch.from_dlpack(pipeline.run()[0].as_tensor()))


def planes_file(beton: Path) -> Path:
    """Where the images of a `.beton` are as decoded planes."""
    return beton.with_suffix(".planes.beton")


def make_planes(beton: Path) -> None:
    """Write `planes_file` of it."""
    store = open_store(beton)
    with BetonWriter(planes_file(beton), len(store), planes=True) as writer:
        for index in tqdm(range(len(store)), desc="planes", unit="img"):
            data, height, width = encode_planes(store.read(index).tobytes())
            label = int(store.labels[index])
            writer.add(Sample(data, PLANES, height, width), label)
        writer.commit(store.classes, {})


# ------------------------------------------------------------------ measuring


def number(file: Path, key: str) -> int:
    """The number after `key` in a file of /proc."""
    return int(file.read_text().split(key)[1].split()[0])


def processes() -> list[Path]:
    """This process and all below it, as folders of /proc."""
    found = []
    waiting = [Path("/proc/self")]
    while waiting:
        process = waiting.pop()
        found.append(process)
        for task in process.glob("task/*/children"):
            waiting += [Path("/proc", pid) for pid in task.read_text().split()]
    return found


def ticks(process: Path) -> int:
    """Clock ticks of computing, user and system, of a process and of its ended children."""
    after_name = (process / "stat").read_text().rpartition(")")[2]
    return sum(int(text) for text in after_name.split()[11:15])


def counters() -> np.ndarray:
    """Wall seconds, CPU seconds and bytes from the disk of this process and all below it."""
    tree = processes()
    cpu_ticks = sum(ticks(process) for process in tree)
    disk_bytes = sum(number(process / "io", "read_bytes:") for process in tree)
    return np.array([time.perf_counter(), cpu_ticks / os.sysconf("SC_CLK_TCK"), disk_bytes])


def memory_mb() -> float:
    """Proportional set size of this process and all below it."""
    return sum(number(process / "smaps_rollup", "\nPss:") for process in processes()) / 1e3


def forget(path: Path, limit_bytes: float) -> None:
    """Keep no more than so much of the file in the page cache; never returns.

    After every `limit_bytes` from the disk its pages are dropped: no cgroup is needed.
    """
    file = os.open(path, os.O_RDONLY)
    dropped_at = -np.inf
    while True:
        read_bytes = counters()[2]
        if read_bytes - dropped_at > limit_bytes:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            dropped_at = read_bytes
        time.sleep(0.02)


def measure(batches: Batches, seconds: float, launched: float) -> list[float]:
    """MEASURES of one contestant in this process; see the module's docstring."""
    next(batches)
    startup_s = time.time() - launched
    for _ in range(WARM_UP):
        next(batches)
    images = 0
    begin = counters()
    while images == 0 or time.perf_counter() - begin[0] < seconds:
        images += next(batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall_s, cpu_s, disk_bytes = (counters() - begin).tolist()
    largest_mb = 0.0
    for _ in range(MEMORY_SAMPLES):
        next(batches)
        largest_mb = max(largest_mb, memory_mb())
    return [
        images / wall_s,
        1e3 * cpu_s / images,
        images / cpu_s,
        largest_mb,
        startup_s,
        disk_bytes / images / 1e3,
    ]


def beside_stock_ffcv(
    values: np.ndarray,  # (measures, rounds) of a contestant
    stock: np.ndarray | None,  # the same of YARDSTICK, if it took part
) -> dict[str, dict[str, float]]:
    """How many times as fast, by the clock and by the processor's time."""
    if stock is None:
        return {}
    clock = MEASURES.index("images/s")
    core = MEASURES.index("images/s per core")
    return {
        f"x {YARDSTICK}": ratio(values[clock], stock[clock]),
        f"x {YARDSTICK}, per core": ratio(values[core], stock[core]),
    }


# ------------------------------------------------------------------ the command


def parsed() -> argparse.Namespace:
    parser = options(__doc__, images=ROOT / "data" / "jpegs", rounds=5, seconds=8.0, batch=256)
    parser.add_argument(
        "--beton",
        type=Path,
        help="the images as .beton; default IMAGES.beton; what is missing is made",
    )
    parser.add_argument("--only", nargs="+", help="contestants")
    parser.add_argument(
        "--memory-limit", type=float, metavar="MB", help="page cache for the .beton; pread only"
    )
    parser.add_argument("--child", nargs=2, help="used by the bench itself")
    a = parser.parse_args()
    a.beton = a.beton or a.images.with_suffix(".beton")
    if a.child:
        return a
    if not a.images.exists():
        make(a.images)
    if not a.beton.exists():
        convert_images(a.images, a.beton)
    file_mb = a.beton.stat().st_size / 1e6
    if a.memory_limit and file_mb < a.memory_limit:
        parser.error(f"--memory-limit {a.memory_limit}: {a.beton} has {file_mb:.0f} MB")
    if not a.only:
        a.only = ["ffcv", "dali"] if a.memory_limit else names()
    for name in a.only:
        if name not in names():
            parser.error(f"--only {name!r}: must be of {', '.join(names())}")
    of_planes = any(name.endswith(PLANES_OF) for name in a.only)
    if of_planes and not planes_file(a.beton).exists():
        make_planes(a.beton)
    return a


def sizes_mb(beton: Path) -> dict[str, int]:
    """What the images take as JPEGs and as planes, for the report."""
    files = {"jpegs_mb": beton, "planes_mb": planes_file(beton)}
    there = {name: file for name, file in files.items() if file.exists()}
    return {name: round(file.stat().st_size / 1e6) for name, file in there.items()}


def be_child(a: argparse.Namespace) -> None:
    """Measure one contestant and print what was found; never returns."""
    name, launched = a.child
    if a.memory_limit:
        source = planes_file(a.beton) if name.endswith(PLANES_OF) else a.beton
        limit = (source, 1e6 * a.memory_limit)
        threading.Thread(target=forget, args=limit, daemon=True).start()
    batches = batches_of(name, a.images, a.beton, a.batch)
    print(json.dumps(measure(batches, a.seconds, float(launched))), flush=True)
    os._exit(0)  # some contestants never join their threads


def main() -> None:
    a = parsed()
    if a.child:
        be_child(a)
    failed: dict[str, str] = {}

    def in_child(name: str) -> list[float]:
        command = [sys.executable, "-m", "bench.loaders", *sys.argv[1:]]
        command += ["--child", name, str(time.time())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {found}", flush=True)
            return found
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        failed[name] = said[-1]
        print(f"{name}: {failed[name]}", flush=True)
        return [np.nan] * len(MEASURES)

    found = alternate(in_child, a.only, a.rounds, warm_up=0)
    results: list[dict[str, Any]] = []
    stock = None
    if YARDSTICK in a.only and YARDSTICK not in failed:
        stock = found[a.only.index(YARDSTICK)]
    for name, values in zip(a.only, found, strict=True):  # (measures, rounds)
        result: dict[str, Any] = {"loader": name}
        if name in failed:
            result["error"] = failed[name]
        else:
            for measured, rounds in zip(MEASURES, values, strict=True):
                result[measured] = spread(rounds)
            result |= beside_stock_ffcv(values, stock)
        results.append(result)
    file = a.out / ("loaders_memory_limit" if a.memory_limit else "loaders")
    print(*report(file, settings_of(a, **sizes_mb(a.beton)), results, MEASURES[:3]), sep="\n")


if __name__ == "__main__":
    main()
