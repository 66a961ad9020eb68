"""Loaders against each other: same images, same cores, alternating rounds, each in a process of its own.

    python -m bench.loaders --out DIR

Training crops of 224 px as uint8. A round runs every contestant once, every second round in reverse order. Throughput
is steady state: the first batches are dropped, epochs follow each other without a pause. CPU time is that of all its
processes; memory their proportional set size (mapped files included), the largest of five samples; start-up the time
from the start of the interpreter to the first batch. With a GPU, decoding there joins in.
"""

import argparse
import json
import math
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

from bench.common import ROOT, spread, write_json
from bench.jpegs import make
from pipelines import PlanSpec, draw_epoch, open_loader, open_store
from pipelines.convert import convert_folder

SIZE, BATCH, EPOCHS, HW_LOADS = 224, 256, 60, (0.65, 0.9, 0.99)
MEASURES = ("images/s", "CPU-ms per image", "memory MB", "start-up s", "KB from disk per image")
Batches = Iterator[int]  # rows of each batch


def ours(name: Any, source: Path, device: str = "cpu", hw_decoder_load: float = 0.65, *, threads: int) -> Batches:
    """One of this project's pipelines on a `.beton` or a folder."""
    store = open_store(source)
    plans = [draw_epoch(PlanSpec(0, SIZE, BATCH), store.heights, store.widths, e) for e in range(EPOCHS)]
    index, window, flip = (np.concatenate([getattr(p, f) for p in plans]) for f in ("index", "window", "flip"))
    plan = replace(plans[0], index=index, window=window, flip=flip)  # all epochs in one: no pause between them
    loader = open_loader(name, store, size=SIZE, device=device, threads=threads, hw_decoder_load=hw_decoder_load)
    yield from (len(batch.images) for batch in loader.load(plan))


def stock_ffcv(beton: Path, *, threads: int) -> Batches:
    """FFCV's Loader with its own decoder and augmentations."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor

    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor()]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor(), Squeeze()]}
    indices = np.tile(np.arange(len(open_store(beton))), EPOCHS)
    options = {"order": OrderOption.RANDOM, "os_cache": True, "indices": indices, "pipelines": pipelines}
    yield from (len(images) for images, _ in Loader(str(beton), BATCH, threads, **options))


def torchvision_folder(images: Path, *, threads: int) -> Batches:
    """ImageFolder + DataLoader, one worker per core."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    data = ImageFolder(str(images), steps)
    sampler = RandomSampler(data, num_samples=EPOCHS * len(data))
    yield from (len(batch) for batch, _ in DataLoader(data, BATCH, sampler=sampler, num_workers=threads))


def stock_dali(images: Path, device: str = "cpu", *, threads: int) -> Batches:
    """NVIDIA's ImageNet example: readers.file, image_random_crop, resize, flip."""
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(BATCH, threads, 0 if device == "mixed" else None, prefetch_queue_depth=3)
    with pipeline:
        jpegs, labels = fn.readers.file(file_root=str(images), random_shuffle=True)
        x = fn.resize(fn.decoders.image_random_crop(jpegs, device=device), size=[SIZE, SIZE])
        x = fn.flip(x, horizontal=fn.random.coin_flip())
        pipeline.set_outputs(x, labels)
    pipeline.build()
    while True:
        yield len(torch.from_dlpack(pipeline.run()[0].as_tensor()))


def contestants(beton: Path, images: Path) -> dict[str, Any]:
    """Every contestant; those on a GPU if there is one."""
    every: dict[str, Any] = {
        "ffcv": partial(ours, "ffcv", beton),
        "dali": partial(ours, "dali", beton),
        "dali, folder": partial(ours, "dali", images),
        "reference": partial(ours, "reference", beton),
        "stock FFCV": partial(stock_ffcv, beton),
        "stock DALI": partial(stock_dali, images),
        "torchvision": partial(torchvision_folder, images),
    }
    if torch.cuda.is_available():
        every |= {f"dali, GPU, hw {load}": partial(ours, "dali", beton, "cuda", load) for load in HW_LOADS}
        every["stock DALI, GPU"] = partial(stock_dali, images, "mixed")
    return every


def family() -> list[int]:
    """This process and all below it."""
    found = [os.getpid()]
    for pid in found:  # grows while it is read
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def counters() -> np.ndarray:
    """Wall seconds, CPU seconds and bytes that the family made the disk read; ended children count with parents."""
    proc = [Path(f"/proc/{pid}") for pid in family()]
    ticks = sum(int(t) for p in proc for t in (p / "stat").read_text().rpartition(")")[2].split()[11:15])
    disk = sum(int((p / "io").read_text().split("read_bytes: ")[1].split()[0]) for p in proc)
    return np.array([time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), disk])


def memory_mb() -> float:
    """Proportional set size of the family."""
    maps = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in family()]
    return sum(int(text.split("\nPss:")[1].split()[0]) for text in maps) / 1e3


def forget(path: Path, limit_bytes: float) -> None:
    """Never more of the file is cached: after every `limit_bytes` from the disk, drop its pages (no cgroup needed)."""
    done = -math.inf
    while True:
        if counters()[2] - done > limit_bytes:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            done = counters()[2]
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
    wall, cpu, disk = (counters() - begin).tolist()
    memory = max((next(batches), memory_mb())[1] for _ in range(5))
    return [images / wall, 1e3 * cpu / images, memory, startup, disk / images / 1e3]


def in_child(name: str) -> list[float] | str:
    """MEASURES from a process of its own, or why there are none."""
    command = [sys.executable, "-m", "bench.loaders", *sys.argv[1:], "--child", name, "--launched", str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    """Markdown: medians, the range of the throughput, what could not run."""
    lines = [f"| loader | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 1) + "|"]
    for name, r in results.items():
        cells = ["not measured: " + r] if isinstance(r, str) else []
        cells = cells or [f"{r[m]['median']:.4g} ({r[m]['min']:.4g}-{r[m]['max']:.4g})" for m in MEASURES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of throughput and of CPU time, medians with ranges."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, name in zip(axes, MEASURES, strict=False):
        rows = {loader: r[name] for loader, r in results.items() if not isinstance(r, str)}
        median, low, high = np.array([[r["median"], r["min"], r["max"]] for r in rows.values()]).T
        axis.barh(list(rows), median, xerr=[median - low, high - median])
        axis.set_xlabel(f"{name}, {SIZE} px training crops")
    axes[0].invert_yaxis()
    plt.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--images", type=Path, default=ROOT / "data" / "jpegs", help="made if missing")
    parser.add_argument("--beton", type=Path, help="the same images; IMAGES.beton, made if missing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of measurement per contestant and round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", help="contestants")
    parser.add_argument("--memory-limit", type=float, metavar="MB", help="page cache for the .beton; pread only")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--launched", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.beton = args.beton or args.images.with_suffix(".beton")
    every = contestants(args.beton, args.images)
    if args.child:
        if args.memory_limit:
            threading.Thread(target=forget, args=(args.beton, 1e6 * args.memory_limit), daemon=True).start()
        print(json.dumps(measure(every[args.child](threads=args.threads), args.seconds, args.launched)), flush=True)
        os._exit(0)  # some contestants never join their threads
    args.images.exists() or make(args.images)
    args.beton.exists() or convert_folder(args.images, args.beton)
    if args.memory_limit and args.beton.stat().st_size < 1e6 * args.memory_limit:
        parser.error(f"--memory-limit {args.memory_limit}: {args.beton} has {args.beton.stat().st_size / 1e6:.0f} MB")
    names = args.only or (["ffcv", "dali"] if args.memory_limit else list(every))
    rounds: dict[str, list[Any]] = {name: [] for name in names}
    for r in range(args.rounds):
        for name in names[:: -1 if r % 2 else 1]:
            rounds[name].append(in_child(name))
            print(f"round {r + 1}, {name}: {rounds[name][-1]}", flush=True)
    results: dict[str, Any] = {name: runs[-1] for name, runs in rounds.items()}  # a failure's message
    for name, runs in rounds.items():
        if good := np.array([run for run in runs if not isinstance(run, str)]).T.tolist():
            results[name] = dict(zip(MEASURES, map(spread, good), strict=True))
    stem = args.out / ("loaders_memory_limit" if args.memory_limit else "loaders")
    settings = {"batch": BATCH, "size": SIZE, "threads": args.threads, "memory_limit_mb": args.memory_limit}
    write_json(stem.with_suffix(".json"), {"settings": settings, "results": results})
    stem.with_suffix(".md").write_text(table(results))
    plot(results, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
