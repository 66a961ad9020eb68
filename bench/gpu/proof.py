"""Does the kit give the same files and images as the normal environment?

    python -m bench.gpu.proof make DIR          # in the normal environment
    python -m bench.gpu.proof check DIR         # in the bare one, with the kit
    python -m bench.gpu.proof suite RUN1_TGZ

The checks of prove_kit.sh. `make` writes photo-like JPEGs, the `.beton` of them and the images of
its ffcv loader. `check` compares with what this environment makes of the same JPEGs. `suite` looks
at what a dry run of the suite gave. Exit status 1 if something is wrong.
"""

import argparse
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fap.cli.convert import main as fap_convert
from pipelines import PlanSpec, draw_epoch, open_loader, open_store

COUNT = 48
SIZE = 96  # pixels; the larger sources are halved by the decoder, the smaller ones enlarged
# Grey levels between back ends, as in tests/pipelines/test_loaders.py.
CLOSE_MEAN = 2
CLOSE_P99 = 12


def write_jpegs(folder: Path) -> None:
    """Smooth colours with some texture, 80 to 420 pixels a side, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        height, width = rng.integers(80, 420, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (height // 24, width // 24, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        pixels = (smooth + rng.normal(0, 2, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = folder / f"class{number % 2}" / f"{number:02d}.jpeg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, quality=90)


def images(back_end: Any, beton: Path) -> np.ndarray:
    """One epoch of random crops, uint8 (N, 96, 96, 3); the same plan everywhere."""
    store = open_store(beton)
    spec = PlanSpec(
        size=SIZE, clean_rows=8, adv_rows=4, clean_group_rows=4, adv_group_rows=2, seed=1
    )
    plan = draw_epoch(spec, store.heights, store.widths, 0)
    loader = open_loader(back_end, store, size=SIZE)
    batches = []
    try:
        for batch in loader.load(plan):  # valid until the next is asked for, hence the copy
            batches.append(batch.images.permute(0, 2, 3, 1).numpy().copy())
    finally:
        loader.close()
    return np.concatenate(batches)


def make(folder: Path) -> bool:
    write_jpegs(folder / "jpegs")
    if fap_convert([str(folder / "jpegs"), str(folder / "normal.beton")]):
        return say(False, "fap-convert works")
    np.save(folder / "normal.npy", images("ffcv", folder / "normal.beton"))
    return True


def check(folder: Path) -> bool:
    beton = folder / "kit.beton"
    if not (folder / "jpegs").exists():
        write_jpegs(folder / "jpegs")
    if fap_convert([str(folder / "jpegs"), str(beton)]) or fap_convert(["--check", str(beton)]):
        return say(False, "fap-convert works")
    ours = images("ffcv", beton)
    distance = np.abs(ours.astype(int) - images("reference", beton))
    mean = distance.mean()
    p99 = np.quantile(distance, 0.99)
    good = say(
        bool(mean <= CLOSE_MEAN and p99 <= CLOSE_P99),
        f"ffcv loader beside the reference: mean {mean:.3f}, 99% {p99:.0f} grey levels",
    )
    if not (folder / "normal.npy").exists():
        print("no normal environment to compare with")
        return good
    same = beton.read_bytes() == (folder / "normal.beton").read_bytes()
    good &= say(same, "the .beton has the same bytes as the normal environment's")
    normal = np.load(folder / "normal.npy")
    differ = ours.size
    if ours.shape == normal.shape:
        differ = int((ours != normal).sum())
    text = f"ffcv loader: {differ} of {ours.size:,} values differ from the normal environment's"
    return say(not differ, text) and good


def check_suite(archive: Path) -> bool:
    """Every cell was measured, but for those that need what the kit does not bring."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("./suite.json")
        assert member is not None
        found = json.load(member)
    good = say(not found["not_reached"], f"cells that were not reached: {found['not_reached']}")
    for cell in found["cells"]:
        why = cell.get("why", "")
        absent = cell["state"] == "not measured" and why.endswith("is not installed")
        if cell["state"] != "measured":
            good &= say(absent, f"{cell['cell']}: {cell['state']}: {why}")
    return good


def say(good: bool, text: str) -> bool:
    print("ok    " if good else "FAILED", text)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "check", "suite"))
    parser.add_argument("path", type=Path)
    a = parser.parse_args()
    match a.what:
        case "make":
            good = make(a.path)
        case "check":
            good = check(a.path)
        case _:
            good = check_suite(a.path)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
