"""`.beton` files: FFCV's own, ours, and damaged ones, which must be errors and never crashes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from pipelines import open_store
from pipelines.jpeg import jpeg_sides
from pipelines.sources import beton
from pipelines.sources.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    BetonStore,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from pipelines.sources.folder import FolderStore
from pipelines.store import DamagedData, check_class_names
from tests.conftest import as_jpeg, write_beton

TABLES = HEADER.itemsize + 2 * FIELD.itemsize  # where the metadata begin


def contents(path: Path) -> list[tuple[int, bytes]]:
    """Everything a loader would get: (label, encoded bytes) of every sample."""
    store = BetonStore(path)
    try:
        return [(int(store.labels[i]), store.read(i).tobytes()) for i in range(len(store))]
    finally:
        store.close()


def add_sidecar(path: Path) -> None:
    crc32 = np.array([zlib.crc32(data) for _, data in contents(path)], np.uint32)
    write_sidecar(path, classes=tuple("abcdef"), encoding={"quality": 90}, crc32=crc32)


@pytest.fixture
def small(tmp_path: Path, photos: list[np.ndarray]) -> Path:
    """Six samples, the last two raw."""
    samples = [as_jpeg(image) for image in photos[:4]] + photos[4:6]
    return write_beton(tmp_path / "small.beton", samples, range(6))


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


def flip_bit(path: Path, at: int, bit: int) -> None:
    """In place; twice is as before."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def read_or_name(path: Path) -> list[tuple[int, bytes]] | None:
    """The contents, or None after an error that names the file."""
    try:
        return contents(path)
    except DamagedData as error:
        if str(path) not in str(error):
            raise
        return None


def test_every_bit_flip_in_the_header_and_tables(small: Path) -> None:
    """An error or the right data; without a sidecar only labels and JPEG lengths cannot be checked."""
    good, size = contents(small), small.stat().st_size
    allocations = size - 6 * ALLOCATION.itemsize
    in_row = [i % 24 for i in range(144)]
    labels = {TABLES + i for i, k in enumerate(in_row) if k >= 16}
    lengths = {allocations + i for i, k in enumerate(in_row) if k >= 16}
    for at in [
        *range(HEADER.itemsize + 1),
        *range(TABLES, TABLES + 144),
        *range(allocations, size),
    ]:
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


def test_a_sidecar_finds_every_flip(small: Path) -> None:
    add_sidecar(small)
    good, end = contents(small), small.stat().st_size
    store = BetonStore(small)
    first, size = int(store._ptrs[2]), int(store.sizes[2])
    rng = np.random.default_rng()
    tables = [*range(24), *range(TABLES, TABLES + 6 * 24), *range(end - 6 * 24, end)]
    for at in tables[::3]:
        bit = int(rng.integers(8))
        flip_bit(small, at, bit)
        with pytest.raises(DamagedData, match=r"small\.beton"):
            BetonStore(small)
        flip_bit(small, at, bit)
    for at in rng.integers(first, first + size, 50).tolist():
        bit = int(rng.integers(8))
        flip_bit(small, at, bit)
        with pytest.raises(DamagedData, match=r"small\.beton: sample 2: wrong checksum"):
            store.read(2)
        assert store.read(3).tobytes() == good[3][1]
        flip_bit(small, at, bit)


def test_random_damage_never_crashes(small: Path) -> None:
    whole, rng = small.read_bytes(), np.random.default_rng()
    for _ in range(300):
        bad = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for at in rng.integers(0, TABLES + 144, rng.integers(1, 20)):
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
    bad[TABLES + 24 + 1] ^= 1  # width of sample 1
    small.write_bytes(bad)
    with pytest.raises(DamagedData, match=r"sample 1: JPEG of \(\d+, \d+\) pixels, the table says"):
        BetonStore(small).read(1)


def test_sidecar_round_trip_and_damage(small: Path) -> None:
    assert read_sidecar(small) is None
    add_sidecar(small)
    sidecar = read_sidecar(small)
    assert sidecar is not None
    assert sidecar.classes == BetonStore(small).classes == tuple("abcdef")
    assert sidecar.encoding == {"quality": 90}
    assert len(sidecar.crc32) == 6
    text = sidecar_path(small).read_text()
    for bad in (
        "",
        "[]",
        "{}",
        "3",
        '"version"',
        text[:-20],
        text.replace('"count": 6', '"count": 7'),
        text.replace("A", "!"),
    ):
        sidecar_path(small).write_text(bad)
        with pytest.raises(DamagedData, match=r"small\.beton\.json"):
            BetonStore(small)


def test_every_entry_of_a_sidecar_is_under_its_checksum(small: Path) -> None:
    add_sidecar(small)
    side = sidecar_path(small)
    good = json.loads(side.read_text())
    other = {
        "version": 3,
        "count": 5,
        "classes": ["b", "a", "c", "d", "e", "f"],  # other labels for the same images
        "encoding": {"quality": 91},
        "crc32": good["crc32"][:-4] + "AAAA",
        "tables_crc32": good["tables_crc32"] ^ 1,
        "checksum": good["checksum"] ^ 1,
        "more": 1,
    }
    assert set(good) < set(other)
    for name, value in other.items():
        side.write_text(json.dumps(good | {name: value}))
        with pytest.raises(DamagedData, match=r"small\.beton\.json"):
            BetonStore(small)
    side.write_text(json.dumps(dict(reversed(good.items())), indent=1))  # the same entries
    assert BetonStore(small).classes == tuple("abcdef")


def test_every_flip_of_a_sidecar_is_noticed_or_changes_nothing(small: Path) -> None:
    add_sidecar(small)
    side = sidecar_path(small)
    good = side.read_bytes()
    sidecar, rng = read_sidecar(small), np.random.default_rng()
    for at in rng.integers(0, len(good), 150).tolist():
        flip_bit(side, at, int(rng.integers(8)))
        try:
            found = read_sidecar(small)
        except DamagedData as error:
            if str(side) not in str(error):
                raise
        else:
            assert found is not None
            assert found[:2] == sidecar[:2]
            assert found.tables_crc32 == sidecar.tables_crc32
            np.testing.assert_array_equal(found.crc32, sidecar.crc32)
        side.write_bytes(good)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "b", "c", "d", "e", "a"], "class name 'a' stands 2 times"),
        (["a", "b", "c", "d", "e"], "labels 0 to 5, but .* names 5 classes"),
        (["a", "b", "c", "d", "e", 6], "a class name is 6"),
        (
            ["a", "b", "c", "d", "e", ""],
            "a class name is '': must be a text of 1 to 1,000 characters",
        ),
        (["a", "b", "c", "d", "e", "f" * 1001], "a class name is 'ff.*1,003 characters"),
        ([], "must be a list of class names"),
        ("abcdef", "must be a list of class names"),
        ({"a": 1}, "must be a list of class names"),
        ([["a"]] * 6, r"a class name is \['a'\]"),
    ],
)
def test_class_names_are_texts_unique_and_enough(
    small: Path, classes: object, message: str
) -> None:
    """With a checksum that fits: it guards against damage, not against a careless or hostile
    writer.
    """
    with pytest.raises((ValueError, DamagedData), match=message):
        write_sidecar(small, classes=classes, encoding={}, crc32=np.zeros(6, np.uint32))  # type: ignore[arg-type]
    assert not sidecar_path(small).exists()
    add_sidecar(small)
    content = json.loads(sidecar_path(small).read_text()) | {"classes": classes}
    sidecar_path(small).write_text(
        json.dumps(content | {"checksum": beton._content_checksum(content)})
    )
    with pytest.raises(DamagedData, match=message):
        BetonStore(small)


ODD_FILES = {
    "a named pipe": os.mkfifo,
    "a folder": os.mkdir,
    "/dev/zero": lambda path: os.symlink("/dev/zero", path),
    "a dangling link": lambda path: os.symlink("nowhere", path),
    "a link to itself": lambda path: os.symlink(path, path),
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_a_sidecar_is_a_bounded_file(
    small: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ODD_FILES[kind](sidecar_path(small))
    with pytest.raises(DamagedData, match=r"small\.beton\.json"):
        BetonStore(small)
    assert BetonStore(small, use_sidecar=False).classes is None


def test_a_sidecar_that_is_too_large_is_neither_read_nor_written(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sidecar(small)
    monkeypatch.setattr(beton, "SIDECAR_BYTES", 100)
    with pytest.raises(DamagedData, match=r"small\.beton\.json.*more than 100 bytes"):
        BetonStore(small)
    sidecar_path(small).unlink()
    with pytest.raises(ValueError, match="at most 100 are read again"):
        add_sidecar(small)
    assert not sidecar_path(small).exists()


@pytest.mark.parametrize("kind", ["a named pipe", "/dev/zero", "a link to itself"])
def test_a_beton_is_a_file(tmp_path: Path, kind: str) -> None:
    ODD_FILES[kind](tmp_path / "x.beton")
    with pytest.raises((ValueError, OSError), match=r"x\.beton"):
        open_store(tmp_path / "x.beton")


def test_home_and_unreadable_names_in_paths(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(small.parent))
    assert len(open_store("~/small.beton")) == 6
    odd = os.fsdecode(os.fsencode(small.parent) + b"/caf\xe9\n.beton")
    small.rename(odd)
    os.truncate(odd, 1000)
    with pytest.raises(DamagedData, match=r"caf\\udce9\\n\.beton: ") as caught:
        open_store(odd)
    assert str(caught.value).isprintable()


def test_describe_shows_the_numbers_that_reveal_a_mistake(small: Path) -> None:
    assert BetonStore(small).describe() == [
        "6 images, labels 0 to 5 without class names, 1 images per class"
    ]
    crc32 = np.array([zlib.crc32(data) for _, data in contents(small)], np.uint32)
    skipped = {"skipped": ["g/1.JPEG"]}
    write_sidecar(small, classes=(*"abcdef", "g\n"), encoding=skipped, crc32=crc32)
    lines = ["6 images, 7 class(es) a to g\\n, 0 to 1 images per class"]
    lines += ["no images of 1 class(es): g\\n; the labels of the others do not move"]
    opened = BetonStore(small)
    assert opened.describe() == lines
    assert opened.notes == (f"1 damaged images were left out when {small} was made",)


@pytest.mark.parametrize(
    ("classes", "odd"),
    [
        (["train", "val"], True),
        (["Train2017", "dogs"], True),
        (["annotations", "images", "labels", "test", "val"], True),
        (["n01440764"], True),
        (["validation"], True),
        (["bus", "car", "train"], False),  # vehicles
        (["cat", "dog"], False),
        (["0", "1", "10", "2"], False),
    ],
)
def test_class_names_that_are_parts_of_a_data_set(
    classes: list[str], odd: bool, small: Path
) -> None:
    hint = r"data: .*(give data/|folder per class).*--allow-odd-classes"
    with pytest.raises(ValueError, match=hint) if odd else contextlib.nullcontext():
        check_class_names(Path("data"), classes)
    path = write_beton(
        small.with_name("odd.beton"), [data for _, data in contents(small)[:4]], [0] * 4
    )
    for allowed in (False, True):
        crc32 = np.zeros(4, np.uint32)
        write_sidecar(
            path, classes=tuple(classes), encoding={"allow_odd_classes": allowed}, crc32=crc32
        )
        with (
            pytest.raises(ValueError, match="odd\\.beton")
            if odd and not allowed
            else contextlib.nullcontext()
        ):
            BetonStore(path).check_classes()


def test_jpeg_sides(photos: list[np.ndarray]) -> None:
    jpeg = as_jpeg(photos[0])
    exif = jpeg[:2] + b"\xff\xe1\x00\x06abcd" + jpeg[2:]
    assert jpeg_sides(jpeg) == jpeg_sides(exif) == photos[0].shape[:2]
    assert [
        jpeg_sides(bad) for bad in (b"", b"\xff\xd8", jpeg[1:], jpeg[:100], b"\xff\xd8" + bytes(50))
    ] == [None] * 5


def test_open_store_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.beton: no such file"):
        open_store(tmp_path / "nothing.beton")


def test_identity_is_the_contents_and_not_the_paths(
    photos: list[np.ndarray], tmp_path: Path
) -> None:
    jpegs = [as_jpeg(image) for image in photos]
    labels = [i // 10 for i in range(40)]

    def identity(
        name: str, samples: list, labels: list[int] = labels, sidecar: bool = False
    ) -> dict:
        path = write_beton(tmp_path / name, samples, labels)
        if sidecar:
            crc32 = np.array([zlib.crc32(s) for s in samples], np.uint32)
            write_sidecar(path, classes=tuple("abcd"), encoding={}, crc32=crc32)
        return BetonStore(path).identity()

    here, moved = identity("a.beton", jpegs), identity("b.beton", jpegs)
    assert here == moved
    assert here["count"] == 40
    assert here["classes"] is None
    raw = [
        np.ascontiguousarray(image[:48, :48]) for image in photos
    ]  # of one size: equal tables whatever the pixels
    turned = [image[::-1].copy() for image in raw]
    assert identity("c.beton", raw)["content"] != identity("d.beton", turned)["content"]
    assert identity("e.beton", jpegs, labels[::-1])["content"] != here["content"]
    checked, one_changed = (
        identity(n, s, sidecar=True)
        for n, s in (("f.beton", jpegs), ("g.beton", [*jpegs[1:], jpegs[0]]))
    )
    assert checked["classes"] == tuple("abcd")
    assert checked["content"] != one_changed["content"]


def test_a_copied_folder_is_the_same_data(jpeg_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(jpeg_folder, tmp_path / "copy", copy_function=shutil.copyfile)
    here = FolderStore(jpeg_folder).identity()
    assert FolderStore(copy).identity() == here
    first = sorted(copy.rglob("*.JPEG"))[0]
    content = bytearray(first.read_bytes())
    content[-10] ^= 1
    first.write_bytes(content)
    assert FolderStore(copy).identity()["content"] != here["content"]
    first.rename(first.with_name("zzz.JPEG"))
    assert FolderStore(copy).identity()["content"] != here["content"]
