"""CIFAR-10 as `.beton` files under `data/`, each made once.

A library of the demo and of the study.
"""

from pathlib import Path

from bench.commands import fap
from bench.common import ROOT

Files = dict[str, Path]  # the `.beton` of train and test


def convert(split: str, count: int, log: Path | None = None) -> Path:
    """The first `count` images of CIFAR-10's `split`, train or test.

    What fap-convert says goes to `log`, if given.
    """
    file = ROOT / "data" / f"cifar10_{split}_{count}.beton"
    if not file.exists():
        fap("convert", "cifar10", str(file), "--split", split, "--limit", str(count), log=log)
    return file
