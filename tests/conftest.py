"""Small images made on the spot: a folder of JPEGs in ImageNet's layout and `.beton` files of them."""

from __future__ import annotations

import inspect
import io
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.jpeg import jpeg_sides
from pipelines.sources.beton import ALLOCATION, FIELD, HEADER, IMAGE, BetonStore
from pipelines.store import JPG, RAW

PAGE = 1 << 21

# Started in the background or under nohup, pytest ignores these, and so would every process that a
# test starts.
if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before the kernels are imported: Triton's interpreter runs them on the CPU
    )


def needs_the_norm_kernel() -> None:
    """Skip the test if the Triton kernels can be neither compiled nor interpreted here."""
    if torch.cuda.is_available():
        return
    import triton
    from triton.runtime import interpreter

    source = inspect.getsource(interpreter)
    if reason := interpreter_mismatch(source, triton.__version__, np.__version__):
        pytest.skip(reason)


def interpreter_mismatch(interpreter: str, triton: str, numpy: str) -> str:
    """Why Triton's interpreter, given as source, cannot run our kernels with this numpy; or "".

    A kernel's `range` asks its bounds for `__index__`. The interpreter of Triton 3.6 keeps a scalar
    as an array of shape (1,) and answers `int(array)`, a TypeError from numpy 2.4 on; that of 3.8
    squeezes the array first.
    """
    asks = "int(self.handle.data)" in interpreter
    if not asks or np.lib.NumpyVersion(numpy) < "2.4.0":
        return ""
    return (
        f"Triton {triton} interprets range() by int() of an array of shape (1,), "
        f"which numpy {numpy} refuses: it takes numpy < 2.4, or Triton 3.8"
    )


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): smooth colours with a little texture, as kind to a JPEG encoder as a photo
    is.
    """
    coarse = rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return (smooth + rng.normal(0, 2, smooth.shape)).clip(0, 255).astype(np.uint8)


def as_jpeg(image: np.ndarray, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_beton(path: Path, samples: Sequence[bytes | np.ndarray], labels: Sequence[int]) -> Path:
    """A `.beton` as FFCV writes it: bytes become JPEG samples, arrays (H, W, 3) raw ones."""
    n = len(samples)
    row = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
    table, allocations = np.zeros(n, row), np.zeros(n, ALLOCATION)
    start = HEADER.itemsize + 2 * FIELD.itemsize + n * row.itemsize
    pages, at = bytearray(), -(-start // PAGE) * PAGE
    first = at
    for i, (sample, label) in enumerate(zip(samples, labels, strict=True)):
        data = sample if isinstance(sample, bytes) else sample.tobytes()
        sides = jpeg_sides(data) if isinstance(sample, bytes) else sample.shape[:2]
        assert sides is not None
        if at // PAGE != (at + len(data) - 1) // PAGE:
            at = -(-at // PAGE) * PAGE
        pages.extend(bytes(at - first - len(pages)))
        pages.extend(data)
        table[i] = ((JPG if isinstance(sample, bytes) else RAW, sides[1], sides[0], at), label)
        allocations[i] = (i, at, len(data))
        at += len(data)
    end = -(-at // PAGE) * PAGE
    header = np.array([(2, 2, PAGE, n, end)], HEADER)
    fields = np.zeros(2, FIELD)
    fields["type_id"] = 2, 1
    for field, name in zip(fields, (b"image", b"label"), strict=True):
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    allocations = allocations[
        np.random.default_rng(0).permutation(n)
    ]  # FFCV's table is not sorted either
    head = header.tobytes() + fields.tobytes() + table.tobytes()
    path.write_bytes(
        head.ljust(first, b"\0") + bytes(pages).ljust(end - first, b"\0") + allocations.tobytes()
    )
    return path


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """40 images of mixed sizes, 48-160 pixels a side, uint8 (H, W, 3)."""
    rng = np.random.default_rng(0)
    return [photo(rng, *rng.integers(48, 161, 2)) for _ in range(40)]


@pytest.fixture(scope="session")
def jpeg_folder(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos as JPEGs in four class folders, ten each, in the order of their names."""
    root = tmp_path_factory.mktemp("folder")
    for i, image in enumerate(photos):
        folder = root / f"n{i // 10:08d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{i:04d}.JPEG").write_bytes(as_jpeg(image))
    return root


@pytest.fixture(scope="session")
def jpeg_beton(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bytes of `jpeg_folder` as a `.beton` without a sidecar."""
    path = tmp_path_factory.mktemp("jpeg") / "train.beton"
    return write_beton(path, [as_jpeg(image) for image in photos], [i // 10 for i in range(40)])


@pytest.fixture(scope="session")
def raw_beton(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos as raw samples of mixed sizes."""
    return write_beton(
        tmp_path_factory.mktemp("raw") / "train.beton", photos, [i // 10 for i in range(40)]
    )


@pytest.fixture(scope="session")
def mixed_beton(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other photo raw, the rest JPEG."""
    samples = [as_jpeg(image) if i % 2 else image for i, image in enumerate(photos)]
    return write_beton(
        tmp_path_factory.mktemp("mixed") / "train.beton", samples, [i // 10 for i in range(40)]
    )


@pytest.fixture(scope="session")
def tiny_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR's shape: 96 raw images of 32x32, labels 0-9."""
    rng = np.random.default_rng(1)
    images = list(rng.integers(0, 256, (96, 32, 32, 3), dtype=np.uint8))
    return write_beton(
        tmp_path_factory.mktemp("tiny") / "train.beton", images, [i % 10 for i in range(96)]
    )


@pytest.fixture
def jpeg_store(jpeg_beton: Path) -> BetonStore:
    return BetonStore(jpeg_beton)
