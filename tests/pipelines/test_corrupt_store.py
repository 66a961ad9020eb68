"""Images corrupted as they are stored: twin is `corrupt` on what Pillow decodes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from threading import Barrier
from typing import NoReturn

import numpy as np
import pytest
from PIL import Image

import pipelines
from pipelines import corrupt_store
from pipelines.corrupt import corrupt
from pipelines.corrupt_store import CorruptedStore
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.store import JPG, RAW, DamagedData

SIDES = [(40, 60), (64, 33), (50, 50), (41, 120)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs and raw images in turn, of sides that no two share."""
    rng = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("data") / "mixed.beton"
    with BetonWriter(path, len(SIDES)) as writer:
        for i, (height, width) in enumerate(SIDES):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            content, mode = pixels.tobytes(), RAW
            if i % 2 == 0:
                out = BytesIO()
                Image.fromarray(pixels).save(out, "JPEG", quality=90)
                content, mode = out.getvalue(), JPG
            writer.add(Sample(content, mode, height, width), i % 2)
        writer.commit(("a", "b"), {})
    return path


def decoded(store: pipelines.Store, index: int) -> np.ndarray:
    encoded = store.read(index)
    if store.modes[index] == RAW:
        return encoded.reshape(*SIDES[index], 3)
    return np.asarray(Image.open(BytesIO(encoded.tobytes())).convert("RGB"))


@pytest.mark.parametrize("name", ["gaussian_noise", "motion_blur", "jpeg_compression", "fog"])
def test_every_image_is_corrupted_whole_and_by_its_own_number(data: Path, name: str) -> None:
    store = pipelines.open_store(data)
    with ThreadPoolExecutor(2) as pool:
        made = CorruptedStore(store, name=name, severity=3, pool=pool, seed=7)
        for i, sides in enumerate(SIDES):
            want = corrupt(decoded(store, i), name, 3, 7, i)
            got = made.read(i)
            assert got.size == made.sizes[i]
            np.testing.assert_array_equal(got.reshape(*sides, 3), want)
    assert (made.modes == RAW).all()
    assert made.classes == store.classes
    assert made.file(1) == store.file(1)


def test_its_identity_is_that_of_the_images_and_of_what_is_done_to_them(data: Path) -> None:
    store = pipelines.open_store(data)
    settings = (("fog", 1, 0), ("fog", 2, 0), ("snow", 1, 0), ("fog", 1, 1))
    with ThreadPoolExecutor(1) as pool:
        made = [
            CorruptedStore(store, name=name, severity=severity, pool=pool, seed=seed)
            for name, severity, seed in settings
        ]
    identities = [str(one.identity()) for one in made]
    assert len(set(identities)) == 4
    assert all(one.identity().items() >= store.identity().items() for one in made)


def test_loaders_show_the_corrupted_pixels(data: Path) -> None:
    store = pipelines.open_store(data)
    plan = pipelines.eval_plan(store.heights, store.widths, size=32, resize=32, batch=2)
    with ThreadPoolExecutor(2) as pool:
        made = CorruptedStore(store, name="contrast", severity=5, pool=pool)
        seen = {}
        for back_end in ("reference", "ffcv"):
            loader = pipelines.open_loader(back_end, made, size=32)
            seen[back_end] = [batch.images.clone() for batch in loader.load(plan)]
        clean = next(iter(pipelines.open_loader("reference", store, size=32).load(plan)))
    for one, other in zip(seen["reference"], seen["ffcv"], strict=True):
        assert (one.int() - other.int()).abs().max() <= 1
    assert seen["reference"][0].float().std() < 0.5 * clean.images.float().std()


def together(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """From here on no image is finished before `n` are worked on."""
    barrier = Barrier(n)

    def waiting(image: np.ndarray, *settings: object, as_coco_c: bool) -> np.ndarray:
        barrier.wait(timeout=60)
        return image

    monkeypatch.setattr(corrupt_store, "corrupt", waiting)


@pytest.mark.parametrize(("batch", "threads"), [(1, 2), (2, 2), (4, 6)])
def test_the_threads_of_a_loader_keep_all_workers_busy(
    data: Path, monkeypatch: pytest.MonkeyPatch, batch: int, threads: int
) -> None:
    """Whatever the batch: a small one is divided among them."""
    together(monkeypatch, 2)
    store = pipelines.open_store(data)
    plan = pipelines.eval_plan(store.heights, store.widths, size=32, resize=32, batch=batch)
    with ThreadPoolExecutor(2) as pool:
        made = CorruptedStore(store, name="fog", severity=1, pool=pool)
        loader = pipelines.open_loader("ffcv", made, size=32, threads=threads)
        assert len(list(loader.load(plan))) == 4 // batch


def test_one_thread_that_reads_many_keeps_all_workers_busy(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pipelines.open_store(data)
    order = [2, 0, 3, 1]
    with ThreadPoolExecutor(4) as pool:
        made = CorruptedStore(store, name="fog", severity=1, pool=pool)
        for found, i in zip(made.read_many(order), order, strict=True):
            np.testing.assert_array_equal(found, made.read(i))
        together(monkeypatch, 4)
        for found, i in zip(made.read_many(order), order, strict=True):
            np.testing.assert_array_equal(found, decoded(store, i).ravel())


def test_what_fails_in_a_corruption_is_no_damage(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as frost without its photos: the images are as good as ever."""

    def lacking(*arguments: object, as_coco_c: bool) -> NoReturn:
        raise ValueError("corruption 'frost' needs photos")

    monkeypatch.setattr(corrupt_store, "corrupt", lacking)
    with ThreadPoolExecutor(1) as pool:
        made = CorruptedStore(pipelines.open_store(data), name="frost", severity=1, pool=pool)
        with pytest.raises(ValueError, match=r"^corruption 'frost' needs photos"):
            made.read(0)


def test_what_is_unknown_or_damaged_is_named(data: Path, tmp_path: Path) -> None:
    store = pipelines.open_store(data)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="corruption 'rain' at severity 3"):
            CorruptedStore(store, name="rain", severity=3, pool=pool)
        with pytest.raises(ValueError, match="at severity 6"):
            CorruptedStore(store, name="fog", severity=6, pool=pool)
        made = CorruptedStore(store, name="fog", severity=1, pool=pool)
        broken = np.frombuffer(b"\xff\xd8 no jpeg", np.uint8)
        store.read = lambda index: broken  # type: ignore[method-assign]
        with pytest.raises(DamagedData, match=r"mixed\.beton: sample 0: "):
            made.read(0)
