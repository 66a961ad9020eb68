"""`.beton` files: FFCV's own, ours, and damaged ones, which must be errors and never crashes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from pipelines import open_store
from pipelines.jpeg import jpeg_sides
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_layout import ALLOCATION, FIELD, HEADER
from pipelines.store import DamagedData
from tests.conftest import as_jpeg
from tests.pipelines.samples import contents, flip_bit, small_beton

TABLES = HEADER.itemsize + 2 * FIELD.itemsize  # where the metadata begin
ROW_BYTES = 24  # of the metadata, and of the allocation table: the last eight are label and length
N_SAMPLES = 6


@pytest.fixture
def small(tmp_path: Path, photos: list[np.ndarray]) -> Path:
    return small_beton(tmp_path / "small.beton", photos)


def test_reads_bytes_sides_and_labels(
    jpeg_beton: Path, mixed_beton: Path, photos: list[np.ndarray]
) -> None:
    store = BetonStore(jpeg_beton)
    assert len(store) == 40
    assert store.labels.tolist() == [i // 10 for i in range(40)]
    for i, image in enumerate(photos):
        assert store.read(i).tobytes() == as_jpeg(image)
        assert (store.heights[i], store.widths[i]) == image.shape[:2]
    mixed = open_store(mixed_beton)
    assert mixed.modes.tolist() == [1, 0] * 20
    np.testing.assert_array_equal(mixed.read(2).reshape(photos[2].shape), photos[2])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ffcv") is None, reason="needs ffcv")
def test_reads_what_ffcv_writes(tmp_path: Path) -> None:
    """In a subprocess: importing ffcv changes torch's threads, its writer forks."""
    script = """
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
rng = np.random.default_rng(0)
images = [rng.integers(0, 256, (*rng.integers(20, 90, 2), 3), dtype=np.uint8) for _ in range(120)]
class Data:
    def __len__(self): return 120
    def __getitem__(self, i): return images[i], i - 7
for mode in ("jpg", "raw", "proportion"):
    fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
    writer = DatasetWriter(mode + ".beton", fields, num_workers=2, page_size=1 << 21)
    writer.from_indexed_dataset(Data(), chunksize=10)
np.savez("x.npz", *images)
"""
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120, capture_output=True
    )
    images = np.load(tmp_path / "x.npz")
    for mode, expected in {"jpg": {0}, "raw": {1}, "proportion": {0, 1}}.items():
        store = BetonStore(tmp_path / f"{mode}.beton")
        assert store.labels.tolist() == [i - 7 for i in range(120)]
        assert set(store.modes.tolist()) == expected
        for i in range(120):
            image = images[f"arr_{i}"]
            if store.modes[i]:
                np.testing.assert_array_equal(store.read(i).reshape(image.shape), image)
            else:
                assert jpeg_sides(store.read(i).tobytes()) == image.shape[:2]


def read_or_name(path: Path) -> list[tuple[int, bytes]] | None:
    """The contents, or None after an error that names the file."""
    try:
        return contents(path)
    except DamagedData as error:
        if str(path) not in str(error):
            raise
        return None


def test_every_bit_flip_in_the_header_and_tables(small: Path) -> None:
    """An error or the right data.

    Without a sidecar only labels and JPEG lengths cannot be checked.
    """
    good = contents(small)
    end = small.stat().st_size
    assert ALLOCATION.itemsize == ROW_BYTES
    metadata = range(TABLES, TABLES + N_SAMPLES * ROW_BYTES)
    allocations = range(end - N_SAMPLES * ROW_BYTES, end)
    labels = {at for i, at in enumerate(metadata) if i % ROW_BYTES >= 16}
    lengths = {at for i, at in enumerate(allocations) if i % ROW_BYTES >= 16}
    for at in [*range(HEADER.itemsize + 1), *metadata, *allocations]:
        for bit in range(8):
            flip_bit(small, at, bit)
            found = read_or_name(small)
            flip_bit(small, at, bit)
            if found is None or found == good:
                continue
            wrong = [(a, b) for a, b in zip(found, good, strict=True) if a != b]
            assert len(wrong) == 1
            (label, data), (good_label, good_data) = wrong[0]
            if at in labels:
                assert data == good_data
            else:
                assert at in lengths
                assert label == good_label
                assert data.startswith(good_data) or good_data.startswith(data)


def test_random_damage_never_crashes(small: Path) -> None:
    whole = small.read_bytes()
    rng = np.random.default_rng()
    for _ in range(300):
        bad = bytearray(whole)
        if rng.random() < 0.3:
            del bad[rng.integers(len(whole)) :]
        tables_end = TABLES + N_SAMPLES * ROW_BYTES
        for at in rng.integers(0, tables_end, rng.integers(1, 20)):
            if at < len(bad):
                bad[at] = rng.integers(256)
        small.write_bytes(bad)
        read_or_name(small)


def test_a_file_that_shrinks_while_open_is_an_error(small: Path) -> None:
    store = BetonStore(small)
    os.truncate(small, store._ptrs[3])
    with pytest.raises(DamagedData, match="sample 4"):
        store.read(4)


def test_jpeg_whose_header_contradicts_the_table(small: Path) -> None:
    bad = bytearray(small.read_bytes())
    bad[TABLES + ROW_BYTES + 1] ^= 1  # width of sample 1
    small.write_bytes(bad)
    with pytest.raises(DamagedData, match=r"sample 1: JPEG of \(\d+, \d+\) pixels, the table says"):
        BetonStore(small).read(1)
