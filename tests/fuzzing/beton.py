"""Targets: a damaged `.beton`, and the sidecar of one."""

# ruff: noqa: PT017  # an error is judged where it is met; not every input must raise one

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import pipelines
from pipelines import convert
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_layout import FIELD, HEADER
from pipelines.sources.sidecar import read_sidecar, sidecar_path
from tests.fuzzing.damage import EXTREME, HOSTILE_JSON, mutate
from tests.fuzzing.intact import COUNT, RAW_SAMPLES, add_sidecar, make_beton
from tests.fuzzing.judge import ALLOWED, Damage, assert_says_where, judge, pick_loaders

ROW = 24  # bytes of a metadata row, and of an allocation
TABLES = HEADER.itemsize + 2 * FIELD.itemsize  # where the metadata begin
SAMPLES = TABLES + ROW * COUNT  # where they end
LABELS = list(range(COUNT))
SIZES = [16, 40]  # pixels of the images that are delivered

# Where the damage is. Listed as often as they shall come.
PLACES = [
    "fields", "fields", "fields", "tables", "allocations", "sample", "sample", "sample", "anywhere",
]  # fmt: skip

# (offset, bytes) of the fields of the header, and of a row: mode, width, height, pointer, label.
HEADER_FIELDS = [(0, 2), (2, 2), (4, 4), (8, 8), (16, 8), (24, 1), (24 + FIELD.itemsize, 1)]
ROW_FIELDS = [(0, 1), (1, 2), (3, 2), (5, 8), (16, 8)]
ALLOCATION_FIELDS = [(0, 8), (8, 8), (16, 8)]
POINTER = 5  # its offset in a row

TABLES_OF_A_SAMPLE = -1  # owners of a byte that no sample has
PADDING = -2


def fuzz_beton(rng: np.random.Generator, folder: Path) -> str:
    encoding = str(rng.choice(list(RAW_SAMPLES)))
    path = make_beton(folder, encoding)
    checksums = bool(rng.random() < 0.4)
    if checksums:
        add_sidecar(path)
    good = path.read_bytes()
    owner = owners(path)
    where, how, bad = damaged(rng, good, owner)
    path.write_bytes(bad)

    hit = owners_of_what_differs(good, bad, owner)
    damage = Damage(
        touched=hit - {TABLES_OF_A_SAMPLE, PADDING},
        tables=TABLES_OF_A_SAMPLE in hit or len(bad) != len(good),
        checksums=checksums,
        moved=how == "swap",
    )
    faults = convert.check(path, threads=1)
    try:
        store = pipelines.open_store(path)
    except ALLOWED as error:
        assert_says_where(error, path)
        assert damage.tables, f"only samples are damaged: {error!r}"
        assert faults
        return f"{encoding} {where} {how}: {error}"
    assert not (checksums and damage.tables), "damaged tables opened"
    size = int(rng.choice(SIZES))
    loaders = pick_loaders(rng, encoding)
    refused = judge(store, loaders, size, encoding, LABELS, damage)
    store.close()

    # --check decodes as ffcv does; Pillow is stricter here, laxer there.
    if not checksums and loaders[0] != "ffcv":
        refused = set()
    judge_check(faults, refused, damage)
    return (
        f"{encoding} {where} {how} {size}: touched {damage.touched or '-'}, "
        f"tables {damage.tables}, refused {refused or '-'}"
    )


def owners(path: Path) -> np.ndarray:
    """Per byte of an intact file: the sample it belongs to, or TABLES_OF_A_SAMPLE, or PADDING."""
    store = BetonStore(path, use_sidecar=False)
    owner = np.full(path.stat().st_size, PADDING)
    owner[:SAMPLES] = TABLES_OF_A_SAMPLE
    owner[-ROW * COUNT :] = TABLES_OF_A_SAMPLE
    for i in range(COUNT):
        owner[store._ptrs[i] : store._ptrs[i] + store.sizes[i]] = i
    store.close()
    return owner


def damaged(
    rng: np.random.Generator, good: bytes, owner: np.ndarray
) -> tuple[str, str, bytes]:  # where, how, the bytes
    where = str(rng.choice(PLACES))
    sample = np.flatnonzero(owner == rng.integers(COUNT))
    match where:
        case "fields":
            return where, "value", table_value(rng, good)
        case "tables":
            low, high = 0, SAMPLES
        case "allocations":
            low, high = len(good) - ROW * COUNT, len(good)
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


def table_value(rng: np.random.Generator, data: bytes) -> bytes:
    """A hostile integer exactly on a field of the header or of a table.

    Or one field of two rows exchanged, or a few fields beside one another.
    """
    if rng.random() < 0.25:
        return rows_exchanged(rng, data)
    bad = bytearray(data)
    row = TABLES + ROW * int(rng.integers(COUNT))
    allocation = len(data) - ROW * int(rng.integers(1, COUNT + 1))
    fields = [(row + offset, size) for offset, size in ROW_FIELDS]
    fields += [(allocation + offset, size) for offset, size in ALLOCATION_FIELDS]
    if rng.random() < 0.4:
        fields = HEADER_FIELDS
    at, size = fields[int(rng.integers(7))]
    old = int.from_bytes(data[at : at + size], "little")
    anothers = int.from_bytes(data[row + POINTER : row + POINTER + 8], "little")
    value = int(rng.choice(np.array([*EXTREME, len(data), anothers], np.uint64)))
    if rng.random() >= 0.6:
        value = old + int(rng.choice([-1, 1, 8, -ROW, 4096]))
    bad[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(bad)


def rows_exchanged(rng: np.random.Generator, data: bytes) -> bytes:
    """The same bytes of two rows of one table change places."""
    bad = bytearray(data)
    table = int(rng.choice([TABLES, len(data) - ROW * COUNT]))
    start, end = [(0, 5), (5, 13), (16, 24), (0, 8), (8, 16)][int(rng.integers(5))]
    among = COUNT
    if rng.random() >= 0.5:
        among = COUNT // 2  # the samples of one size, so that nothing but the pixels betrays it
    a, b = (table + ROW * int(row) for row in rng.choice(among, 2, replace=False))
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
    first, second = (good[at : at + 8] for at in (TABLES + POINTER, TABLES + ROW + POINTER))
    neither = b"\xff" * 8
    bad = good.replace(first, neither).replace(second, first).replace(neither, second)
    path.write_bytes(bad)
    store = pipelines.open_store(path)
    judge(store, ["reference"], 40, "raw", LABELS, Damage(set(), tables=True))
    return "not noticed"
