"""Scenes: deterministic, boxes tight, and nothing of the training scenes in the test scenes."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from bench import scenes
from bench.scenes import CLASSES, LONGER_SIDE, MOST_OBJECTS, MOST_OVERLAP, SIDE, Scenes, Sources
from pipelines.sources import cifar10, fashion_mnist

ROOT = Path(__file__).resolve().parents[2]
N = 60


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
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_scene_is_a_function_of_split_seed_and_number(made_of: Sources, seed: int) -> None:
    whole = scenes.make_scenes("train", N, seed, made_of)
    assert same(whole, scenes.make_scenes("train", N, seed, made_of))
    fewer = scenes.make_scenes("train", N // 2, seed, made_of)
    assert np.array_equal(fewer.images, whole.images[: N // 2])
    assert np.array_equal(fewer.boxes, whole.boxes[: whole.first[N // 2]])
    for other in (("train", seed + 1), ("test", seed)):
        assert not same(whole, scenes.make_scenes(other[0], N, other[1], made_of))


def test_numbers_and_places_of_the_objects(made_of: Sources, seed: int) -> None:
    made = scenes.make_scenes("train", N, seed, made_of)
    assert made.images.shape == (N, SIDE, SIDE, 3)
    assert made.images.dtype == np.uint8
    counts = np.diff(made.first)
    assert counts.min() >= 1
    assert counts.max() == MOST_OBJECTS
    assert made.first[-1] == len(made.boxes) == len(made.classes) == len(made.area)
    left, top, right, bottom = made.boxes.T
    assert (
        (left >= 0).all() and (top >= 0).all() and (right <= SIDE).all() and (bottom <= SIDE).all()
    )
    assert np.array_equal(made.classes, made_of.labels[made.objects])
    assert set(made.classes.tolist()) == set(range(len(CLASSES)))
    longer = np.maximum(right - left, bottom - top)
    smallest, largest = LONGER_SIDE
    assert longer.min() >= smallest - 1
    assert longer.max() <= largest
    assert longer.max() > 2 * longer.min()
    for first, end in zip(made.first, made.first[1:], strict=False):
        for a, b in combinations(made.boxes[first:end].tolist(), 2):
            assert scenes.overlap(a, b) <= MOST_OVERLAP


def test_boxes_are_tight(seed: int) -> None:
    """On black photographs all that is not black belongs to an object."""
    rng = np.random.default_rng(seed)
    made_of = made_up_sources(rng, dark_photos=True)
    made = scenes.make_scenes("train", N, seed, made_of)
    scenes_apart = 0
    for i, image in enumerate(made.images):
        boxes = made.boxes[made.first[i] : made.first[i + 1]].astype(int)
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
            assert drawn.sum() == made.area[made.first[i] : made.first[i + 1]].sum()
    assert scenes_apart > N // 4


def apart(boxes: np.ndarray) -> bool:
    pairs = combinations(boxes.tolist(), 2)
    return not any(scenes.overlap(a, b) for a, b in pairs)


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
