"""What does a data set of ImageNet-21k's size cost before the first step? Seconds and memory.

    python -m bench.large                               # 14,197,122 images, 21,841 classes
    python -m bench.large --samples 1281167 --classes 1000 --shards 10

The files are the writer's own, tables, class names and checksums, but their pixels are holes: a
sparse file of 1.5 TB takes 0.8 GB of the disk. Nothing is decoded. Each step is done once, in the
order of a run's start, in one process: seconds of the processor, seconds passed, the most memory it
took beyond what was in use before, and what its result holds in arrays. The sum of the arrays is
what a run of this size cannot do without.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import pipelines
from bench.common import options, report, settings_of
from fap.config import load_config
from fap.run.epoch import plan_spec
from fap.tasks import make_task
from fap.tasks.base import Task
from pipelines.sources.beton_writer import BetonWriter
from pipelines.store import JPG

MEGABYTE = 1e6
RANKS = 8
CLEAN_ROWS = 512  # of a step over all ranks: a group of 64 for each
MEAN_BYTES = 110_000  # of an image, as ImageNet's
SIDES = (200, 900)  # pixels, as most of ImageNet's


class Numbers(NamedTuple):
    """What the tables say of N images."""

    heights: np.ndarray  # (N,) pixels
    widths: np.ndarray  # (N,) pixels
    sizes: np.ndarray  # (N,) bytes
    labels: np.ndarray  # (N,)
    crc32: np.ndarray  # (N,)

    def part(self, rows: slice) -> "Numbers":
        return Numbers(*(values[rows] for values in self))


class HollowWriter(BetonWriter):
    """Writes tables and sidecar as ever, and holes where the images would lie."""

    def add_all(self, numbers: Numbers) -> None:
        n = len(numbers.labels)
        first = self._file.tell()
        ptrs = first + np.cumsum(numbers.sizes) - numbers.sizes
        image = self._rows["0"]
        image["mode"][:n] = JPG
        image["height"][:n] = numbers.heights
        image["width"][:n] = numbers.widths
        image["data_ptr"][:n] = ptrs
        self._rows["1"][:n] = numbers.labels
        self._ptrs[:n] = ptrs
        self._sizes[:n] = numbers.sizes
        self._crc32[:n] = numbers.crc32
        self.count = n
        self._file.seek(int(ptrs[-1] + numbers.sizes[-1]))


def random_numbers(n_samples: int, n_classes: int) -> Numbers:
    """Sorted by class, as class folders give them."""
    rng = np.random.default_rng(0)
    return Numbers(
        heights=rng.integers(*SIDES, n_samples, dtype=np.uint16),
        widths=rng.integers(*SIDES, n_samples, dtype=np.uint16),
        sizes=rng.integers(MEAN_BYTES // 2, MEAN_BYTES * 3 // 2, n_samples),
        labels=np.sort(rng.integers(n_classes, size=n_samples)),
        crc32=rng.integers(1 << 32, size=n_samples, dtype=np.uint32),
    )


def write(file: Path, numbers: Numbers, classes: tuple[str, ...]) -> None:
    with HollowWriter(file, len(numbers.labels)) as writer:
        writer.add_all(numbers)
        writer.commit(classes, {"quality": None, "skipped": []})


# ------------------------------------------------------------------ measuring


def peak_bytes() -> int:
    """Most memory of this process since the last `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def forget_peak() -> int:
    """The memory in use now, from which the next peak counts."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def array_bytes(value: Any) -> int:
    """Bytes of the arrays in a store, a plan or an array; what several are views of, once."""
    owners = {}
    for array in arrays_in(value):
        while isinstance(array.base, np.ndarray):
            array = array.base
        owners[id(array)] = array.nbytes
    return sum(owners.values())


def arrays_in(value: Any) -> Iterator[np.ndarray]:
    match value:
        case np.ndarray():
            yield value
        case torch.Tensor():
            yield value.numpy()
        case list():
            for each in value:
                yield from arrays_in(each)
        case pipelines.Store() | pipelines.EpochPlan():
            yield from arrays_in(list(vars(value).values()))


def measured(name: str, do: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """One row of the table, and what the step gave."""
    before = forget_peak()
    start = time.perf_counter()
    start_cpu = time.process_time()
    value = do()
    row = {
        "step": name,
        "CPU seconds": time.process_time() - start_cpu,
        "seconds": time.perf_counter() - start,
        "peak MB": (peak_bytes() - before) / MEGABYTE,
        "arrays MB": array_bytes(value) / MEGABYTE,
    }
    print({name: round(x, 2) if isinstance(x, float) else x for name, x in row.items()}, flush=True)
    return row, value


def steps(folder: Path, numbers: Numbers, n_classes: int, n_shards: int) -> Iterator[dict]:
    classes = tuple(f"n{i:08d}" for i in range(n_classes))
    config = load_config(
        None, [f"model.num_classes={n_classes}", f"optim.clean_batch={CLEAN_ROWS}"]
    )
    task = make_task(config)
    spec = plan_spec(config)
    file = folder / "whole.beton"

    yield measured("write tables and sidecar", lambda: write(file, numbers, classes))[0]
    row, store = measured("open", lambda: pipelines.open_store(file))
    yield row
    yield measured("identity", store.identity)[0]
    yield measured("description", store.describe)[0]
    yield measured("check of classes", store.check_classes)[0]
    yield from of_an_epoch(spec, task, store)
    yield measured(
        "plan of an evaluation",
        lambda: pipelines.eval_plan(store.heights, store.widths, size=224, resize=256, batch=256),
    )[0]
    store.close()
    del store
    bounds = np.linspace(0, len(numbers.labels), n_shards + 1, dtype=int).tolist()
    for i in range(n_shards):
        part_file = folder / f"part-{i:05}-of-{n_shards:05}.beton"
        write(part_file, numbers.part(slice(bounds[i], bounds[i + 1])), classes)
    pattern = folder / "part-*.beton"
    row, store = measured(f"open {n_shards} shards", lambda: pipelines.open_store(pattern))
    yield row
    yield measured(f"identity of {n_shards} shards", store.identity)[0]


def of_an_epoch(spec: pipelines.PlanSpec, task: Task, store: pipelines.Store) -> Iterator[dict]:
    row, plan = measured(
        "plan of an epoch", lambda: pipelines.draw_epoch(spec, store.heights, store.widths, 0)
    )
    yield row
    row, part = measured(f"share of a rank of {RANKS}", lambda: plan.for_rank(0, RANKS))
    yield row
    yield measured("targets of that rank", lambda: task.targets(store, part))[0]


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, samples=14_197_122, classes=21_841, shards=100)
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    a = parser.parse_args(argv)
    numbers = random_numbers(a.samples, a.classes)
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        rows = list(steps(Path(folder), numbers, a.classes, a.shards))
    lines = report(a.out / "large_set", settings_of(a), rows, bars=[])
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
