"""The study of `bench.evidence` on a GPU, as far as this one gets in the time there is.

    python -m bench.gpu.study --seconds 600

Vanilla training, Fast AdvProp and the noise control on CIFAR-10, as many seeds as fit. Several runs
share the GPU, so their seconds compare nothing; accuracies do. `--kit` names a folder of sheets
(`bench.gpu.sheets`) where nothing can be fetched. Writes OUT/study_gpu.json, .md and .png.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.cifar import Files, convert
from bench.common import ROOT, options
from bench.evidence.arms import BASE
from bench.evidence.conduct import conduct
from bench.evidence.cost import costs
from bench.evidence.measure import Measure
from bench.evidence.numbers import Rows
from bench.evidence.report import write
from bench.evidence.runs import Runs
from bench.evidence.studies import FULL, Part, Regime, Study
from bench.gpu import sheets
from pipelines import open_store
from pipelines.back_ends import BACK_ENDS
from pipelines.convert import convert_arrays
from pipelines.sources import cifar10

STUDY = replace(FULL, corrupt=())  # fap-eval's few: corruptions are computed on CPU cores
TOY = Study(
    parts={
        "headline": Part(
            "Does it run?", (Regime(images=128, epochs=1, group_rows=64),), (BASE,), seeds=1
        )
    },
    test=64,
    corrupted=64,
    attacked=8,
    strongly_attacked=0,
    workers=2,
    corrupt=("contrast",),
)


def data(study: Study, kit: Path | None, folder: Path, toy: bool) -> Files:
    """CIFAR-10 as `.beton`: from a kit's sheets, else fetched into `data/`; a toy's is noise.

    What lies in `folder` is used as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"train": study.sizes()[0], "test": study.test}
    if not toy and kit is None:
        return {split: convert(split, count) for split, count in counts.items()}
    files = {split: folder / f"{split}.beton" for split in counts}
    for split, count in counts.items():
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


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__, seconds=600.0, runs=ROOT / "runs" / "gpu_study")
    parser.add_argument(
        "--kit", type=Path, help="folder of CIFAR-10 in sheets, for a machine without a network"
    )
    parser.add_argument("--pipeline", choices=tuple(BACK_ENDS), default="memory")
    parser.add_argument(
        "--toy", action="store_true", help="noise instead of CIFAR-10, one short run"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    a = parsed(argv)
    study = STUDY
    folder = a.runs
    if a.toy:
        study = TOY
        folder = a.out / "runs"
    if a.kit is not None:  # more sheets are another data set, whose runs are others
        folder = folder / f"sheets_{len(list(a.kit.glob('*.webp')))}"
    files = data(study, a.kit, folder, a.toy)
    with closing(open_store(files["train"])) as store:
        study = study.with_images(len(store))
    train = dict.fromkeys(study.sizes(), files["train"])
    runs = Runs(folder, train, files["test"], a.pipeline, study.side_by_side)
    measure = Measure(runs, study, files["test"], folder / "eval")
    assert study.methods is not None
    found_costs = costs(runs, study.methods, folder / "costs.json")
    rows = conduct(study, runs, measure, a.seconds, known=[])
    print(write(Rows(rows), study, a.out / "study_gpu", found_costs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
