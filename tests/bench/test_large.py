"""The bench of large sets: its files are whole, its figures are of every step."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from bench import large
from pipelines import open_store


def test_every_step_is_measured(tmp_path: Path) -> None:
    words = ["--samples", "2000", "--classes", "30", "--shards", "3", "--out", str(tmp_path)]
    assert large.main(words) == 0
    found = json.loads((tmp_path / "large_set.json").read_text())
    assert found["settings"] == {"samples": 2000, "classes": 30, "shards": 3}
    steps = {row.pop("step"): row for row in found["results"]}
    assert list(steps) == [
        "write tables and sidecar",
        "open",
        "identity",
        "description",
        "check of classes",
        "plan of an epoch",
        "share of a rank of 8",
        "targets of that rank",
        "plan of an evaluation",
        "open 3 shards",
        "identity of 3 shards",
    ]
    for row in steps.values():
        assert row.keys() == {"CPU seconds", "seconds", "peak MB", "arrays MB"}
        assert min(row.values()) >= 0
    # Labels and pointers of eight bytes each, and more.
    assert steps["open"]["arrays MB"] > 2000 * 16 / 1e6


def test_the_hollow_file_has_the_tables_of_a_full_one(tmp_path: Path, seed: int) -> None:
    numbers = large.random_numbers(500, 7)
    crc32 = [zlib.crc32(bytes(size)) for size in numbers.sizes.tolist()]  # of holes
    numbers = numbers._replace(crc32=np.array(crc32, np.uint32))
    large.write(tmp_path / "a.beton", numbers, tuple("abcdefg"))
    store = open_store(tmp_path / "a.beton")
    for name in ("heights", "widths", "sizes", "labels"):
        np.testing.assert_array_equal(getattr(store, name), getattr(numbers, name))
    assert store.classes == tuple("abcdefg")
    with pytest.raises(RuntimeError, match="sample 499: JPEG of None pixels"):  # zeros, intact
        store.read(499)
    used = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
    assert used < 1e6 < (tmp_path / "a.beton").stat().st_size
