"""Several `.beton` files as one data set: order, errors, identity; few files open at once."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pipelines
from fap.cli.convert import main
from pipelines import DamagedData, eval_plan, open_loader, open_store
from pipelines.convert import check
from pipelines.sources import shards
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.sources.handles import Handle, OpenFiles
from pipelines.sources.shards import ShardedStore, shards_of
from pipelines.sources.sidecar import sidecar_path
from pipelines.store import JPG
from tests.conftest import as_jpeg, write_beton
from tests.pipelines.many_fields import planes_columns, write_fields
from tests.pipelines.samples import add_sidecar

CLASSES = tuple("abcd")


def write(path: Path, photos: list[np.ndarray], classes: tuple[str, ...] | None = CLASSES) -> Path:
    """A `.beton` with a sidecar; the label is a function of the image."""
    path.parent.mkdir(exist_ok=True)
    with BetonWriter(path, len(photos)) as writer:
        for image in photos:
            height, width, _ = image.shape
            writer.add(Sample(as_jpeg(image), JPG, height, width), height % 4)
        writer.commit(classes, {})
    return path


@pytest.fixture
def divided(photos: list[np.ndarray], tmp_path: Path) -> Path:
    """The forty photos in one file beside four shards of 13, 9, 17 and 1."""
    write(tmp_path / "whole.beton", photos)
    for i, (start, end) in enumerate(((0, 13), (13, 22), (22, 39), (39, 40))):
        write(tmp_path / "shards" / f"train-{i:05}-of-00004.beton", photos[start:end])
    return tmp_path


@pytest.fixture
def pattern(divided: Path) -> Path:
    return divided / "shards" / "*.beton"


def test_shards_are_the_file_that_was_divided(divided: Path, pattern: Path, seed: int) -> None:
    whole = open_store(divided / "whole.beton")
    store = open_store(pattern)
    assert isinstance(store, ShardedStore)
    assert len(store) == 40
    assert store.classes == CLASSES
    for name in ("labels", "heights", "widths", "modes", "sizes"):
        found, expected = getattr(store, name), getattr(whole, name)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    order = np.random.default_rng(seed).permutation(40).tolist()
    for index, data in zip(order, store.read_many(order), strict=True):
        assert data.tobytes() == store.read(index).tobytes() == whole.read(index).tobytes()
    assert store.file(22).name == "train-00002-of-00004.beton"
    assert store.name_of(38) == f"{store.file(38)}: sample 16"
    assert store.is_proven(0) and store.is_proven(39)
    for outside in (-1, 40):
        with pytest.raises(IndexError):
            store.read(outside)


def test_what_a_log_says_of_shards(pattern: Path) -> None:
    store = open_store(pattern)
    assert store.describe()[0].startswith("40 images, 4 class(es) a to d, ")
    assert store.notes == ("4 file(s), train-00000-of-00004.beton to train-00003-of-00004.beton",)
    assert len(store.files()) == 8  # with the sidecars
    assert all(file.exists() for file in store.files())


def test_identity_is_that_of_the_contents(
    pattern: Path, photos: list[np.ndarray], tmp_path: Path
) -> None:
    here = open_store(pattern).identity()
    assert here["count"] == 40
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in shards_of(pattern):
        for file in (path, sidecar_path(path)):
            (elsewhere / file.name.replace("train", "x")).write_bytes(file.read_bytes())
    assert open_store(elsewhere / "*.beton").identity() == here
    first, second, *_ = shards_of(elsewhere / "*.beton")
    for a, b in ((first, second), (sidecar_path(first), sidecar_path(second))):
        content = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(content)
    assert open_store(elsewhere / "*.beton").identity()["content"] != here["content"]
    # A pattern that matches one file is that file.
    alone = write(tmp_path / "alone" / "1.beton", photos)
    assert open_store(alone.with_name("*.beton")).identity() == open_store(alone).identity()


def test_identity_without_checksums_covers_some_images_of_all_shards(
    photos: list[np.ndarray], tmp_path: Path
) -> None:
    raw = [np.ascontiguousarray(image[:48, :48]) for image in photos]
    write_beton(tmp_path / "1.beton", raw[:20], range(20))
    write_beton(tmp_path / "2.beton", raw[20:], range(20))
    assert not open_store(tmp_path / "*.beton").is_proven(0)
    here = open_store(tmp_path / "*.beton").identity()
    write_beton(tmp_path / "2.beton", raw[20:39] + raw[:1], range(20))  # the same tables
    assert open_store(tmp_path / "*.beton").identity() != here


def test_boxes_of_shards(tmp_path: Path, photos: list[np.ndarray]) -> None:
    from pipelines.boxes import Annotations

    def boxes(first: list[int], left: list[int]) -> Annotations:
        n = len(left)
        corners = np.array([[x, 1, x + 5, 9] for x in left], np.float32).reshape(n, 4)
        area = np.full(n, 40, np.float32)
        classes = np.arange(n, dtype=np.int32) % 2
        return Annotations(np.array(first), corners, classes, np.zeros(n, bool), area)

    parts = [boxes([0, 2, 2, 3], [1, 2, 3]), boxes([0, 0, 1], [4])]
    for i, (part, images) in enumerate(zip(parts, (photos[:3], photos[3:5]), strict=True)):
        samples = [as_jpeg(image) for image in images]
        path = write_beton(tmp_path / f"{i}.beton", samples, range(len(samples)))
        add_sidecar(path, ("cat", "dog"), annotations=part)
    store = open_store(tmp_path / "*.beton")
    assert store.labels.tolist() == [0, 1, 2, 3, 4]
    assert store.annotations is not None
    assert store.annotations.first.tolist() == [0, 2, 2, 3, 3, 4]
    assert store.annotations.boxes[:, 0].tolist() == [1, 2, 3, 4]
    store.annotations.check(store.heights, store.widths, 2)
    sidecar_path(tmp_path / "1.beton").unlink()
    add_sidecar(tmp_path / "1.beton", ("cat", "dog"))
    with pytest.raises(ValueError, match=r"1\.beton does not belong .* only one of the two has bo"):
        open_store(tmp_path / "*.beton")


# ------------------------------------------------------------------ mistakes


def test_no_file_matches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shards/\*\.beton: no file matches this pattern"):
        open_store(tmp_path / "shards" / "*.beton")


def test_a_pattern_that_matches_more_than_betons(pattern: Path) -> None:
    with pytest.raises(ValueError, match=r"shards/\*: matches .*\.json, which is no \.beton file"):
        open_store(pattern.with_name("*"))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("a", "b", "x", "d"), "its class 2 is 'x', not 'c'"),
        (("a", "b", "c", "d", "e"), "it names 5 classes, not 4"),
        (None, "only one of the two names classes"),
    ],
    ids=str,
)
def test_other_classes_in_one_shard(
    classes: tuple[str, ...] | None, message: str, pattern: Path, photos: list[np.ndarray]
) -> None:
    last = shards_of(pattern)[-1]
    last.unlink()
    sidecar_path(last).unlink()
    write(last, photos[:2], classes)
    expected = (
        rf"train-00003-of-00004\.beton does not belong with .*00000-of-00004\.beton: {message}"
    )
    with pytest.raises(ValueError, match=expected):
        open_store(pattern)
    assert check(pattern)[0].endswith(message)


def test_a_missing_shard_is_named(pattern: Path) -> None:
    shards_of(pattern)[1].unlink()
    message = r"1 of 4 shards are missing: .*shards/train-00001-of-00004\.beton: convert them"
    with pytest.raises(ValueError, match=message):
        open_store(pattern)
    # Whoever means only these says so by their names.
    for path in pattern.parent.glob("*.beton*"):
        path.rename(path.with_name(path.name.replace("-of-00004", "")))
    assert len(open_store(pattern)) == 31


def test_numbers_may_begin_at_one_and_lies_cost_nothing(
    tmp_path: Path, photos: list[np.ndarray]
) -> None:
    write(tmp_path / "x-1-of-2.beton", photos[:1])
    with pytest.raises(ValueError, match=r"1 of 2 shards are missing: .*x-2-of-2\.beton"):
        open_store(tmp_path / "*.beton")
    write(tmp_path / "x-2-of-2.beton", photos[:1])
    assert len(open_store(tmp_path / "*.beton")) == 2
    write(tmp_path / "y-0-of-999999999999999.beton", photos[:1])
    with pytest.raises(ValueError, match="999,999,999,999,998 of 999,999,999,999,999 shards"):
        open_store(tmp_path / "*.beton")


def test_a_damaged_shard_is_named(pattern: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = shards_of(pattern)[2]
    at = int(BetonStore(path)._ptrs[5]) + 30
    data = bytearray(path.read_bytes())
    data[at] ^= 8
    path.write_bytes(data)
    store = open_store(pattern)
    with pytest.raises(DamagedData, match=r"train-00002-of-00004\.beton: sample 5: wrong check"):
        store.read(22 + 5)
    assert main(["--check", str(pattern)]) == 1
    told = capfd.readouterr().out
    assert "train-00002-of-00004.beton: sample 5: wrong checksum" in told
    assert told.endswith("*.beton: 1 fault(s)\n")
    os.truncate(path, len(data) - 1)
    with pytest.raises(DamagedData, match=r"train-00002-of-00004\.beton: 17 samples, allocation"):
        open_store(pattern)


def test_check_of_whole_shards(pattern: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", str(pattern)]) == 0
    assert capfd.readouterr().out.endswith("*.beton: no fault(s)\n")
    assert main(["--check", str(pattern.with_name("none*"))]) == 1
    assert "no file matches this pattern" in capfd.readouterr().err


def test_a_file_of_that_very_name_is_no_pattern(tmp_path: Path, photos: list[np.ndarray]) -> None:
    path = write(tmp_path / "a[1].beton", photos[:2])
    assert isinstance(open_store(path), BetonStore)
    assert shards.is_pattern(tmp_path / "a[2].beton")


def test_home_in_a_pattern(pattern: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pattern.parent))
    assert len(open_store("~/*.beton")) == 40


# ------------------------------------------------------------------ few files open at once


def test_more_shards_than_files_that_may_be_open(photos: list[np.ndarray], tmp_path: Path) -> None:
    """In a process that may have 64 files open, 300 shards are read by eight threads."""
    for i in range(300):
        write_beton(tmp_path / f"{i:03}.beton", [photos[i % 40][:9, :9]], [i], page=1 << 13)
    code = """
import random, resource, sys, threading
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from pipelines import open_store
store = open_store(sys.argv[1])
assert store.labels.tolist() == list(range(300))
good = [store.read(i).tobytes() for i in range(300)]
wrong = []
def read(seed):
    for i in random.Random(seed).choices(range(300), k=2000):
        if store.read(i).tobytes() != good[i]:
            wrong.append(i)
threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not wrong
assert len({data for data in good}) == 40
n_open = len(list(Path("/proc/self/fd").iterdir()))
assert n_open < 40, n_open
store.close()
assert len(list(Path("/proc/self/fd").iterdir())) <= n_open - 16
"""
    command = [sys.executable, "-c", code, str(tmp_path / "*.beton")]
    subprocess.run(command, check=True, timeout=300)


def test_a_file_that_was_replaced_is_not_opened_again(tmp_path: Path) -> None:
    among = OpenFiles(most=1)
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 100)
    a = Handle(tmp_path / "a", among)
    b = Handle(tmp_path / "b", among)
    assert len(among) == 1
    assert a.read(3, 97) == b"aaa"
    assert b.read(9, 97) == b"bbb"  # what there is
    (tmp_path / "new").write_bytes(b"c" * 100)
    (tmp_path / "new").rename(tmp_path / "a")
    with pytest.raises(DamagedData, match="a: was changed while it was in use"):
        a.read(3, 0)
    assert b.read(1, 0) == b"b"
    b.close()
    with pytest.raises(ValueError, match="is closed"):
        b.read(1, 0)
    assert len(among) == 0


def test_a_file_is_not_closed_while_a_thread_reads_it(tmp_path: Path) -> None:
    """Its number would become another file's, whose bytes would be taken for its own."""
    (tmp_path / "a").write_bytes(b"a" * 100)
    (tmp_path / "b").write_bytes(b"b" * 100)
    among = OpenFiles(most=1)
    a = Handle(tmp_path / "a", among)
    opened = a._opened()
    Handle(tmp_path / "b", among).read(1, 0)  # a had to make room
    assert among.find(a) is None
    assert os.pread(opened.file.fileno(), 3, 0) == b"aaa"
    descriptor = opened.file.fileno()
    del opened
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_most_open_files_follow_the_limit() -> None:
    from pipelines.sources.handles import MOST_OPEN, _a_quarter_of_the_limit

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert _a_quarter_of_the_limit() == 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert 16 <= _a_quarter_of_the_limit() <= MOST_OPEN


# ------------------------------------------------------------------ loaders


def test_a_loader_shows_shards_and_names_them(divided: Path, pattern: Path) -> None:
    def shown(store: pipelines.Store) -> np.ndarray:
        plan = eval_plan(store.heights, store.widths, size=32, resize=32, batch=8)
        loader = open_loader("reference", store, size=32)
        return np.concatenate([batch.images.numpy().copy() for batch in loader.load(plan)])

    whole = shown(open_store(divided / "whole.beton"))
    np.testing.assert_array_equal(shown(open_store(pattern)), whole)
    # Without checksums the decoder notices, and names the file and the number there.
    path = shards_of(pattern)[1]
    for each in shards_of(pattern):
        sidecar_path(each).unlink()
    data = bytearray(path.read_bytes())
    at = int(BetonStore(path)._ptrs[2])
    data[at + 30 : at + 300] = bytes(270)
    path.write_bytes(data)
    with pytest.raises(DamagedData, match=r"train-00001-of-00004\.beton: sample 2: "):
        shown(open_store(pattern))


def test_shards_of_different_kinds(tmp_path: Path, photos: list[np.ndarray]) -> None:
    """Modes are the samples', so shards may differ; what a back end cannot show it refuses."""
    write_beton(tmp_path / "1.beton", [as_jpeg(photos[0]), photos[1]], [0, 1])
    write_fields(tmp_path / "2.beton", planes_columns(photos[2:4], [2, 3]))
    store = open_store(tmp_path / "*.beton")
    assert store.modes.tolist() == [0, 1, 2, 2]
    assert store.labels.tolist() == [0, 1, 2, 3]
