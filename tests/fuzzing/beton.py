"""Targets: a damaged `.beton`, and the sidecar of one."""

# ruff: noqa: PT017  # an error is judged where it is met; not every input must raise one

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

import pipelines
from pipelines import convert
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_layout import ALLOCATING, ALLOCATION, FIELD, HEADER, metadata_row
from pipelines.sources.sidecar import read_sidecar, sidecar_path
from tests.fuzzing.damage import EXTREME, HOSTILE_JSON, mutate
from tests.fuzzing.intact import COUNT, LABELS, RAW_SAMPLES, add_sidecar, make_beton
from tests.fuzzing.judge import ALLOWED, Damage, assert_says_where, deliver, judge, pick_loaders

SIZES = [16, 40]  # pixels of the images that are delivered

# Where the damage is. Listed as often as they shall come.
PLACES = [
    "fields", "fields", "fields", "tables", "allocations", "sample", "sample", "sample", "anywhere",
]  # fmt: skip

TABLES_OF_A_SAMPLE = -1  # owners of a byte that no sample has
PADDING = -2


class Layout(NamedTuple):
    """Where the tables of a file are."""

    n_fields: int  # of a sample
    row: np.dtype  # of the metadata
    pointer: int  # to the pixels: its offset in a row
    allocated: int  # bytes of a sample's rows in the allocation table

    @property
    def metadata(self) -> int:
        """Where they begin."""
        return HEADER.itemsize + self.n_fields * FIELD.itemsize

    @property
    def samples(self) -> int:
        """Where the metadata end."""
        return self.metadata + self.row.itemsize * COUNT

    def header_numbers(self) -> list[tuple[int, int]]:
        """(offset, bytes) of the numbers of the header, and of the fields' types."""
        types = [(HEADER.itemsize + i * FIELD.itemsize, 1) for i in range(self.n_fields)]
        return [*numbers_of(HEADER), *types]


def layout_of(store: BetonStore) -> Layout:
    """That of an intact file."""
    row = metadata_row(store.fields)
    n_allocations = sum(field.type_id in ALLOCATING for field in store.fields)
    names = [field.name for field in store.fields]
    pixels = str(names.index("planes" if "planes" in names else "image"))
    entries = row[pixels].fields
    pointer = row.fields[pixels][1] + entries["ptr" if "ptr" in entries else "data_ptr"][1]
    return Layout(len(names), row, pointer, n_allocations * ALLOCATION.itemsize)


def numbers_of(dtype: np.dtype, offset: int = 0) -> list[tuple[int, int]]:
    """(offset, bytes) of every number in a row."""
    if dtype.fields is None:
        return [(offset, dtype.itemsize)]
    found = []
    for entry, at, *_ in dtype.fields.values():
        found += numbers_of(entry, offset + at)
    return found


def fuzz_beton(rng: np.random.Generator, folder: Path) -> str:
    """Of two fields, or of many, or of planes."""
    encoding = str(rng.choice([*RAW_SAMPLES, "fields", "fields", "planes"]))
    path = make_beton(folder, encoding)
    how, damage = damage_beton(rng, path)
    checksums = damage.checksums
    faults = convert.check(path, threads=1)
    try:
        store = pipelines.open_store(path)
    except ALLOWED as error:
        assert_says_where(error, path)
        assert damage.tables, f"only samples are damaged: {error!r}"
        assert faults
        return f"{encoding} {how}: {error}"
    assert not (checksums and damage.tables), "damaged tables opened"
    size = int(rng.choice(SIZES))
    loaders = pick_loaders(rng, encoding)
    refused = judge(store, loaders, size, encoding, LABELS, damage)
    store.close()

    # The first loader's decoder is that of --check.
    judge_check(faults, refused, damage)
    return (
        f"{encoding} {how} {size}: touched {damage.touched or '-'}, "
        f"tables {damage.tables}, refused {refused or '-'}"
    )


def fuzz_planes(rng: np.random.Generator, folder: Path) -> str:
    """Decoded planes: every sample is read; what is delivered is as ever, or was damaged."""
    path = make_beton(folder, "planes")
    store = BetonStore(path)
    good = [store.read(i).tobytes() for i in range(COUNT)]
    sides = np.stack([store.heights, store.widths])
    store.close()
    how, damage = damage_beton(rng, path)
    try:
        store = pipelines.open_store(path)
    except ALLOWED as error:
        assert_says_where(error, path)
        assert damage.tables, f"only samples are damaged: {error!r}"
        return f"{how}: {error}"
    assert not (damage.checksums and damage.tables), "damaged tables opened"
    assert damage.tables or np.array_equal(np.stack([store.heights, store.widths]), sides)
    refused = set()
    for i in range(COUNT):
        try:
            found = store.read(i).tobytes()
        except ALLOWED as error:
            assert_says_where(error, path, i)
            assert i in damage.touched, f"intact sample {i}: {error!r}"
            refused.add(i)
        else:
            # Two rows that exchange pointer, size and sides cannot be told without checksums.
            moved = how.endswith("swap") or damage.tables
            assert found == good[i] or i in damage.touched or moved, f"intact sample {i} changed"
            assert len(found) == store.sizes[i]
    for name in ("turbojpeg", "reference"):
        for delivered in deliver(name, store, int(rng.choice(SIZES))):
            assert (delivered.error is not None) == (delivered.index in refused)
    store.close()
    if damage.checksums:
        assert refused == damage.touched
    faults = convert.check(path, threads=1)
    assert {int(fault.split()[1].strip(":")) for fault in faults} == refused
    return f"{how}: {len(refused)} refused"


def damage_beton(rng: np.random.Generator, path: Path) -> tuple[str, Damage]:
    """Damage the file, which may get a sidecar before; what was done, in words too."""
    checksums = bool(rng.random() < 0.4)
    if checksums:
        add_sidecar(path)
    good = path.read_bytes()
    store = BetonStore(path, use_sidecar=False)
    layout = layout_of(store)
    owner = owners(store, layout, len(good))
    store.close()
    where, how, bad = damaged(rng, good, owner, layout)
    path.write_bytes(bad)
    hit = owners_of_what_differs(good, bad, owner)
    damage = Damage(
        touched=hit - {TABLES_OF_A_SAMPLE, PADDING},
        tables=TABLES_OF_A_SAMPLE in hit or len(bad) != len(good),
        checksums=checksums,
        moved=how == "swap",
    )
    return f"{where} {how}", damage


def owners(store: BetonStore, layout: Layout, file_bytes: int) -> np.ndarray:
    """Per byte of an intact file: the sample it belongs to, or TABLES_OF_A_SAMPLE, or PADDING.

    What belongs to fields that are skipped is padding too.
    """
    owner = np.full(file_bytes, PADDING)
    owner[: layout.samples] = TABLES_OF_A_SAMPLE
    owner[-layout.allocated * COUNT :] = TABLES_OF_A_SAMPLE
    for i in range(COUNT):
        owner[store._ptrs[i] : store._ptrs[i] + store.sizes[i]] = i
    return owner


def damaged(
    rng: np.random.Generator, good: bytes, owner: np.ndarray, layout: Layout
) -> tuple[str, str, bytes]:  # where, how, the bytes
    where = str(rng.choice(PLACES))
    sample = np.flatnonzero(owner == rng.integers(COUNT))
    match where:
        case "fields":
            return where, "value", table_value(rng, good, layout)
        case "tables":
            low, high = 0, layout.samples
        case "allocations":
            low, high = len(good) - layout.allocated * COUNT, len(good)
        case "sample":
            low, high = int(sample[0]), int(sample[-1]) + 1
        case _:
            low, high = 0, len(good)
    bad, how = mutate(rng, good, low, high)
    return where, how, bad


def owners_of_what_differs(good: bytes, bad: bytes, owner: np.ndarray) -> set[int]:
    before = np.frombuffer(good.ljust(len(bad), b"\0"), np.uint8)
    after = np.frombuffer(bad.ljust(len(good), b"\0"), np.uint8)
    differs = before != after
    return set(owner[differs[: len(good)]].tolist())


def judge_check(faults: list[str], refused: set[int], damage: Damage) -> None:
    """`fap-convert --check` names what loaders refuse, and nothing in an intact file."""
    known = {int(fault.split()[1].strip(":")) for fault in faults}
    missed = refused - known
    if damage.checksums:
        missed = (refused | damage.touched) - known
    assert not missed, f"--check does not name {missed}: {faults}"
    assert faults or not refused
    assert damage.tables or damage.touched or not faults, faults


def table_value(rng: np.random.Generator, data: bytes, layout: Layout) -> bytes:
    """A hostile integer exactly on a number of the header or of a table.

    Or some numbers of two rows exchanged.
    """
    if rng.random() < 0.25:
        return rows_exchanged(rng, data, layout)
    bad = bytearray(data)
    row = layout.metadata + layout.row.itemsize * int(rng.integers(COUNT))
    n_allocations = layout.allocated // ALLOCATION.itemsize * COUNT
    allocation = len(data) - ALLOCATION.itemsize * int(rng.integers(1, n_allocations + 1))
    numbers = numbers_of(layout.row, row) + numbers_of(ALLOCATION, allocation)
    if rng.random() < 0.4:
        numbers = layout.header_numbers()
    at, size = numbers[int(rng.integers(len(numbers)))]
    old = int.from_bytes(data[at : at + size], "little")
    anothers = int.from_bytes(data[row + layout.pointer : row + layout.pointer + 8], "little")
    value = int(rng.choice(np.array([*EXTREME, len(data), anothers], np.uint64)))
    if rng.random() >= 0.6:
        value = old + int(rng.choice([-1, 1, 8, -layout.row.itemsize, 4096]))
    bad[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(bad)


def rows_exchanged(rng: np.random.Generator, data: bytes, layout: Layout) -> bytes:
    """The same numbers, some beside one another, of two rows of one table change places."""
    bad = bytearray(data)
    row, table = layout.row, layout.metadata
    if rng.random() < 0.5:
        row, table = ALLOCATION, len(data) - layout.allocated * COUNT
    numbers = numbers_of(row)
    first, last = np.sort(rng.integers(len(numbers), size=2)).tolist()
    start, end = numbers[first][0], sum(numbers[last])
    among = COUNT
    if rng.random() >= 0.5:
        among = COUNT // 2  # the samples of one size, so that nothing but the pixels betrays it
    a, b = (table + row.itemsize * int(i) for i in rng.choice(among, 2, replace=False))
    bad[a + start : a + end] = data[b + start : b + end]
    bad[b + start : b + end] = data[a + start : a + end]
    return bytes(bad)


def fuzz_sidecar(rng: np.random.Generator, folder: Path) -> str:
    path = make_beton(folder, "jpg")
    add_sidecar(path)
    side = sidecar_path(path)
    intact = read_sidecar(path)
    assert intact is not None
    if rng.random() < 0.5:
        tree = json.loads(side.read_text())
        how = str(rng.choice([*tree, "all"]))
        text = str(rng.choice(HOSTILE_JSON))
        if how != "all":
            text = json.dumps(tree | {how: "@"}).replace('"@"', text)
        side.write_text(text)
    else:
        bad, how = mutate(rng, side.read_bytes())
        side.write_bytes(bad)
    try:
        store = pipelines.open_store(path)
    except ALLOWED as error:
        assert_says_where(error, side)
        return f"{how}: {error}"[:200]
    found = read_sidecar(path)
    assert found is not None
    # A checksum that was changed makes its sample a damaged one.
    touched = set(np.flatnonzero(found.crc32 != intact.crc32).tolist())
    loaders = pick_loaders(rng, "jpg")
    refused = judge(store, loaders, 40, "jpg", LABELS, Damage(touched, checksums=True))
    store.close()
    assert refused == touched
    return f"{how}: {len(refused)} refused"


def exchange(rng: np.random.Generator, folder: Path) -> str:
    """For the tester's test: samples 0 and 1 change places in both tables.

    Nothing that a file without checksums could betray, so the loader shows another one's pixels.
    """
    path = make_beton(folder, "raw")
    good = path.read_bytes()
    store = BetonStore(path)
    layout = layout_of(store)
    store.close()
    at = layout.metadata + layout.pointer
    first, second = (good[at + i : at + i + 8] for i in (0, layout.row.itemsize))
    neither = b"\xff" * 8
    bad = good.replace(first, neither).replace(second, first).replace(neither, second)
    path.write_bytes(bad)
    store = pipelines.open_store(path)
    judge(store, ["reference"], 40, "raw", LABELS, Damage(set(), tables=True))
    return "not noticed"
