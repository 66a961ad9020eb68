"""Does it work, as far as this GPU gets in the time there is? CIFAR-10, as many seeds as fit.

    python -m bench.gpu.study --seconds 600

Vanilla training, Fast AdvProp and the noise control. The seconds decide how many seeds run, never
which results are shown: a seed counts when all its arms are done. Several runs share the GPU, so
their seconds compare nothing; accuracies do. `--kit` names a folder of sheets (`bench.gpu.sheets`)
where nothing can be fetched. Writes OUT/study_gpu.json, .md and .png.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from bench.common import ROOT, options
from bench.gpu import sheets
from bench.study import Files, Size, convert, evaluated, train
from bench.study_report import report
from pipelines.back_ends import BACK_ENDS
from pipelines.convert import convert_arrays
from pipelines.sources import cifar10

SIZE = Size(
    arms=("vanilla", "fast_advprop", "noise"),
    seeds=20,
    model="cifar_resnet18",
    images=50_000,
    test=10_000,
    epochs=15,
    milestones=(8, 12, 14),
    clean_batch=256,
    workers=3,
    corrupt=(),
)
TOY = replace(
    SIZE,
    arms=("vanilla",),
    seeds=1,
    model="cifar_resnet8",
    images=128,
    test=64,
    epochs=1,
    milestones=(),
    clean_batch=64,
    workers=2,
    corrupt=("contrast",),
)
EVALUATION_SHARE = 0.25  # of the seconds, kept for evaluating what was trained
MARGIN = 1.1  # another run may take so many times the longest


@dataclass
class Clock:
    """How long a run takes, so that none is begun that would not end in time."""

    seconds: float  # for training
    begun: float = field(default_factory=time.monotonic)
    longest: float = 0.0  # run, in seconds

    def allows_another(self) -> bool:
        return time.monotonic() - self.begun + MARGIN * self.longest < self.seconds


def data(size: Size, kit: Path | None, runs: Path, toy: bool) -> Files:
    """CIFAR-10 as `.beton`: from a kit's sheets, else fetched into `data/`; a toy's is noise.

    A copy that lies under `data/` is used as it is.
    """
    runs.mkdir(parents=True, exist_ok=True)
    if not toy and kit is None:
        return {"train": convert("train", size.images), "test": convert("test", size.test)}
    files = {split: runs / f"{split}.beton" for split in ("train", "test")}
    for split, count in (("train", size.images), ("test", size.test)):
        if files[split].exists():
            continue
        if toy:
            rng = np.random.default_rng(count)
            images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            labels = np.arange(count) % len(cifar10.CLASSES)
            convert_arrays(files[split], images, labels, cifar10.CLASSES, "noise")
        else:
            assert kit is not None
            n_images = sheets.beton(kit, split, files[split])
            print(f"{n_images} {split} images from {kit}", flush=True)
    return files


def trained(
    size: Size, files: Files, runs: Path, pipeline: str, clock: Clock
) -> dict[tuple[str, int], Path]:
    """The folders of the runs that were done in time, by arm and seed.

    Of the first seed all arms, then of the next.
    """
    done: dict[tuple[str, int], Path] = {}

    def one(arm: str, seed: int) -> None:
        if not clock.allows_another():
            return
        begun = time.monotonic()
        try:
            done[arm, seed] = train(arm, seed, size, files, runs, pipeline)
        except SystemExit as error:  # one run's failure is no other's
            print(f"{arm}, seed {seed}: {error}", file=sys.stderr, flush=True)
        clock.longest = max(clock.longest, time.monotonic() - begun)

    jobs = []
    with ThreadPoolExecutor(size.workers) as pool:
        for seed in range(size.seeds):
            for arm in size.arms:
                jobs.append(pool.submit(one, arm, seed))
    for job in jobs:
        job.result()
    return done


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__, seconds=600.0, runs=ROOT / "runs" / "gpu_study")
    parser.add_argument(
        "--kit", type=Path, help="folder of CIFAR-10 in sheets, for a machine without a network"
    )
    parser.add_argument("--pipeline", choices=tuple(BACK_ENDS), default="ffcv")
    parser.add_argument(
        "--toy", action="store_true", help="noise instead of CIFAR-10, one short run per arm"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    a = parsed(argv)
    size = SIZE
    runs = a.runs
    if a.toy:
        size = TOY
        runs = a.out / "runs"
    if a.kit is not None:  # more sheets are another data set, whose runs are others
        runs = runs / f"sheets_{len(list(a.kit.glob('*.webp')))}"
    clock = Clock(a.seconds * (1 - EVALUATION_SHARE))
    files = data(size, a.kit, runs, a.toy)
    done = trained(size, files, runs, a.pipeline, clock)
    seeds = [seed for seed in range(size.seeds) if all((arm, seed) in done for arm in size.arms)]
    if not seeds:
        print(
            f"no seed had all its arms done in {a.seconds:.0f} s: {len(done)} runs were",
            file=sys.stderr,
        )
        return 1
    jobs = [(arm, seed) for arm in size.arms for seed in seeds]
    found = evaluated([done[job] for job in jobs], size, files, runs, a.pipeline)
    rows = {}
    for i, arm in enumerate(size.arms):
        rows[arm] = found[i * len(seeds) : (i + 1) * len(seeds)]
    shown = replace(size, seeds=len(seeds))
    print(report(rows, asdict(shown), a.out / "study_gpu"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
