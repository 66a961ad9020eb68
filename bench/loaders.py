"""Loaders against each other: same images, same cores, taking turns, each in a process of its own.

    python -m bench.loaders --out DIR

Training crops of 224 px as uint8. A round runs every contestant once. Throughput is steady state:
the first batches are dropped, epochs follow each other without a pause. CPU time is that of all its
processes; memory their proportional set size (mapped files included), the largest of five samples;
start-up the time from the start of the interpreter to the first batch. With a GPU, decoding there
joins in.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import ROOT, alternate, options, report, spread
from bench.jpegs import make
from pipelines import PlanSpec, draw_epoch, open_loader, open_store
from pipelines.convert import convert_folder
from pipelines.machine import usable_cores

SIZE, EPOCHS, HW_LOADS = 224, 60, (0.65, 0.9, 0.99)
MEASURES = ("images/s", "CPU-ms per image", "memory MB", "start-up s", "KB from disk per image")
THREADS = usable_cores()
Batches = Iterator[int]  # rows of each batch


def ours(name: str, source: Path, batch: int, device: str = "cpu", **options: float) -> Batches:
    """One of this project's pipelines on a `.beton` or a folder; `options` are the back end's."""
    store = open_store(source)
    heights, widths = (
        np.tile(sides, EPOCHS) for sides in (store.heights, store.widths)
    )  # no pause between epochs
    plan = draw_epoch(PlanSpec(0, SIZE, batch, clean_group_rows=batch), heights, widths, 0)
    loader = open_loader(name, store, size=SIZE, device=device, **options)
    yield from (
        len(batch.images) for batch in loader.load(replace(plan, index=plan.index % len(store)))
    )


def stock_ffcv(beton: Path, batch: int) -> Batches:
    """FFCV's Loader with its own decoder and augmentations."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor

    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor()]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor(), Squeeze()]}
    indices = np.tile(np.arange(len(open_store(beton))), EPOCHS)
    loader = Loader(
        str(beton),
        batch,
        THREADS,
        order=OrderOption.RANDOM,
        os_cache=True,
        indices=indices,
        pipelines=pipelines,
    )
    yield from (len(images) for images, _ in loader)


def torchvision_folder(images: Path, batch: int) -> Batches:
    """ImageFolder + DataLoader, one worker per core."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    data = ImageFolder(str(images), steps)
    sampler = RandomSampler(data, num_samples=EPOCHS * len(data))
    yield from (
        len(rows) for rows, _ in DataLoader(data, batch, sampler=sampler, num_workers=THREADS)
    )


def stock_dali(images: Path, batch: int, device: str = "cpu") -> Batches:
    """NVIDIA's ImageNet example: readers.file, image_random_crop, resize, flip."""
    from nvidia.dali import Pipeline, fn

    with Pipeline(
        batch, THREADS, 0 if device == "mixed" else None, prefetch_queue_depth=3
    ) as pipeline:
        jpegs, labels = fn.readers.file(file_root=str(images), random_shuffle=True)
        x = fn.resize(fn.decoders.image_random_crop(jpegs, device=device), size=[SIZE, SIZE])
        pipeline.set_outputs(fn.flip(x, horizontal=fn.random.coin_flip()), labels)
    pipeline.build()
    while True:
        yield len(torch.from_dlpack(pipeline.run()[0].as_tensor()))


def number(file: Path, key: str) -> int:
    """The number after `key` in a file of /proc."""
    return int(file.read_text().split(key)[1].split()[0])


def counters(memory: bool = False) -> np.ndarray:
    """Wall seconds, CPU seconds and bytes from the disk of this process and all below it; with
    `memory` also its kB.
    """
    proc = [Path("/proc/self")]
    for process in proc:  # grows while it is read
        for task in process.glob("task/*/children"):
            proc += [Path("/proc", pid) for pid in task.read_text().split()]
    ticks = sum(
        int(t) for p in proc for t in (p / "stat").read_text().rpartition(")")[2].split()[11:15]
    )
    disk = sum(number(p / "io", "read_bytes:") for p in proc)
    shares = [number(p / "smaps_rollup", "\nPss:") for p in proc] if memory else []
    return np.array([time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), disk, sum(shares)])


def forget(path: Path, limit_bytes: float) -> None:
    """Never more of the file is cached: after every `limit_bytes` from the disk, drop its pages (no
    cgroup needed).
    """
    file, done = os.open(path, os.O_RDONLY), -np.inf
    while True:
        if (read := counters()[2]) - done > limit_bytes:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            done = read
        time.sleep(0.02)


def measure(batches: Batches, seconds: float, launched: float) -> list[float]:
    """MEASURES of one contestant in this process; see the module's docstring."""
    next(batches)
    startup = time.time() - launched
    for _ in range(4):
        next(batches)
    images, begin = 0, counters()
    while images == 0 or time.perf_counter() - begin[0] < seconds:
        images += next(batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu, disk, _ = (counters() - begin).tolist()
    memory = max((next(batches), counters(memory=True)[3] / 1e3)[1] for _ in range(5))
    return [images / wall, 1e3 * cpu / images, memory, startup, disk / images / 1e3]


def main() -> None:
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
    every: dict[str, Any] = {
        name: partial(ours, name, a.beton, a.batch) for name in ("ffcv", "dali", "reference")
    }
    every["dali, folder"] = partial(ours, "dali", a.images, a.batch)
    every["torchvision"] = partial(torchvision_folder, a.images, a.batch)
    every["stock FFCV"] = partial(stock_ffcv, a.beton, a.batch)
    every["stock DALI"] = partial(stock_dali, a.images, a.batch)
    if torch.cuda.is_available():
        every |= {
            f"dali, GPU, hw {load}": partial(
                ours, "dali", a.beton, a.batch, "cuda", hw_decoder_load=load
            )
            for load in HW_LOADS
        }
        every["stock DALI, GPU"] = partial(stock_dali, a.images, a.batch, "mixed")
    if a.child:
        if a.memory_limit:
            threading.Thread(
                target=forget, args=(a.beton, 1e6 * a.memory_limit), daemon=True
            ).start()
        name, launched = a.child
        print(json.dumps(measure(every[name](), a.seconds, float(launched))), flush=True)
        os._exit(0)  # some contestants never join their threads
    a.images.exists() or make(a.images)
    a.beton.exists() or convert_folder(a.images, a.beton)
    if a.memory_limit and a.beton.stat().st_size < 1e6 * a.memory_limit:
        parser.error(
            f"--memory-limit {a.memory_limit}: {a.beton} has {a.beton.stat().st_size / 1e6:.0f} MB"
        )
    failed: dict[str, str] = {}

    def in_child(name: str) -> list[float]:
        command = [
            sys.executable,
            "-m",
            "bench.loaders",
            *sys.argv[1:],
            "--child",
            name,
            str(time.time()),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            failed[name] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[
                -1
            ]
        found = (
            [np.nan] * len(MEASURES)
            if done.returncode
            else json.loads(done.stdout.splitlines()[-1])
        )
        print(f"{name}: {failed.get(name, found)}", flush=True)
        return found

    a.only = a.only or (["ffcv", "dali"] if a.memory_limit else list(every))
    if unknown := [name for name in a.only if name not in every]:
        parser.error(f"--only {unknown[0]!r}: must be of {', '.join(every)}")
    found = alternate([partial(in_child, name) for name in a.only], a.rounds, warm_up=0)
    results: list[dict[str, Any]] = [
        {
            "loader": name,
            **(
                {"error": failed[name]}
                if name in failed
                else dict(zip(MEASURES, map(spread, r), strict=True))
            ),
        }
        for name, r in zip(a.only, found, strict=True)
    ]
    print(
        *report("loaders_memory_limit" if a.memory_limit else "loaders", a, results, MEASURES[:2]),
        sep="\n",
    )


if __name__ == "__main__":
    main()
