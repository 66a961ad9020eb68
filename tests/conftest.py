"""What several test files share: small images as folders and as `.beton` files, seeds, a whole run.

A run of seconds and its command are in `run/runs.py`.
"""

from __future__ import annotations

import gc
import inspect
import io
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from fap.signals import SIGNALS
from pipelines.jpeg import jpeg_sides
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_layout import ALLOCATION, FIELD, HEADER, IMAGE
from pipelines.store import JPG, RAW

PAGE = 2 << 20  # bytes, as in FFCV's own files


# ------------------------------------------------------------------ the test process


def heed_signals() -> None:
    """Take signals as usual, and so do all processes that tests start.

    Started in the background or under nohup, pytest ignores them.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            continue
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        else:
            signal.signal(number, signal.SIG_DFL)


heed_signals()


def pytest_collection_finish() -> None:
    """What the imports made stays, so the garbage collector need not look through it again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Free the models of the tests before, which hold themselves: else they come to gigabytes.

    A model is few objects, which Python counts, and much memory, which it does not.
    """
    if item.get_closest_marker("slow"):
        gc.collect()


# A busy machine stops for longer than hypothesis grants an example: 0.2 seconds.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def wait_until_it_listens(process: subprocess.Popen[str]) -> None:
    """Until a command that was just started has its own handlers: Python's leave SIGTERM alone."""
    status = Path(f"/proc/{process.pid}/status")
    while True:
        assert process.poll() is None, "ended before it listened"
        caught = int(status.read_text().partition("SigCgt:")[2].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


# Triton's interpreter runs the kernels on the CPU. It must be chosen before they are imported, so
# nothing above may import them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def needs_the_norm_kernel() -> None:
    """Skip the test if the Triton kernels can be neither compiled nor interpreted here."""
    if torch.cuda.is_available():
        return
    import triton
    from triton.runtime import interpreter

    source = inspect.getsource(interpreter)
    reason = interpreter_mismatch(source, triton.__version__, np.__version__)
    if reason:
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


@pytest.fixture
def seed() -> int:
    """Another one each time; `SEED=n pytest ...` repeats a draw."""
    value = int(os.environ.get("SEED") or random.SystemRandom().randrange(2**31))
    print(f"SEED={value}")  # shown when the test fails
    torch.manual_seed(value)
    random.seed(value)
    return value


# ------------------------------------------------------------------ images


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): smooth colours, a little texture, as kind to an encoder as a photo is."""
    coarse = rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return (smooth + rng.normal(0, 2, smooth.shape)).clip(0, 255).astype(np.uint8)


def as_jpeg(image: np.ndarray, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


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


# ------------------------------------------------------------------ .beton files


def write_beton(
    path: Path, samples: Sequence[bytes | np.ndarray], labels: Sequence[int], *, page: int = PAGE
) -> Path:
    """A `.beton` as FFCV writes it: bytes become JPEG samples, arrays (H, W, 3) raw ones.

    Header, two field descriptors, one row for each sample; then pages of samples, none of which
    crosses from one page to the next; then the allocations.
    """
    n = len(samples)
    row = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
    table = np.zeros(n, row)
    allocations = np.zeros(n, ALLOCATION)
    first = _next_page(HEADER.itemsize + 2 * FIELD.itemsize + table.nbytes, page)
    pages = bytearray()
    for i, (sample, label) in enumerate(zip(samples, labels, strict=True)):
        if isinstance(sample, bytes):
            mode, data, sides = JPG, sample, jpeg_sides(sample)
            assert sides is not None
        else:
            mode, data, sides = RAW, sample.tobytes(), sample.shape[:2]
        at = first + len(pages)
        if at // page != (at + len(data) - 1) // page:
            at = _next_page(at, page)
            pages.extend(bytes(at - first - len(pages)))
        pages.extend(data)
        height, width = sides
        table[i] = ((mode, width, height, at), label)
        allocations[i] = (i, at, len(data))
    end = _next_page(first + len(pages), page)

    header = np.array([(2, 2, page, n, end)], HEADER)  # version 2, two fields
    fields = np.zeros(2, FIELD)
    fields["type_id"] = 2, 1  # FFCV's RGB image, and integer
    for field, name in zip(fields, (b"image", b"label"), strict=True):
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    # FFCV's table is not sorted either.
    allocations = allocations[np.random.default_rng(0).permutation(n)]
    head = header.tobytes() + fields.tobytes() + table.tobytes()
    body = head.ljust(first, b"\0") + bytes(pages).ljust(end - first, b"\0")
    path.write_bytes(body + allocations.tobytes())
    return path


def _next_page(at: int, page: int) -> int:
    """Where a page begins, at or after `at`."""
    return (at + page - 1) // page * page


def noise_beton(path: Path, seed: int, count: int, classes: int = 10, side: int = 32) -> Path:
    """Raw noise, square images; labels 0, 1, ... in turn. Count and shapes alone fix its tables."""
    rng = np.random.default_rng(seed)
    images = list(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8))
    return write_beton(path, images, [i % classes for i in range(count)])


LABELS_OF_PHOTOS = [i // 10 for i in range(40)]


@pytest.fixture(scope="session")
def jpeg_beton(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bytes of `jpeg_folder` as a `.beton` without a sidecar."""
    path = tmp_path_factory.mktemp("jpeg") / "train.beton"
    return write_beton(path, [as_jpeg(image) for image in photos], LABELS_OF_PHOTOS)


@pytest.fixture(scope="session")
def raw_beton(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos as raw samples of mixed sizes."""
    return write_beton(tmp_path_factory.mktemp("raw") / "train.beton", photos, LABELS_OF_PHOTOS)


@pytest.fixture(scope="session")
def mixed_beton(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other photo raw, the rest JPEG."""
    samples = [as_jpeg(image) if i % 2 else image for i, image in enumerate(photos)]
    return write_beton(tmp_path_factory.mktemp("mixed") / "train.beton", samples, LABELS_OF_PHOTOS)


@pytest.fixture(scope="session")
def tiny_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR's shape: 96 raw images of 32x32, labels 0-9."""
    return noise_beton(tmp_path_factory.mktemp("tiny") / "train.beton", seed=1, count=96)


@pytest.fixture
def jpeg_store(jpeg_beton: Path) -> BetonStore:
    return BetonStore(jpeg_beton)


# ------------------------------------------------------------------ a whole run


@pytest.fixture(scope="session")
def uninterrupted(
    tiny_beton: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The last state of a run of `tiny_beton` that nothing happened to."""
    from tests.run import runs  # not at the top: it imports the model, and so the kernels

    folder = tmp_path_factory.mktemp("whole")
    argv = runs.command(*runs.words(tiny_beton, folder))
    done = subprocess.run(argv, env=runs.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return runs.final_state(folder / runs.RUN)
