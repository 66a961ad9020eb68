"""Corruptions: against the reference package where it is faithful, else against a slow statement of
the definition.
"""

import contextlib
import multiprocessing
import multiprocessing.synchronize
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates, zoom

from pipelines import Batch
from pipelines.corrupt import CONSTANTS, NAMES, _glass_blur, _plasma, _zoom, corrupt
from pipelines.corrupt_batches import Workers, corrupted

RANDOM_DRAWS = {
    "fog",
    "frost",
    "snow",
    "motion_blur",
    "spatter",
}  # a few numbers decide the whole image


def photo(rng: np.random.Generator, side: int) -> np.ndarray:
    """A photo's spectrum (about 1/f), contrast and correlated channels."""
    f = np.fft.fftfreq(side)[:, None] ** 2 + np.fft.fftfreq(side) ** 2
    f[0, 0] = 1
    planes = np.fft.ifft2(np.fft.fft2(rng.standard_normal((4, side, side))) / f**0.6).real
    x = np.moveaxis(planes[:3] * 0.4 + planes[3], 0, 2)
    x = (x - x.mean((0, 1))) / x.std((0, 1)) * 50 + rng.uniform(100, 140)
    return x.clip(0, 255).astype(np.uint8)


def decibels_apart(
    ours: list[np.ndarray], theirs: list[np.ndarray], clean: list[np.ndarray]
) -> float:
    """Difference of PSNR against the clean images, over all of them."""

    def mse(images: list[np.ndarray]) -> float:
        return float(
            np.mean([(a.astype(float) - b) ** 2 for a, b in zip(images, clean, strict=True)])
        )

    return abs(10 * np.log10(mse(ours) / mse(theirs)))


@pytest.fixture(scope="module")
def package():
    """The package's function with the published generators' choice of five frost photos; it draws
    from six.
    """
    reference = pytest.importorskip("imagecorruptions")
    randint = np.random.randint

    def call(image: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
        np.random.seed(seed)
        if name == "frost":
            np.random.randint = lambda *a: randint(5) if a == (6,) else randint(*a)
        try:
            kwargs = {"seed": seed} if name in ("glass_blur", "impulse_noise") else {}
            return reference.corrupt(image, severity, name, **kwargs)
        finally:
            np.random.randint = randint

    return call


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n != "elastic_transform" and n not in RANDOM_DRAWS]
)
def test_psnr_of_the_reference_package(package, name):
    rng = np.random.default_rng(1)
    clean = [photo(rng, 224) for _ in range(2)]
    for severity in range(1, 6):
        ours = [corrupt(x, name, severity, index=i) for i, x in enumerate(clean)]
        theirs = [package(x, name, severity, i) for i, x in enumerate(clean)]
        assert decibels_apart(ours, theirs, clean) < 0.5, severity
        if name in (
            "defocus_blur",
            "brightness",
            "contrast",
            "jpeg_compression",
            "gaussian_blur",
            "saturate",
        ):
            assert np.abs(np.subtract(ours, theirs, dtype=int)).max() <= 1  # nothing is drawn


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RANDOM_DRAWS))
def test_psnr_of_the_reference_package_over_many_draws(package, name):
    rng = np.random.default_rng(2)
    clean = [photo(rng, 224) for _ in range(8)] * 20
    for severity in range(1, 6):
        ours = [corrupt(x, name, severity, index=i) for i, x in enumerate(clean)]
        theirs = [package(x, name, severity, i) for i, x in enumerate(clean)]
        assert decibels_apart(ours, theirs, clean) < 0.5, severity


def slow_elastic(
    image: np.ndarray, amplitude: float, sigma: float, jitter: float, rng: np.random.Generator
) -> np.ndarray:
    """Affine jitter of three points, then a smoothed random displacement: per coordinate, by scipy
    alone.
    """
    n = len(image)
    mid, arm = n // 2, n // 3
    points = np.array(
        [(mid + arm, mid + arm), (mid + arm, mid - arm), (mid - arm, mid - arm)], float
    )  # x, y
    moved = points + rng.uniform(-jitter, jitter, points.shape)
    to_source = np.linalg.solve(np.c_[moved, np.ones(3)], points)  # moved x, y, 1 -> x, y
    dx, dy = (
        gaussian_filter(rng.uniform(-1, 1, (n, n)), sigma, truncate=3) * amplitude for _ in range(2)
    )
    y, x = np.mgrid[:n, :n]
    affine = np.moveaxis(np.stack([x, y, np.ones_like(x)], 2) @ to_source, 2, 0)[::-1]
    out = np.empty(image.shape)
    for k in range(3):
        once = map_coordinates(image[..., k] / 255.0, affine, order=1, mode="mirror")
        out[..., k] = map_coordinates(once, [y + dy, x + dx], order=1, mode="reflect")
    return (out.clip(0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize(("side", "unit"), [(224, 244), (32, 32)])
def test_elastic_transform_against_a_slow_statement(side, unit):
    image = photo(np.random.default_rng(3), side)
    for severity in range(1, 6):
        c = np.array(CONSTANTS["elastic_transform"][side == 32][severity - 1]) * unit
        rng = np.random.default_rng(
            [0, 5, NAMES.index("elastic_transform"), severity]
        )  # corrupt's stream
        slow = slow_elastic(image, *c, rng)
        ours = corrupt(image, "elastic_transform", severity, index=5)
        assert (
            np.abs(np.subtract(ours, slow, dtype=int)).mean() < 0.5
        )  # warpAffine rounds positions to 1/32 pixel
        assert decibels_apart([ours], [slow], [image]) < 0.1


def test_glass_blur_is_the_published_loop():
    image, sigma, reach, rounds = photo(np.random.default_rng(4), 40), 0.9, 2, 3

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (sigma, sigma, 0), mode="nearest")

    x = np.floor(blur(image / 255.0) * 255)
    rng = np.random.default_rng(9)
    for _ in range(rounds):
        dx, dy = rng.integers(-reach, reach, (2, (40 - 2 * reach) ** 2))
        places = [
            (h, w) for h in range(40 - reach, reach, -1) for w in range(40 - reach, reach, -1)
        ]
        for (h, w), i, j in zip(places, dy, dx, strict=True):
            x[h, w], x[h + i, w + j] = x[h + i, w + j], x[h, w]  # of views: the published statement
    assert np.allclose(
        _glass_blur(image / 255.0, sigma, reach, rounds, np.random.default_rng(9)), blur(x / 255)
    )


@pytest.mark.parametrize("factor", [1.0, 1.07, 1.3, 2.25, 4.5])
def test_zoom_is_scipys(factor):
    x = np.random.default_rng(5).random((64, 64, 3))
    crop = int(np.ceil(64 / factor))
    top = (64 - crop) // 2
    big = zoom(x[top : top + crop, top : top + crop], (factor, factor, 1), order=1)
    trim = (len(big) - 64) // 2
    assert np.allclose(_zoom(x, factor), big[trim : trim + 64, trim : trim + 64])


def test_plasma_roughness_grows_as_the_decay_shrinks():
    def roughness(decay: float) -> float:
        fields = [_plasma(64, decay, np.random.default_rng(i)) for i in range(20)]
        assert all(f.min() == 0 and f.max() == 1 for f in fields)
        return float(np.mean([np.abs(np.diff(f)).mean() for f in fields]))

    assert roughness(3) < roughness(2) < roughness(1.4)


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("name", NAMES)
def test_deterministic_per_seed_and_another_for_each_image(name, side):
    image = photo(np.random.default_rng(6), side)
    before = image.copy()
    first = corrupt(image, name, 5, seed=1, index=7)
    assert first.dtype == np.uint8
    assert first.shape == image.shape
    assert (image == before).all()
    np.random.seed(0)  # the global generator is not consulted
    assert (first == corrupt(image, name, 5, seed=1, index=7)).all()
    assert (first != image).any()
    others = [corrupt(image, name, 5, seed=1, index=8), corrupt(image, name, 5, seed=2, index=7)]
    fixed = {
        "defocus_blur",
        "zoom_blur",
        "brightness",
        "contrast",
        "pixelate",
        "jpeg_compression",
        "gaussian_blur",
        "saturate",
    }
    assert all((first == other).all() == (name in fixed) for other in others)


@pytest.mark.parametrize("name", NAMES)
def test_small_images_get_cifar10_cs_milder_constants(name, monkeypatch):
    rng = np.random.default_rng(8)
    clean = [photo(rng, 32) for _ in range(30)]
    mild = [corrupt(x, name, 3, index=i) for i, x in enumerate(clean)]
    monkeypatch.setattr("pipelines.corrupt.SMALL", 31)
    harsh = [corrupt(x, name, 3, index=i) for i, x in enumerate(clean)]
    errors = [np.mean(np.subtract(images, clean, dtype=int) ** 2) for images in (mild, harsh)]
    assert errors[0] < 0.9 * errors[1]


def test_published_constants_of_some_cifar10_cs():
    flat = np.full((32, 32, 3), 128, np.uint8)
    noise = np.concatenate([corrupt(flat, "gaussian_noise", 2, index=i) for i in range(20)])
    assert noise.std() == pytest.approx(0.06 * 255, rel=0.03)
    hit = np.concatenate([corrupt(flat, "impulse_noise", 5, index=i) != 128 for i in range(20)])
    assert hit.mean() == pytest.approx(0.07, rel=0.1)
    image = photo(np.random.default_rng(9), 32)
    box = Image.Resampling.BOX
    assert (
        corrupt(image, "pixelate", 5)
        == np.asarray(Image.fromarray(image).resize((20, 20), box).resize((32, 32), box))
    ).all()
    mean = image.mean((0, 1))
    assert np.abs(corrupt(image, "contrast", 5) - ((image - mean) * 0.15 + mean)).max() <= 1


@pytest.mark.parametrize(("name", "severity"), [("rain", 1), ("fog", 0), ("fog", 6)])
def test_unknown_corruption(name, severity):
    with pytest.raises(ValueError, match=f"{name}.*{severity}.*known are gaussian_noise"):
        corrupt(np.zeros((32, 32, 3), np.uint8), name, severity)


def one_buffer(images: np.ndarray, batch: int):
    """Batches in one reused buffer, as loaders give them."""
    buffer = torch.empty(batch, 3, *images.shape[1:3], dtype=torch.uint8)
    labels = torch.empty(batch, dtype=torch.int64)
    for step in range(len(images) // batch):
        buffer.copy_(
            torch.from_numpy(images[step * batch : (step + 1) * batch]).permute(0, 3, 1, 2)
        )
        labels.fill_(step)
        yield Batch(buffer, labels, step)


def test_batches_are_corrupted_by_image_number_in_order():
    images = np.stack([photo(np.random.default_rng(i), 32) for i in range(100)])
    index = np.arange(100).reshape(5, 20)[:, ::-1] + 1000
    with ThreadPoolExecutor(3) as pool:
        batches = list(
            corrupted(
                one_buffer(images, 20), index, name="gaussian_noise", severity=4, seed=11, pool=pool
            )
        )
    assert [b.step for b in batches] == [0, 1, 2, 3, 4]
    for batch in batches:
        assert batch.labels.tolist() == [batch.step] * 20
        for row in (0, 17, 19):
            expected = corrupt(
                images[batch.step * 20 + row],
                "gaussian_noise",
                4,
                seed=11,
                index=index[batch.step, row],
            )
            assert (batch.images[row].permute(1, 2, 0).numpy() == expected).all()


def corrupted_by(workers, n: int = 2) -> torch.Tensor:
    """n batches of 20 images with snow."""
    images = np.stack([photo(np.random.default_rng(i), 32) for i in range(20 * n)])
    index = np.arange(20 * n).reshape(n, 20)
    batches = corrupted(one_buffer(images, 20), index, name="snow", severity=2, pool=workers)
    return torch.stack([batch.images for batch in batches])


@pytest.mark.slow
def test_processes_make_the_same_images():
    with Workers(2, say=pytest.fail) as processes, Workers(0) as thread:
        assert torch.equal(corrupted_by(processes), corrupted_by(thread))
        assert len(multiprocessing.active_children()) == 2


@pytest.mark.parametrize("error", [
    FileNotFoundError(2, "No such file or directory"), OSError(28, "No space left on device"),
    PermissionError(13, "Permission denied"), OSError(38, "Function not implemented"),
    NotImplementedError("no sem_open"), ImportError("no synchronize"),
])  # fmt: skip
def test_without_semaphores_threads_do_the_work(monkeypatch, error):
    """No /dev/shm, a full or a read-only one: what creating a POSIX semaphore then raises."""

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", fails)
    said: list[str] = []
    with Workers(2, say=said.append) as workers, ThreadPoolExecutor(1) as thread:
        assert torch.equal(corrupted_by(workers), corrupted_by(thread))
    assert len(said) == 1
    assert f"no worker processes here ({error})" in said[0]


def test_without_room_for_processes_threads_do_the_work(monkeypatch):
    def fails(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(ProcessPoolExecutor, "submit", fails)
    said: list[str] = []
    with Workers(2, say=said.append) as workers, ThreadPoolExecutor(1) as thread:
        assert torch.equal(corrupted_by(workers), corrupted_by(thread))
    assert len(said) == 1


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_workers_drop_what_waits(processes):
    """An exception, Ctrl-C say, waits for the images in hand: not for the hundreds that were asked
    for.
    """
    images = np.stack([photo(np.random.default_rng(0), 224)] * 200)
    index = np.arange(200).reshape(1, 200)
    workers = Workers(processes)
    corrupted_by(workers, 1)  # started
    begun = time.monotonic()
    workers.submit(corrupt, images[0], "glass_blur", 5).result()
    each = time.monotonic() - begun
    batches = corrupted(one_buffer(images, 200), index, name="glass_blur", severity=5, pool=workers)
    waiting = threading.Thread(target=lambda: list(suppressed(batches)))
    waiting.start()
    time.sleep(0.5)
    begun = time.monotonic()
    workers.__exit__(KeyboardInterrupt, None, None)
    waiting.join(100 * each)
    assert not waiting.is_alive()
    assert (
        time.monotonic() - begun < 8 * each + 1
    )  # a worker has 16 at a time, and 200 were asked for


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_workers_cancel_what_is_still_asked_for(processes):
    def stopping_halfway():
        for number in range(100):
            if number == 50:
                workers.stop()
            yield number

    workers = Workers(processes)
    with pytest.raises(CancelledError):
        workers.map(abs, stopping_halfway())
    never_started = Workers(processes)
    never_started.stop()
    for stopped in (workers, never_started):
        with pytest.raises(CancelledError):
            stopped.submit(abs, -1)
        with pytest.raises(CancelledError):
            stopped.map(abs, [-1])


def suppressed(batches):
    with contextlib.suppress(CancelledError):
        yield from batches


@pytest.mark.slow
def test_workers_of_a_killed_process_end():
    child = """
import multiprocessing, os, signal
from pipelines.corrupt import Workers
workers = Workers(2)
workers.submit(os.getpid).result()
print(*[p.pid for p in multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    out = subprocess.run([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True).stdout
    pids = [int(word) for word in out.split()]
    assert pids
    until = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    """Runs, that is, and is no zombie that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
