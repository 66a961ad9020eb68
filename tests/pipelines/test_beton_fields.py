"""`.beton` files of other fields than image and label: what is read, what is skipped, planes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import pipelines
from pipelines import DamagedData, open_store
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_layout import ALLOCATION, FIELD, HEADER
from pipelines.store import PLANES
from tests.conftest import as_jpeg
from tests.pipelines.many_fields import (
    ARRAY,
    BYTES,
    FLOAT,
    INT,
    JSON,
    RGB,
    TENSOR,
    Column,
    planes_columns,
    planes_of,
    write_fields,
)
from tests.pipelines.samples import add_sidecar, contents, flip_bit

N = 6
LABELS = [3, 0, 2, 2, 1, 5]


@pytest.fixture
def columns(photos: list[np.ndarray]) -> dict[str, Column]:
    """One field of each type, by name. Some texts are empty, so they point at what follows."""
    samples = [as_jpeg(image) for image in photos[:4]] + list(photos[4:N])
    texts = [b"", b"two", b"", b"four", b"", b"six"]
    return {
        "index": Column("index", INT, range(100, 100 + N)),
        "weight": Column("weight", FLOAT, [0.5] * N),
        "note": Column("note", BYTES, texts),
        "image": Column("image", RGB, samples),
        "mask": Column("mask", RGB, photos[10 : 10 + N]),
        "box": Column("box", ARRAY, list(np.arange(N * 4, dtype=np.float32).reshape(N, 2, 2))),
        "tags": Column("tags", JSON, [{"tag": i} for i in range(N)]),
        "key": Column("key", TENSOR, list(np.arange(N * 3).reshape(N, 3))),
        "label": Column("label", INT, LABELS),
    }


def expected(columns: dict[str, Column], name: str = "image") -> list[tuple[int, bytes]]:
    found = []
    for label, image in zip(LABELS, columns[name].values, strict=True):
        found.append((label, image if isinstance(image, bytes) else image.tobytes()))
    return found


def test_image_and_label_are_found_among_any_fields_in_any_order(
    columns: dict[str, Column], tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    names = list(columns)
    for k in range(30):
        rng.shuffle(names)
        others = [name for name in names if name not in ("image", "label")][: rng.integers(8)]
        chosen = [columns[name] for name in names if name in {"image", "label", *others}]
        path = write_fields(tmp_path / f"{k}.beton", chosen, page=1 << 17, seed=k)
        assert contents(path) == expected(columns)
        store = BetonStore(path)
        notes = " ".join(store.notes)
        assert all(f"{name} (" in notes for name in others)
        assert "image (" not in notes
        assert bool(store.notes) == bool(others)


def test_the_only_image_and_the_only_integer_may_have_any_name(
    columns: dict[str, Column], tmp_path: Path
) -> None:
    target = columns["label"]._replace(name="target")
    photo = columns["image"]._replace(name="photo")
    path = write_fields(tmp_path / "a.beton", [columns["note"], target, photo, columns["weight"]])
    assert contents(path) == expected(columns)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mask->photo", "image->picture", "label"], "0 are image \\(RGB image\\)"),
        (["image", "mask->image", "label"], "2 are image \\(RGB image\\)"),
        (["image", "index", "label->class"], "0 are label \\(integer\\)"),
        (["image", "weight"], "0 are label \\(integer\\)"),
        (["label", "note"], "0 are image \\(RGB image\\)"),
        # Of what is called so the type was damaged, or the user means it: never take the other one.
        (["image", "index", "weight->label"], "0 are label \\(integer\\)"),
        (["mask", "box->image", "label"], "0 are image \\(RGB image\\)"),
        (["note->planes", "label", "index->height"], "0 are width \\(integer\\)"),
        (["note->planes", "index->height", "index->width"], "0 are label \\(integer\\)"),
        (["image"], "1 fields: need one RGB image and one integer label"),
    ],
    ids=str,
)
def test_no_image_or_label_is_guessed(
    names: list[str], message: str, columns: dict[str, Column], tmp_path: Path
) -> None:
    chosen = []
    for each in names:
        name, _, new = each.partition("->")
        chosen.append(columns[name]._replace(name=new or name))
    path = write_fields(tmp_path / "a.beton", chosen)
    with pytest.raises(DamagedData, match=f"a.beton: {message}|a.beton: .* fields, .*{message}"):
        open_store(path)


def test_a_custom_field_is_an_error_that_names_it(
    columns: dict[str, Column], tmp_path: Path
) -> None:
    path = write_fields(
        tmp_path / "a.beton", [columns[name] for name in ("image", "tags", "label")]
    )
    data = bytearray(path.read_bytes())
    data[HEADER.itemsize + FIELD.itemsize] = 255
    path.write_bytes(data)
    with pytest.raises(DamagedData, match=r"a\.beton: field tags is of type 255, a custom one"):
        open_store(path)


def test_a_file_of_another_name_is_known_by_its_start(
    columns: dict[str, Column], tmp_path: Path
) -> None:
    path = write_fields(tmp_path / "train.ffcv", list(columns.values()))
    assert len(open_store(path)) == N


def read_or_name(path: Path) -> list[tuple[int, bytes]] | None:
    try:
        return contents(path)
    except DamagedData as error:
        if str(path) not in str(error):
            raise
        return None


def test_flips_in_header_and_tables_of_many_fields(
    columns: dict[str, Column], tmp_path: Path, seed: int
) -> None:
    """An error or the right data: as with two fields, only label and JPEG length are not checked.

    Names and types of fields are flipped too: never is another field taken for image or label.
    """
    names = ("note", "index", "image", "tags", "mask", "label")
    path = write_fields(tmp_path / "a.beton", [columns[name] for name in names], page=1 << 17)
    good = contents(path)
    end = path.stat().st_size
    store = BetonStore(path)
    row_bytes = 80  # 16 + 8 + 13 + 16 + 13, 6 to align, 8
    tables = HEADER.itemsize + 6 * FIELD.itemsize
    metadata = range(tables, tables + N * row_bytes)
    allocations = range(end - N * 4 * ALLOCATION.itemsize, end)
    labels = {at for i, at in enumerate(metadata) if i % row_bytes >= row_bytes - 8}
    lengths = {at for i, at in enumerate(allocations) if i % 24 >= 16}
    names_and_types = [
        HEADER.itemsize + i * FIELD.itemsize + k for i in range(6) for k in range(17)
    ]
    store.close()
    rng = np.random.default_rng(seed)
    for at in [*range(HEADER.itemsize), *names_and_types, *metadata, *allocations]:
        bit = int(rng.integers(8))
        flip_bit(path, at, bit)
        found = read_or_name(path)
        flip_bit(path, at, bit)
        if found is None or found == good:
            continue
        ((label, data), (good_label, good_data)), *more = [
            (a, b) for a, b in zip(found, good, strict=True) if a != b
        ]
        assert not more
        if at in labels:
            assert data == good_data
        else:
            assert at in lengths
            assert label == good_label
            assert data.startswith(good_data) or good_data.startswith(data)


# ------------------------------------------------------------------ planes


@pytest.fixture
def planes(photos: list[np.ndarray], tmp_path: Path) -> Path:
    return write_fields(tmp_path / "planes.beton", planes_columns(photos[:N], LABELS))


def test_planes_are_read(planes: Path, photos: list[np.ndarray]) -> None:
    store = open_store(planes)
    assert store.modes.tolist() == [PLANES] * N
    assert store.labels.tolist() == LABELS
    assert store.notes == ()
    for i in range(N):
        height, width, _ = photos[i].shape
        assert (store.heights[i], store.widths[i]) == (height, width)
        data = store.read(i)
        assert data.tobytes() == planes_of(photos[i])
        assert len(data) == store.sizes[i]
        half_height, half_width = -(-height // 2), -(-width // 2)
        assert len(data) == height * width + 2 * half_height * half_width


def test_planes_may_have_other_fields(
    columns: dict[str, Column], photos: list[np.ndarray], tmp_path: Path
) -> None:
    all_columns = [columns["note"], *planes_columns(photos[:N], LABELS)[::-1], columns["index"]]
    store = open_store(write_fields(tmp_path / "a.beton", all_columns))
    assert store.read(4).tobytes() == planes_of(photos[4])
    assert store.labels.tolist() == LABELS
    (note,) = store.notes
    assert note.endswith("are not read: note (bytes), index (integer)")
    # An RGB image goes before planes.
    both = [*all_columns, columns["image"]]
    assert contents(write_fields(tmp_path / "b.beton", both)) == expected(columns)


@pytest.mark.parametrize(
    ("height", "width"), [(0, 50), (-48, 50), (1 << 40, 1), (50, 32768), (1, 1), (1 << 32, 1 << 32)]
)
def test_impossible_sides_of_planes(
    height: int, width: int, photos: list[np.ndarray], tmp_path: Path
) -> None:
    columns = planes_columns(photos[:2], [0, 1])
    columns[2] = columns[2]._replace(values=[len(photos[0]), height])
    columns[3] = columns[3]._replace(values=[len(photos[0][0]), width])
    with pytest.raises(DamagedData, match=r"sample 1: (bad dim|size is not that of its pl)"):
        open_store(write_fields(tmp_path / "a.beton", columns))


@pytest.mark.parametrize("checksums", [False, True])
def test_flips_in_a_file_of_planes(checksums: bool, planes: Path, seed: int) -> None:
    """An error or the right data; without checksums labels and planes are not checked."""
    if checksums:
        add_sidecar(planes)
    good = contents(planes)
    end = planes.stat().st_size
    tables = HEADER.itemsize + 4 * FIELD.itemsize
    row_bytes = 40
    metadata = range(tables, tables + N * row_bytes)
    labels = {at for i, at in enumerate(metadata) if 16 <= i % row_bytes < 24}
    descriptors = [HEADER.itemsize + i * FIELD.itemsize + k for i in range(4) for k in range(17)]
    allocations = range(end - N * ALLOCATION.itemsize, end)
    rng = np.random.default_rng(seed)
    for at in [*range(HEADER.itemsize), *descriptors, *metadata, *allocations]:
        bit = int(rng.integers(8))
        flip_bit(planes, at, bit)
        found = read_or_name(planes)
        flip_bit(planes, at, bit)
        if found is None or found == good:
            continue
        assert not checksums
        assert at in labels
        assert [data for _, data in found] == [data for _, data in good]
    first = int(BetonStore(planes)._ptrs[2])
    flip_bit(planes, first + 100, 3)
    if checksums:
        with pytest.raises(DamagedData, match=r"planes\.beton: sample 2: wrong checksum"):
            open_store(planes).read(2)
    else:
        assert contents(planes)[2] != good[2]


def test_planes_that_shrink_while_open_are_an_error(planes: Path) -> None:
    store = BetonStore(planes)
    os.truncate(planes, store._ptrs[3])
    with pytest.raises(DamagedData, match="sample 4"):
        store.read(4)


# ------------------------------------------------------------------ FFCV


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ffcv") is None, reason="needs ffcv")
def test_reads_what_ffcv_writes_with_every_type_of_field(tmp_path: Path) -> None:
    """In a subprocess: importing ffcv changes torch's threads, its writer forks."""
    script = """
import numpy as np, torch
from ffcv.fields import *
from ffcv.fields.basics import FloatField
from ffcv.writer import DatasetWriter
rng = np.random.default_rng(0)
images = [rng.integers(0, 256, (*rng.integers(20, 90, 2), 3), dtype=np.uint8) for _ in range(120)]
class Data:
    def __len__(self): return 120
    def __getitem__(self, i):
        text = np.frombuffer(b"x" * (i % 5), np.uint8)
        box = np.full((2, 3), i, np.float32)
        key = torch.ones(4) * i
        return 0.5, i, text, images[i][:9, :9], box, {"i": int(i)}, key, images[i], i - 7
fields = {
    "weight": FloatField(), "index": IntField(), "text": BytesField(),
    "small": RGBImageField(write_mode="raw"), "box": NDArrayField(np.dtype("float32"), (2, 3)),
    "tags": JSONField(), "key": TorchTensorField(torch.float32, (4,)),
    "image": RGBImageField(write_mode="raw"), "label": IntField(),
}
writer = DatasetWriter("many.beton", fields, num_workers=2, page_size=1 << 21)
writer.from_indexed_dataset(Data(), chunksize=10)
np.savez("x.npz", *images)
"""
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120, capture_output=True
    )
    images = np.load(tmp_path / "x.npz")
    store = BetonStore(tmp_path / "many.beton")
    assert store.labels.tolist() == [i - 7 for i in range(120)]
    (note,) = store.notes
    assert "7 field(s)" in note
    for i in range(120):
        image = images[f"arr_{i}"]
        np.testing.assert_array_equal(store.read(i).reshape(image.shape), image)


# ------------------------------------------------------------------ who cannot show planes


@pytest.mark.parametrize(
    "name", [name for name in pipelines.BACK_ENDS if name in ("dali", "reference", "ffcv")]
)
def test_a_back_end_without_planes_says_so(name: str, planes: Path) -> None:
    if find_spec({"dali": "nvidia.dali", "ffcv": "ffcv"}.get(name, "pipelines")) is None:
        pytest.skip(f"{name} is not installed")
    from pipelines.loaders import _loader_class

    if _loader_class(name).shows_planes:
        pytest.skip("shows them")
    message = r"planes\.beton: holds decoded planes, which this data.pipeline cannot show"
    with pytest.raises(ValueError, match=message):
        pipelines.open_loader(name, open_store(planes), size=32)
