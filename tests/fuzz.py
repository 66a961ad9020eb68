"""Damage one input, use it as a run would, and judge what happens. The worker of test_fuzz.py.

    python tests/fuzz.py --seed N               replay one input
    python tests/fuzz.py --seed N --count 250   work through many

It prints `start N`, then `ok N` and what happened, or `bad N` and why.

A seed is one input: a `.beton` (of two fields, of many, of planes), its sidecar, an image folder
(used directly, or converted), images in an archive, boxes of images, a checkpoint, a file of
weights or a config, or what is whole and hostile: false metadata, folders full of traps, odd
images, what is no file. What may happen: an error of a known type that names the file and the
sample; or the data, where every sample whose bytes are intact is delivered as ever, and a damaged
one never shows another sample's pixels. Where there are checksums, damage is always an error. Seeds
below zero test the tester: a crash, a hang, another sample's pixels.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.fuzzing.annotations import fuzz_annotations
from tests.fuzzing.archives import fuzz_archive
from tests.fuzzing.beton import exchange, fuzz_beton, fuzz_planes, fuzz_sidecar
from tests.fuzzing.checkpoints import fuzz_checkpoint, fuzz_metadata
from tests.fuzzing.configs import fuzz_config
from tests.fuzzing.folders import fuzz_convert, fuzz_folder, fuzz_tree
from tests.fuzzing.images import fuzz_images
from tests.fuzzing.no_file import fuzz_no_file
from tests.fuzzing.weights import fuzz_weights

GROWTH_MB = 400  # of one input, the first of which also loads what loaders need
# Memory beyond reason is an error, not a full machine; a pool of threads alone may reserve 2 GiB
# for stacks and arenas.
MORE_ADDRESSES = 4 << 30  # bytes
MOST_SAID = 300  # characters of what happened


def crash(rng: np.random.Generator, folder: Path) -> str:
    os.abort()


def hang(rng: np.random.Generator, folder: Path) -> str:
    while True:
        time.sleep(1)


# Seed k is an input of target k modulo their number.
TARGETS = [
    fuzz_beton,
    fuzz_beton,
    fuzz_beton,
    fuzz_beton,
    fuzz_beton,
    fuzz_planes,
    fuzz_sidecar,
    fuzz_folder,
    fuzz_convert,
    fuzz_checkpoint,
    fuzz_config,
    fuzz_metadata,
    fuzz_tree,
    fuzz_images,
    fuzz_no_file,
    fuzz_annotations,
    fuzz_archive,
    fuzz_archive,
    fuzz_weights,
]
SELF_TESTS = {-1: crash, -2: hang, -3: exchange}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument(
        "--hang", type=float, default=60, metavar="S", help="an input that takes longer is a hang"
    )
    args = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_ADDRESSES, used + MORE_ADDRESSES))

    wrong = 0
    for seed in range(args.seed, args.seed + args.count):
        print("start", seed, flush=True)
        faulthandler.dump_traceback_later(args.hang, exit=True)
        try:
            peak_mb = memory_peak_mb()
            what = one(seed)
            grown_mb = memory_peak_mb() - peak_mb
            assert grown_mb < GROWTH_MB, f"took {grown_mb:.0f} MB"
            line = what.replace("\n", " | ").encode("ascii", "replace").decode()
            print("ok", seed, line[:MOST_SAID], flush=True)
        except BaseException:
            wrong += 1
            print("bad", seed, repr(traceback.format_exc()), flush=True)
        faulthandler.cancel_dump_traceback_later()
    return int(wrong > 0)


def one(seed: int) -> str:
    """Work through one input; raises what is wrong."""
    target = SELF_TESTS[seed] if seed < 0 else TARGETS[seed % len(TARGETS)]
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        return f"{target.__name__} {target(np.random.default_rng(abs(seed)), folder)}"
    finally:
        shutil.rmtree(folder)


def memory_peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    sys.exit(main())
