"""Damage one input, use it as a run would, and judge what happens. The worker of test_fuzz.py.

    python tests/fuzz.py --seed N               replay one input
    python tests/fuzz.py --seed N --count 250   work through many; prints `start N`, then `ok N` or `bad N` and why

A seed is one input: a `.beton`, its sidecar, an image folder (used directly, or converted), a
checkpoint or a config, or what is whole and hostile: false metadata, folders full of traps, odd
images, what is no file. What may happen: an error of a known type that names the file and the
sample; or the data, where every sample whose bytes are intact is delivered as ever, and a damaged
one never shows another sample's pixels. Where there are checksums, damage is always an error. Seeds
below zero test the tester: a crash, a hang, another sample's pixels.
"""

# ruff: noqa: PT017

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import pipelines
from fap import checkpoint
from fap.config import Config, load_config, make_config
from fap.evaluate import load
from fap.nets.build import build as build_model
from pipelines import DamagedData, Store, convert
from pipelines.sources.beton import FIELD, HEADER, BetonStore
from pipelines.sources.beton_writer import write_sidecar
from pipelines.sources.listing import list_images
from pipelines.sources.sidecar import read_sidecar, sidecar_path
from tests import conftest
from tests.hostile_meta import mutated, valid_meta
from tests.pipelines.image_files import random_file
from tests.pipelines.trees import listed_slowly, random_tree

conftest.PAGE = 1 << 14  # small files; a raw image still fits into a page
KINDS = {"jpg": [0] * 12, "raw": [1] * 12, "mixed": [0, 1] * 6}
ROW = 24  # bytes of a metadata row, and of an allocation
TABLES = HEADER.itemsize + 2 * FIELD.itemsize
ALLOWED = (ValueError, OSError, DamagedData, checkpoint.DamagedCheckpoint)
EXTREME = [
    0,
    1,
    2,
    3,
    127,
    128,
    255,
    32767,
    32768,
    65535,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 63,
    (1 << 64) - 1,
]
ROOT = Path(__file__).parent.parent
GROWTH_MB = 400  # of one input, the first of which also loads what loaders need
SAME_ROW = (
    6  # grey levels between rows that show the same; the samples' own rows are twice as far apart
)


def mosaic(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): 5 x 5 coloured tiles. No row of one is like the same row of another
    (`alike`).
    """
    tiles = rng.choice(np.array([20, 90, 165, 235], np.uint8), (5, 5, 3))
    image = np.asarray(Image.fromarray(tiles).resize((width, height), Image.Resampling.NEAREST))
    return (image + rng.normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8)


@cache
def images() -> list[np.ndarray]:
    """Twelve, the first six of one size."""
    rng = np.random.default_rng(2)
    sides = [(64, 64)] * 6 + [tuple(rng.integers(40, 100, 2)) for _ in range(6)]
    return [mosaic(rng, *side) for side in sides]


def save(image: np.ndarray, kind: str, mode: str = "RGB", **options: object) -> bytes:
    Image.fromarray(image).convert(mode).save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------ damage


def mutate(
    rng: np.random.Generator, data: bytes, low: int = 0, high: int | None = None
) -> tuple[bytes, str]:
    """`data` with one kind of damage inside [low, high), and its name; half of it near the start."""
    bad = bytearray(data)
    high = len(bad) if high is None else high
    longest = max(2, min(high - low, int(rng.choice([4, 64, 1024, 1 << 20]))))
    length = min(int(rng.integers(1, longest)), high - low)

    def place(size: int) -> int:
        end = high - size + 1
        return int(
            rng.integers(low, max(low + 1, min(end, low + 700) if rng.random() < 0.5 else end))
        )

    kind = str(
        rng.choice(
            [
                "flip",
                "flip",
                "truncate",
                "zero",
                "swap",
                "integer",
                "integer",
                "garbage",
                "replace",
                "insert",
            ]
        )
    )
    at = place(length)
    if kind == "flip":
        for _ in range(rng.integers(1, 9)):
            bad[place(1)] ^= 1 << int(rng.integers(8))
    elif kind == "truncate":
        del bad[at:]
    elif kind == "zero":
        bad[at : at + length] = bytes(length)
    elif (
        kind == "swap"
    ):  # short ones only: a whole image that changed places cannot be told from the right one
        length = max(1, min(length, (high - low) // 2, 1000))
        at, other = place(length), place(length)
        if abs(at - other) >= length:
            bad[at : at + length], bad[other : other + length] = (
                bad[other : other + length],
                bad[at : at + length],
            )
    elif kind == "integer":
        size = int(rng.choice([1, 2, 4, 8]))
        near = [len(data) + d for d in (-1, 0, 1)]
        value = int(rng.choice(np.array(EXTREME + near, np.uint64))) & ((1 << 8 * size) - 1)
        at = place(size)
        bad[at : at + size] = value.to_bytes(size, "little" if rng.random() < 0.6 else "big")[
            : len(bad) - at
        ]
    elif kind == "garbage":
        bad[at : at + length] = rng.bytes(length)
    elif kind == "insert":
        bad[at:at] = rng.bytes(length)
    else:
        bad = (
            bytearray(rng.bytes(int(rng.integers(0, 4000)))) if rng.random() < 0.5 else bytearray()
        )
    return bytes(bad), kind


def table_value(rng: np.random.Generator, data: bytes) -> bytes:
    """A hostile integer exactly on a field of the header or of a table, or one field of two rows
    exchanged.
    """
    bad, n = bytearray(data), 12
    if rng.random() < 0.25:
        table = int(rng.choice([TABLES, len(data) - ROW * n]))
        start, end = [(0, 5), (5, 13), (16, 24), (0, 8), (8, 16)][int(rng.integers(5))]
        a, b = (
            table + ROW * int(i)
            for i in rng.choice(n if rng.random() < 0.5 else 6, 2, replace=False)
        )
        bad[a + start : a + end], bad[b + start : b + end] = (
            data[b + start : b + end],
            data[a + start : a + end],
        )
        return bytes(bad)
    header = [(0, 2), (2, 2), (4, 4), (8, 8), (16, 8), (24, 1), (24 + FIELD.itemsize, 1)]
    row = TABLES + ROW * int(rng.integers(n))
    allocation = len(data) - ROW * int(rng.integers(1, n + 1))
    fields = [(row, 1), (row + 1, 2), (row + 3, 2), (row + 5, 8), (row + 16, 8)]
    fields += [(allocation + 8 * k, 8) for k in range(3)]
    at, size = (header if rng.random() < 0.4 else fields)[int(rng.integers(7))]
    old = int.from_bytes(data[at : at + size], "little")
    other = int.from_bytes(data[row + 5 : row + 13], "little")  # another sample's pointer
    value = int(rng.choice(np.array([*EXTREME, len(data), other], np.uint64)))
    value = value if rng.random() < 0.6 else old + int(rng.choice([-1, 1, 8, -ROW, 4096]))
    bad[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return bytes(bad)


# ------------------------------------------------------------------ what a run would see


def names(error: BaseException, path: Path, index: int | None = None) -> None:
    """The error is of a type that commands print, and says where."""
    if not isinstance(error, ALLOWED):
        raise AssertionError(f"a {type(error).__name__}: {error}") from error
    assert str(path) in str(error), f"{path} is not named: {error!r}"
    assert index is None or f"sample {index}:" in str(error), (
        f"sample {index} is not named: {error!r}"
    )


def deliver(
    name: str, store: Store, size: int
) -> Iterator[tuple[int, int, np.ndarray] | tuple[int, None, Exception]]:
    """(index, label, image uint8 (size, size, 3)) or (index, None, error) of every sample, through
    a loader.
    """
    plan = pipelines.eval_plan(store.heights, store.widths, size=size, resize=size, batch=1)
    options = {} if name == "reference" else {"threads": 1, "prefetch": 1}
    try:
        loader = pipelines.open_loader(name, store, size=size, **options)
    # DALI takes no file of raw and JPEG samples, which one damaged mode byte makes of a raw one
    except ValueError as error:
        yield 0, None, error
        return
    step = 0
    try:
        while step < len(plan):
            try:
                for batch in loader.load(plan, step):
                    yield (
                        step,
                        int(batch.labels[0]),
                        batch.images[0].permute(1, 2, 0).numpy().copy(),
                    )
                    step += 1
            except ALLOWED as error:
                yield step, None, error
                step += 1
                if (
                    name == "dali"
                ):  # reads ahead: which step the error meets is open, and a graph is slow to build
                    break
    finally:
        loader.close()


def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rows of two images that show the same: bool (H,)."""
    return np.abs(a.astype(int) - b).mean((1, 2)) < SAME_ROW


@cache
def twins(key: str, name: str, size: int) -> list[np.ndarray]:
    """What the loader makes of the intact source."""
    with tempfile.TemporaryDirectory() as folder:
        store = pipelines.open_store(
            make_folder(Path(folder)) if key == "folder" else make_beton(Path(folder), key)
        )
        found = [image for *_, image in deliver(name, store, size)]
        store.close()
    for i, a in enumerate(found):
        assert not any(alike(a, b).any() for b in found[:i]), "the fixtures are too similar"
    return found


def judge(
    store: Store,
    loaders: list[str],
    size: int,
    key: str,
    labels: list[int],
    touched: set[int],  # samples whose bytes are damaged
    *,
    tables: bool = False,  # damaged
    checksums: bool = False,
    # bytes were moved inside the file: some of another's pixels may lie in a sample's place
    moved: bool = False,
) -> set[int]:
    """Deliver everything; returns the samples that the first loader refused."""
    refused = set()
    for name in loaders:
        expected = twins(key, name, size)
        for i, label, got in deliver(name, store, size):
            suspect = tables or i in touched
            if isinstance(got, Exception):
                at = None if name == "dali" else i
                names(got, store.file(i) if at == i else store.path, at)
                assert suspect or (name == "dali" and (tables or touched)), (
                    f"{name}: intact sample {i}: {got!r}"
                )
                refused |= {i} if name == loaders[0] else set()
                continue
            assert i not in touched or not checksums, (
                f"{name}: damage of sample {i} was not noticed"
            )
            if not suspect:
                assert label == labels[i] and np.array_equal(got, expected[i]), (
                    f"{name}: intact sample {i} changed"
                )
            for j, other in enumerate(expected) if not np.array_equal(got, expected[i]) else ():
                same = alike(got, other)
                assert j == i or not (same.all() if moved else same.any()), (
                    f"{name}: sample {i} shows sample {j}"
                )
    return refused


def pick_loaders(rng: np.random.Generator, key: str) -> list[str]:
    """Those that are installed; DALI for a share, since it builds a graph for every input."""
    dali = key != "mixed" and rng.random() < 0.08 and find_spec("nvidia.dali")
    return (["ffcv"] if find_spec("ffcv") else []) + ["reference"] + (["dali"] if dali else [])


# ------------------------------------------------------------------ inputs


def make_beton(folder: Path, kind: str) -> Path:
    samples = [
        a if raw else save(a, "JPEG", quality=90)
        for a, raw in zip(images(), KINDS[kind], strict=True)
    ]
    return conftest.write_beton(folder / f"{kind}.beton", samples, range(12))


def add_sidecar(path: Path) -> None:
    store = BetonStore(path)
    crc32 = np.array([zlib.crc32(store.read(i)) for i in range(len(store))], np.uint32)
    store.close()
    write_sidecar(path, classes=tuple("abcdefghijkl"), encoding={"quality": 90}, crc32=crc32)


def owners(path: Path) -> np.ndarray:
    """Per byte of an intact file: the sample it belongs to, -1 for tables, -2 for padding."""
    store = BetonStore(path, use_sidecar=False)
    owner = np.full(path.stat().st_size, -2)
    owner[: TABLES + ROW * 12], owner[-ROW * 12 :] = -1, -1
    for i in range(12):
        owner[store._ptrs[i] : store._ptrs[i] + store.sizes[i]] = i
    store.close()
    return owner


def fuzz_beton(rng: np.random.Generator, folder: Path) -> str:
    kind = str(rng.choice(list(KINDS)))
    path = make_beton(folder, kind)
    checksums = bool(rng.random() < 0.4)
    if checksums:
        add_sidecar(path)
    good, owner = path.read_bytes(), owners(path)
    where = str(
        rng.choice(
            [
                "fields",
                "fields",
                "fields",
                "tables",
                "allocations",
                "sample",
                "sample",
                "sample",
                "anywhere",
            ]
        )
    )
    sample = np.flatnonzero(owner == rng.integers(12))
    low, high = {
        "tables": (0, TABLES + ROW * 12),
        "allocations": (len(good) - ROW * 12, len(good)),
        "sample": (int(sample[0]), int(sample[-1]) + 1),
    }.get(where, (0, len(good)))
    bad, how = (
        (table_value(rng, good), "value") if where == "fields" else mutate(rng, good, low, high)
    )
    path.write_bytes(bad)

    differs = np.frombuffer(good.ljust(len(bad), b"\0"), np.uint8) != np.frombuffer(
        bad.ljust(len(good), b"\0"), np.uint8
    )
    hit = set(owner[differs[: len(good)]].tolist())
    tables = -1 in hit or len(bad) != len(good)
    touched = hit - {-1, -2}
    faults = convert.check(path, threads=1)
    try:
        store = pipelines.open_store(path)
    except ALLOWED as error:
        names(error, path)
        assert tables, f"only samples are damaged: {error!r}"
        assert faults
        return f"{kind} {where} {how}: {error}"
    assert not (checksums and tables), "damaged tables opened"
    size = int(rng.choice([16, 40]))
    options = {"tables": tables, "checksums": checksums, "moved": how == "swap"}
    loaders = pick_loaders(rng, kind)
    refused = judge(store, loaders, size, kind, list(range(12)), touched, **options)
    store.close()
    if (
        not checksums and loaders[0] != "ffcv"
    ):  # --check decodes as ffcv does; Pillow is stricter here, laxer there
        refused = set()
    missed = (refused | touched if checksums else refused) - {
        int(f.split()[1].strip(":")) for f in faults
    }
    assert not missed, f"--check does not name {missed}: {faults}"
    assert faults or not refused
    assert tables or touched or not faults, faults
    return (
        f"{kind} {where} {how} {size}: touched {touched or '-'}, tables {tables}, refused"
        f" {refused or '-'}"
    )


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
        side.write_text(
            text if how == "all" else json.dumps(tree | {how: "@"}).replace('"@"', text)
        )
    else:
        bad, how = mutate(rng, side.read_bytes())
        side.write_bytes(bad)
    refused = set()
    try:
        store = pipelines.open_store(path)
    except ALLOWED as error:
        names(error, side)
        return f"{how}: {error}"[:200]
    found = read_sidecar(path)
    assert found is not None
    touched = set(np.flatnonzero(found.crc32 != intact.crc32).tolist())
    refused = judge(
        store, pick_loaders(rng, "jpg"), 40, "jpg", list(range(12)), touched, checksums=True
    )
    store.close()
    assert refused == touched
    return f"{how}: {len(refused)} refused"


HOSTILE_JSON = [
    "null",
    "-1",
    "0",
    "1e999",
    "NaN",
    "Infinity",
    '""',
    '"!"',
    "[]",
    "{}",
    "[1]",
    "9" * 40,
    "9" * 5000,
    "true",
]
HOSTILE_JSON += ["[" * 100_000, '"AAAA"', '"\\ud800"', '{"a": 1}', "12", "13", "1.5"]

FILES = [("a", f"{i}.JPEG") for i in range(4)] + [
    ("a", "4.png"),
    ("b", "0.JPEG"),
    ("b", "1.jpg"),
    ("b", "deep/2.JPEG"),
]


def make_folder(folder: Path) -> Path:
    """Eight images in two classes: RGB JPEGs, a PNG, and under JPEG names a grey, a CMYK, a
    progressive one and a PNG.
    """
    root = folder / "images"
    kinds = {2: ("JPEG", "L"), 3: ("PNG", "RGB"), 4: ("PNG", "RGB"), 5: ("JPEG", "CMYK")}
    for i, (cls, name) in enumerate(FILES):
        file = root / cls / name
        file.parent.mkdir(parents=True, exist_ok=True)
        kind, mode = kinds.get(i, ("JPEG", "RGB"))
        options = {"quality": 90, "progressive": i == 7} if kind == "JPEG" else {}
        file.write_bytes(save(images()[i], kind, mode, **options))
    return root


def damage_folder(rng: np.random.Generator, root: Path) -> tuple[set[int], str]:
    """Returns the samples that are damaged, in the order of their names, which no damage changes."""
    i = int(rng.integers(len(FILES)))
    file = root.joinpath(*FILES[i])
    how = str(
        rng.choice(["bytes"] * 7 + ["sides"] * 4 + ["empty", "dangling", "folder", "text", "index"])
    )
    if how == "bytes":
        bad, how = mutate(rng, file.read_bytes())
        file.write_bytes(bad)
    elif how == "sides":  # what the header says, up to 65535 x 65535
        data, (height, width) = file.read_bytes(), images()[i].shape[:2]
        new = (
            (30000, 30000)
            if rng.random() < 0.5
            else rng.choice([1, height + 1, 30000, 65535], 2).tolist()
        )
        sides = [n.to_bytes(2, "big") for n in (height, width, *new)]
        file.write_bytes(data.replace(b"\x08" + sides[0] + sides[1], b"\x08" + sides[2] + sides[3]))
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "text":
        file.write_text("<html>404</html>")
    elif how in ("dangling", "folder"):
        file.unlink()
        file.symlink_to("nowhere") if how == "dangling" else file.mkdir()
    else:
        FolderStore = type(pipelines.open_store(root))
        FolderStore(root)
        index = root / ".fap-index.npz"
        index.write_bytes(mutate(rng, index.read_bytes())[0])
        return set(), "index"
    return {i}, how


def fuzz_folder(rng: np.random.Generator, folder: Path) -> str:
    root = make_folder(folder)
    late = rng.random() < 0.3  # damaged while it is in use
    labels = [int(cls == "b") for cls, _ in FILES]
    if late:
        store = pipelines.open_store(root)
    touched, how = damage_folder(rng, root)
    if how == "folder" and not late:
        root.joinpath(*FILES[min(touched)]).rmdir()
        touched, how = set(), "gone"
        return how  # one sample fewer, as if it had never been
    try:
        store = store if late else pipelines.open_store(root)
    except ALLOWED as error:
        names(error, root)
        assert touched
        return f"{how}: {error}"
    size = int(rng.choice([16, 40]))
    try:
        refused = judge(store, pick_loaders(rng, "folder"), size, "folder", labels, touched)
    except ALLOWED as error:  # by the plan
        names(error, root)
        return f"{how}: {error}"
    return f"{how} {size} late={late}: touched {touched}, refused {refused or '-'}"


def fuzz_convert(rng: np.random.Generator, folder: Path) -> str:
    root, dst = make_folder(folder), folder / "out.beton"
    touched, how = damage_folder(rng, root)
    skip = bool(rng.random() < 0.5)
    encodings = [
        convert.Encoding(),
        convert.Encoding(),
        convert.Encoding(max_side=48),
        convert.Encoding(raw=True),
    ]
    try:
        done = convert.convert_folder(
            root, dst, encodings[int(rng.integers(4))], skip_bad=skip, threads=1
        )
    except ALLOWED as error:
        names(error, root)
        named = {i for i, names_ in enumerate(FILES) if str(root.joinpath(*names_)) in str(error)}
        assert named == touched
        assert not isinstance(error, convert.BadImages) or not skip
        assert not list(folder.glob("out*")), "something was left behind"
        return f"{how}: {error}"
    assert convert.check(dst, threads=1) == []
    store = pipelines.open_store(dst)
    kept = [i for i, names_ in enumerate(FILES) if os.path.join(*names_) not in done["skipped"]]
    if how == "folder":
        kept = [i for i in kept if i not in touched]
    assert (
        len(kept) == len(store) == done["count"] and set(range(len(FILES))) - set(kept) <= touched
    )
    loader = pick_loaders(rng, "mixed")[0]
    expected = twins("folder", loader, 16)
    for k, label, got in deliver(loader, store, 16):
        i = kept[k]
        assert label == int(FILES[i][0] == "b")
        assert isinstance(got, np.ndarray), got
        far = [np.abs(got.astype(int) - other).mean() for other in expected]
        assert i in touched or (int(np.argmin(far)) == i and far[i] < 12), far
        assert i not in touched or min(far[:i] + far[i + 1 :]) > SAME_ROW, far
    store.close()
    return f"{how}: kept {len(kept)}, damaged {touched or '-'}"


def fuzz_checkpoint(rng: np.random.Generator, folder: Path) -> str:
    keeper = checkpoint.Checkpoints(folder, say=(said := []).append)
    for step in (1, 2):
        tensors = {
            "model.w": torch.full((5, 7), float(step)),
            "model.b": torch.arange(step),
            "loss": torch.tensor(0.5).half(),
        }
        path = keeper.save(step, tensors, {"config": {"seed": 1}, "step": step})
    good = path.read_bytes()
    bad, how = mutate(
        rng, good, 0, len(good) if rng.random() < 0.5 else 8 + int.from_bytes(good[:8], "little")
    )
    if rng.random() < 0.3:
        end = 8 + int.from_bytes(good[:8], "little")
        tree = json.loads(good[8:end])
        node = tree[str(rng.choice(list(tree)))] if rng.random() < 0.7 else tree
        node[str(rng.choice(list(node)))] = "@"
        text = (
            json.dumps(tree, separators=(",", ":"))
            .replace('"@"', str(rng.choice(HOSTILE_JSON)))
            .encode()
        )
        bad, how = len(text).to_bytes(8, "little") + text + good[end:], "value"
    if rng.random() < 0.6:  # with a checksum that is right, as another program might write it
        at = bad.find(b'"crc32":"') + 9
        if at >= 9 and len(bad) >= at + 8:
            zeros = bad[:at] + b"0" * 8 + bad[at + 8 :]
            bad, how = zeros[:at] + b"%08x" % zlib.crc32(zeros) + zeros[at + 8 :], how + " forged"
    path.write_bytes(bad)
    try:
        checkpoint.load(path)
    except ALLOWED as error:
        names(error, path)
        assert bad != good
        found = keeper.newest()
        assert found is not None and found[2]["step"] == 1 and str(path) in said[0]
        return f"{how}: {error}"
    assert bad == good or "forged" in how, "damage was not noticed"
    return how


HOSTILE_YAML = [
    "null",
    "-1",
    "0",
    "1e999",
    ".nan",
    ".inf",
    "''",
    "[]",
    "{}",
    "[1]",
    "{1: 2}",
    "9" * 40,
    "yes",
    "&a [*a]",
]
HOSTILE_YAML += [
    "!!python/object/apply:os.system [echo]",
    "? [1]\n: 2",
    "'\\0'",
    "*x",
    "%",
    "\t",
    "1/0",
    "!!bool x",
    "!!int x",
    "2001-99-99",
    "0x_",
    "1e99999999",
    "1e-400",
    "1:61",
]


def fuzz_config(rng: np.random.Generator, folder: Path) -> str:
    shipped = sorted((ROOT / "configs").rglob("*.yaml"))
    text = (
        shipped[int(rng.integers(len(shipped)))].read_text()
        if rng.random() < 0.5
        else Config().to_yaml()
    )
    path, overrides = folder / "config.yaml", []
    hostile = str(rng.choice(HOSTILE_YAML))
    how = str(rng.choice(["bytes", "value", "override"]))
    fields = [
        f"{k}.{leaf}"
        for k, v in Config()
        if hasattr(v, "__pydantic_fields__")
        for leaf in type(v).model_fields
    ]
    fields += list(Config.model_fields)
    field = str(rng.choice(fields))
    if how == "bytes":
        path.write_bytes(mutate(rng, text.encode())[0])
    else:
        path.write_text(text)
        overrides = [f"{field}={hostile}"] if how == "override" else []
    if how == "value":
        lines = text.splitlines()
        at = int(
            rng.choice([i for i, line in enumerate(lines) if ":" in line and "name:" not in line])
        )
        lines[at] = f"{lines[at].partition(':')[0]}: {hostile}"
        path.write_text("\n".join(lines))
    try:
        config = load_config(path, overrides)
    except ValueError as error:
        known = [str(path), *overrides, *(f.rpartition(".")[2] for f in fields), "unknown key"]
        assert any(word in str(error) for word in known), (
            f"neither file nor field is named: {error!r}"
        )
        return f"{how} {field}: {str(error)[:150]}"
    path.write_text(config.to_yaml())
    assert load_config(path) == config, f"{how} {overrides}: read back differently"
    return f"{how} {overrides}: accepted"


# ------------------------------------------------------------------ files that are whole, and hostile


@cache
def tiny_run() -> tuple[Config, dict[str, torch.Tensor]]:
    config = make_config(
        {"model": {"name": "cifar_resnet8", "num_classes": 3}, "data": {"size": 32, "resize": 32}}
    )
    model = build_model("cifar_resnet8", 3, size=32)
    return config, {f"model.{k}": v for k, v in model.state_dict().items()}


def fuzz_metadata(rng: np.random.Generator, folder: Path) -> str:
    """A checkpoint whose checksum is right and whose metadata are not a run's."""
    config, state = tiny_run()
    path = folder / "step_00000005.safetensors"
    checkpoint.save(
        path,
        state,
        mutated(valid_meta(config, ["a", "b", "c"]), random.Random(int(rng.integers(1 << 30)))),
    )
    try:
        load.load_model(path)
        load.export(path, folder / "plain.safetensors")
    except (ValueError, checkpoint.DamagedCheckpoint) as error:
        assert path.name in str(error), repr(error)
        assert len(str(error)) < 1000, str(error)[:3000]
        return f"{type(error).__name__}: {str(error)[-150:]}"
    return "accepted"


def fuzz_tree(rng: np.random.Generator, folder: Path) -> str:
    """Folders with what lies about in folders: the listing is its slow twin's."""
    random_tree(rng, folder / "tree")
    listing = list_images(folder / "tree")
    assert [path for path, _ in listing.files] == listed_slowly(folder / "tree")
    return f"{len(listing.files)} images, {listing.ignored}"


def fuzz_images(rng: np.random.Generator, folder: Path) -> str:
    """Kinds, modes and orientations, some damaged: a folder and its `.beton` agree, or both refuse
    the same files.
    """
    source, kinds = folder / "source", []
    for i in range(6):
        kind, data = random_file(rng)
        if rng.random() < 0.2:
            data, how = mutate(rng, data)
            kind += how
        kinds.append(kind)
        (source / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (source / "ab"[i % 2] / f"{i}.JPEG").write_bytes(data)
    try:
        convert.convert_folder(source, folder / "out.beton", threads=1)
    except convert.BadImages as error:
        bad = {path for path, _ in error.bad}
        for path in bad:
            os.unlink(path)
        if len(bad) == 6 or not all(any(source.glob(f"{name}/*")) for name in "ab"):
            return f"all refused: {kinds}"
        convert.convert_folder(source, folder / "out.beton", threads=1)
    files, beton = pipelines.open_store(source), pipelines.open_store(folder / "out.beton")
    for i in range(len(beton)):
        assert files.read(i).tobytes() == beton.read(i).tobytes(), files.file(i)
    return f"{len(beton)} of {kinds}"


def fuzz_no_file(rng: np.random.Generator, folder: Path) -> str:
    """A named pipe, a device, a folder or a dangling link where the program reads a file: an error
    at once.
    """
    config, state = tiny_run()
    beton = make_beton(folder, "jpg")
    add_sidecar(beton)
    root = make_folder(folder)
    image = sorted(root.rglob("*.*"))[0]
    saved = folder / "step_00000005.safetensors"
    checkpoint.save(saved, state, valid_meta(config))
    yaml = folder / "config.yaml"
    yaml.write_text(config.to_yaml())
    uses = {
        beton: lambda: pipelines.open_store(beton),
        sidecar_path(beton): lambda: pipelines.open_store(beton),
        image: lambda: pipelines.open_store(root),
        saved: lambda: load.load_model(saved),
        yaml: lambda: load_config(yaml),
    }
    path = list(uses)[int(rng.integers(len(uses)))]
    path.unlink()
    kind = str(rng.choice(["pipe", "device", "folder", "dangling"]))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    try:
        uses[path]()
    except ALLOWED as error:
        return f"{kind} {path.name}: {str(error)[:150]}"
    # what is no image file is none, so only an image may be passed over
    assert path == image and kind in ("folder", "dangling"), f"{kind} {path.name}: accepted"
    return f"{kind} {path.name}: passed over"


TARGETS = [fuzz_beton] * 5 + [fuzz_sidecar, fuzz_folder, fuzz_convert, fuzz_checkpoint, fuzz_config]
TARGETS += [fuzz_metadata, fuzz_tree, fuzz_images, fuzz_no_file]


def crash(rng: np.random.Generator, folder: Path) -> str:
    os.abort()


def hang(rng: np.random.Generator, folder: Path) -> str:
    while True:
        time.sleep(1)


def exchange(rng: np.random.Generator, folder: Path) -> str:
    """Samples 0 and 1 change places in both tables: nothing that a file without checksums could
    betray.
    """
    path = make_beton(folder, "raw")
    good = path.read_bytes()
    first, second = (good[at : at + 8] for at in (TABLES + 5, TABLES + ROW + 5))  # their pointers
    path.write_bytes(
        good.replace(first, b"\xff" * 8).replace(second, first).replace(b"\xff" * 8, second)
    )
    store = pipelines.open_store(path)
    judge(store, ["reference"], 40, "raw", list(range(12)), set(), tables=True)
    return "not noticed"


SELF_TESTS = {-1: crash, -2: hang, -3: exchange}


def one(seed: int) -> str:
    """Work through one input; raises what is wrong."""
    target = SELF_TESTS[seed] if seed < 0 else TARGETS[seed % len(TARGETS)]
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        return f"{target.__name__} {target(np.random.default_rng(abs(seed)), folder)}"
    finally:
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument(
        "--hang", type=float, default=60, metavar="S", help="an input that takes longer is a hang"
    )
    a = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # Memory beyond reason is an error, not a full machine; a pool of threads alone may reserve 2
    # GiB for stacks and arenas.
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30),) * 2)
    wrong = 0
    for seed in range(a.seed, a.seed + a.count):
        print("start", seed, flush=True)
        faulthandler.dump_traceback_later(a.hang, exit=True)
        try:
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
            what = one(seed)
            grown_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000 - peak_mb
            assert grown_mb < GROWTH_MB, f"took {grown_mb:.0f} MB"
            print(
                "ok",
                seed,
                what.replace("\n", " | ").encode("ascii", "replace").decode()[:300],
                flush=True,
            )
        except BaseException:
            wrong += 1
            print("bad", seed, repr(traceback.format_exc()), flush=True)
        faulthandler.cancel_dump_traceback_later()
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
