"""Scenes: deterministic, boxes tight, and nothing of the training scenes in the test scenes."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from bench import scenes
from bench.scenes import CLASSES, LONGER_SIDE, MOST_OBJECTS, MOST_OVERLAP, SIDE, Scenes, Sources
from pipelines import open_store
from pipelines.boxes import BOX_FIELDS, Annotations
from pipelines.sources import cifar10, fashion_mnist
from pipelines.store import RAW

ROOT = Path(__file__).resolve().parents[2]
N = 60  # scenes: among so many there is one with every number of objects
FEW = 10


def made_up_sources(rng: np.random.Generator, dark_photos: bool = False) -> Sources:
    """Blobs of any shape, each of its own, on photographs of noise, or black ones."""
    objects = rng.integers(1, 256, (40, 28, 28), dtype=np.uint8)
    for image in objects:
        height, width = rng.integers(6, 29, 2)
        top = rng.integers(29 - height)
        left = rng.integers(29 - width)
        outside = np.ones((28, 28), bool)
        outside[top : top + height, left : left + width] = False
        image[outside] = 0
        image[top + height // 2, left : left + width] = 255  # never without a bright pixel
    labels = np.arange(40) % len(CLASSES)
    photos = rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    return Sources(objects, labels, photos * (not dark_photos))


@pytest.fixture
def made_of(seed: int) -> Sources:
    return made_up_sources(np.random.default_rng(seed))


def same(a: Scenes, b: Scenes) -> bool:
    if not np.array_equal(a.images, b.images):
        return False
    return same_annotations(a.annotations, b.annotations)


def same_annotations(a: Annotations, b: Annotations) -> bool:
    names = ("first", *BOX_FIELDS)
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


def test_a_scene_is_a_function_of_split_seed_and_number(made_of: Sources, seed: int) -> None:
    whole = scenes.make_scenes("train", FEW, seed, made_of)
    assert same(whole, scenes.make_scenes("train", FEW, seed, made_of))
    fewer = scenes.make_scenes("train", FEW // 2, seed, made_of)
    assert np.array_equal(fewer.images, whole.images[: FEW // 2])
    of_these = whole.annotations.first[FEW // 2]
    assert np.array_equal(fewer.annotations.boxes, whole.annotations.boxes[:of_these])
    for other in (("train", seed + 1), ("test", seed)):
        assert not same(whole, scenes.make_scenes(other[0], FEW, other[1], made_of))


def test_numbers_and_places_of_the_objects(made_of: Sources, seed: int) -> None:
    made = scenes.make_scenes("train", N, seed, made_of)
    assert made.images.shape == (N, SIDE, SIDE, 3)
    assert made.images.dtype == np.uint8
    boxes = made.annotations.boxes
    classes = made.annotations.classes
    first = made.annotations.first
    counts = np.diff(first)
    assert counts.min() >= 1
    assert counts.max() == MOST_OBJECTS
    left, top, right, bottom = boxes.T
    assert (
        (left >= 0).all() and (top >= 0).all() and (right <= SIDE).all() and (bottom <= SIDE).all()
    )
    assert np.array_equal(classes, made_of.labels[made.objects])
    assert set(classes.tolist()) == set(range(len(CLASSES)))
    longer = np.maximum(right - left, bottom - top)
    smallest, largest = LONGER_SIDE
    assert longer.min() >= smallest - 1
    assert longer.max() <= largest
    assert longer.max() > 2 * longer.min()
    for begin, end in pairwise(first):
        for a, b in combinations(boxes[begin:end].tolist(), 2):
            assert scenes.overlap(a, b) <= MOST_OVERLAP


def test_boxes_are_tight(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On black photographs without grain all that is not black belongs to an object."""
    monkeypatch.setattr(scenes, "GRAIN", (0, 0))
    rng = np.random.default_rng(seed)
    made_of = made_up_sources(rng, dark_photos=True)
    made = scenes.make_scenes("train", N, seed, made_of)
    first = made.annotations.first
    scenes_apart = 0
    for i, image in enumerate(made.images):
        mine = slice(*first[i : i + 2])
        boxes = made.annotations.boxes[mine].astype(int)
        drawn = image.any(2)
        for left, top, right, bottom in boxes:
            inside = drawn[top:bottom, left:right]
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
        rest = drawn.copy()
        for left, top, right, bottom in boxes:
            rest[top:bottom, left:right] = False
        assert not rest.any()
        if apart(boxes):
            scenes_apart += 1
            assert drawn.sum() == made.annotations.area[mine].sum()
    assert scenes_apart > N // 4


def apart(boxes: np.ndarray) -> bool:
    pairs = combinations(boxes.tolist(), 2)
    return not any(scenes.overlap(a, b) for a, b in pairs)


def test_a_file_of_scenes(
    tmp_path: Path, made_of: Sources, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "sources", lambda split: made_of)
    file = tmp_path / "train.beton"
    scenes.write_scenes(file, "train", FEW, seed)
    made = scenes.make_scenes("train", FEW, seed, made_of)
    store = open_store(file)
    assert store.classes == CLASSES
    assert set(store.modes) == {RAW}
    assert store.labels.tolist() == list(range(FEW))
    assert store.annotations is not None
    assert same_annotations(store.annotations, made.annotations)
    for i, image in enumerate(made.images):
        assert store.read(i).tobytes() == image.tobytes()
    again = tmp_path / "again.beton"
    scenes.write_scenes(again, "train", FEW, seed)
    assert again.read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        scenes.write_scenes(file, "train", FEW, seed)


def test_grain_is_the_noise_of_a_camera(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    grey = np.full((SIDE, SIDE, 3), 128, np.uint8)
    monkeypatch.setattr(scenes, "GRAIN", (5, 5))
    grainy = scenes._grainy(grey, rng)
    assert grainy.dtype == np.uint8
    assert abs(grainy.mean() - 128) < 0.2
    assert abs(grainy.std() - 5) < 0.2
    for extreme in (0, 255):
        flat = np.full((SIDE, SIDE, 3), extreme, np.uint8)
        assert abs(scenes._grainy(flat, rng).mean() - extreme) < 5  # nothing wraps round


def test_the_splits_come_from_their_own_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def objects(split: str) -> tuple[np.ndarray, np.ndarray]:
        asked.append(("objects", split))
        return np.arange(10, dtype=np.uint8)[:, None, None] + np.zeros((1, 28, 28), np.uint8), (
            np.arange(10)
        )

    def photos(split: str) -> tuple[np.ndarray, np.ndarray]:
        asked.append(("photos", split))
        return np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.int64)

    monkeypatch.setattr(fashion_mnist, "load", objects)
    monkeypatch.setattr(cifar10, "load", photos)
    found = scenes.sources("test")
    assert asked == [("objects", "test"), ("photos", "test")]
    names = [fashion_mnist.CLASSES[image[0, 0]] for image in found.objects]
    assert names == [CLASSES[label] for label in found.labels]
    assert sorted(names) == sorted(CLASSES)


def test_train_and_test_share_no_object() -> None:
    if not list((ROOT / "data" / "fashion_mnist").glob("*-ubyte")):
        pytest.skip("no Fashion-MNIST under data/; `make demo-detection` fetches it")
    root = ROOT / "data" / "fashion_mnist"
    train, _ = fashion_mnist.load("train", root)
    test, _ = fashion_mnist.load("test", root)
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
