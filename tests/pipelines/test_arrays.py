"""CIFAR-10-C's arrays: what is read is what was saved, and nothing else is taken for it."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from pipelines.sources import arrays
from pipelines.sources.arrays import read_npy, read_severity
from pipelines.store import DamagedData

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (35, 8, 8, 3), dtype=np.uint8)
LABELS = np.tile(np.arange(7), 5).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "fog.npy", IMAGES)
    np.save(tmp_path / "labels.npy", LABELS)
    return tmp_path


def test_five_equal_parts(folder: Path) -> None:
    for severity in range(1, 6):
        part = read_severity(folder / "fog.npy", severity)
        assert (part.images == IMAGES[(severity - 1) * 7 : severity * 7]).all()
        assert part.labels.tolist() == list(range(7))
        assert part.labels.dtype == np.int64
    contents = {part.content}
    np.save(folder / "labels.npy", LABELS[::-1])
    contents.add(read_severity(folder / "fog.npy", 1).content)
    np.save(folder / "fog.npy", IMAGES[::-1])
    contents.add(read_severity(folder / "fog.npy", 1).content)
    assert len(contents) == 3


@pytest.mark.parametrize("array", [
    IMAGES,
    np.asfortranarray(IMAGES),
    LABELS.astype(">i4"),
    np.float16(3.5),
    np.zeros((0, 3)),
    np.arange(6).reshape(2, 3).T,
])  # fmt: skip
def test_any_plain_array_is_read_as_numpy_reads_it(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    found, _ = read_npy(tmp_path / "a.npy")
    expected = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(("images", "labels", "message"), [
    (IMAGES.astype(np.float32), LABELS, "float32 of shape"),
    (IMAGES[..., 0], LABELS, "expected uint8"),
    (IMAGES.transpose(0, 3, 1, 2), LABELS, "expected uint8"),
    (IMAGES[:, :0], LABELS, "expected uint8"),
    (IMAGES, LABELS.astype(np.float64), "expected integers"),
    (IMAGES, LABELS[:, None], "expected integers"),
    (IMAGES[:30], LABELS, "30 images, but"),
    (IMAGES[:34], LABELS[:34], "cannot be five severities"),
    (IMAGES[:0], LABELS[:0], "cannot be five severities"),
    (IMAGES, LABELS + 10, "labels 10 to 16"),
    (IMAGES, LABELS.astype(np.int8) - 1, "labels -1 to 5"),
    (IMAGES, np.sort(LABELS), "different labels"),
])  # fmt: skip
def test_other_arrays_are_refused(
    images: np.ndarray, labels: np.ndarray, message: str, folder: Path
) -> None:
    np.save(folder / "fog.npy", images)
    np.save(folder / "labels.npy", labels)
    with pytest.raises(DamagedData, match=message):
        read_severity(folder / "fog.npy", 1)


VERSION_1 = b"\x01\x00"


def header(text: str, version: bytes = VERSION_1) -> bytes:
    length_bytes = 2 if version == VERSION_1 else 4
    length = len(text).to_bytes(length_bytes, "little")
    return b"\x93NUMPY" + version + length + text.encode()


def header_of(descr: str, shape: str) -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}")


PLAIN = "{'descr': '|u1', 'fortran_order': False, 'shape': (35, 8, 8, 3)}"
HOSTILE = {
    "empty": b"",
    "text": b"hello",
    "pickle": pickle.dumps([1, 2, 3]),
    "objects": header_of("'|O'", "(1,)") + pickle.dumps([1]),
    "record": header_of("[('a', '|u1')]", "(1,)") + b"x",
    "subarray": header_of("('|u1', (3,))", "(1,)") + b"xxx",
    "void": header_of("'|V0'", "(99,)"),
    "dates": header_of("'<M8[s]'", "(1,)") + bytes(8),
    "terabytes": header_of("'|u1'", "(1099511627776, 8, 8, 3)") + b"x" * 100,
    "negative": header_of("'|u1'", "(-1, -1)") + b"x",
    "no shape": header("{'descr': '|u1', 'fortran_order': False}"),
    "call": header("__import__('os').system('true')"),
    "deep": header("(" * 900),
    "long": header(PLAIN + " " * 60_000),
    "cut header": header(PLAIN)[:40],
    "version 9": header(PLAIN, b"\x09\x00") + IMAGES.tobytes(),
    "huge digits": header_of("'|u1'", "(" + "9" * 800 + ",)"),
    "unknown type": header_of("'nothing'", "(1,)") + b"x",
    "short": header(PLAIN) + IMAGES.tobytes()[:-1],
    "tail": header(PLAIN) + IMAGES.tobytes() + b"\0",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_a_few_words(name: str, folder: Path) -> None:
    (folder / "fog.npy").write_bytes(HOSTILE[name])
    with pytest.raises(DamagedData) as caught:
        read_severity(folder / "fog.npy", 1)
    assert str(folder / "fog.npy") in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("what", ["fifo", "folder", "/dev/zero"])
@pytest.mark.parametrize("name", ["fog.npy", "labels.npy"])
def test_only_regular_files_are_read(what: str, name: str, folder: Path) -> None:
    path = folder / name
    path.unlink()
    match what:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            path.symlink_to(what)
    with pytest.raises(DamagedData, match=name):
        read_severity(folder / "fog.npy", 1)


def test_files_have_a_largest_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MOST_BYTES", 1000)
    with pytest.raises(DamagedData, match="more than 1,000 bytes"):
        read_severity(folder / "fog.npy", 1)


def test_a_missing_labels_file_is_named(folder: Path) -> None:
    (folder / "labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels\.npy"):
        read_severity(folder / "fog.npy", 1)
