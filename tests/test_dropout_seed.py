"""The seeds of a model's own random layers: `fap.draws.dropout_seed`."""

import os
import subprocess
import sys

import numpy as np
import pytest

from fap.draws import dropout_seed


def test_dropout_seeds_are_fixed_numbers() -> None:
    """Frozen: a resumed run repeats a step's dropout, in any process and on any machine."""
    assert dropout_seed(0, 0, 0) == 2635072618980576772
    assert dropout_seed(3, 1000, 2) == 10045376428444654063


def test_dropout_seeds_differ_in_each_argument_and_spread_their_bits() -> None:
    runs = [
        (seed, step, rank)
        for seed in (0, 1, 2**32, 2**40)
        for step in range(500)
        for rank in range(4)
    ]
    seeds = [dropout_seed(*run) for run in runs]
    assert len(set(seeds)) == len(seeds)
    low = [seed % 2**32 for seed in seeds]  # all that the CPU's generator takes
    assert len(low) - len(set(low)) <= 2  # of 8,000 draws out of 2**32 even one pair is rare

    bits = np.array([[seed >> i & 1 for i in range(64)] for seed in seeds])
    assert abs(bits.mean(0) - 0.5).max() < 0.04  # 7 standard deviations
    # From one step to the next, of the first seed: its four ranks lie between.
    flips = (bits[4:2000] != bits[:1996]).mean(0)
    assert abs(flips - 0.5).max() < 0.08


@pytest.mark.slow
def test_dropout_seeds_are_those_of_any_process() -> None:
    code = (
        "from fap.draws import dropout_seed; "
        "print(dropout_seed(3, 1000, 2), dropout_seed(2**40, 7, 0))"
    )
    said = set()
    for hash_seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        said.add(done.stdout)
    assert said == {f"{dropout_seed(3, 1000, 2)} {dropout_seed(2**40, 7, 0)}\n"}
