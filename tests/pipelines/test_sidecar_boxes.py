"""Annotations in the sidecar: what is read is what was written, all else is found."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.boxes import BOX_FIELDS, Annotations
from pipelines.sources import sidecar
from pipelines.sources.beton import BetonStore
from pipelines.sources.beton_writer import BetonWriter, Sample
from pipelines.sources.sidecar import Sidecar, parse_sidecar, sidecar_path, sidecar_text
from pipelines.store import JPG, DamagedData
from tests.conftest import as_jpeg, write_beton
from tests.pipelines.random_boxes import random_annotations
from tests.pipelines.samples import add_sidecar, contents, flip_bit, small_beton

CLASSES = ("ant", "bee", "cow", "dog", "emu")


@pytest.fixture
def small(tmp_path: Path, photos: list[np.ndarray]) -> Path:
    return small_beton(tmp_path / "small.beton", photos)


def boxes_of(path: Path) -> Annotations:
    """Random annotations, at least one, for the images of a `.beton`."""
    store = BetonStore(path)
    store.close()
    while True:
        annotations = random_annotations(np.random.default_rng(), store.heights, store.widths)
        if len(annotations.boxes):
            return annotations


def assert_same(found: Annotations | None, expected: Annotations) -> None:
    assert found is not None
    for name in ("first", *BOX_FIELDS):
        values = getattr(found, name)
        assert values.dtype == getattr(expected, name).dtype
        np.testing.assert_array_equal(values, getattr(expected, name))


def test_what_is_read_is_what_was_written(small: Path) -> None:
    annotations = boxes_of(small)
    add_sidecar(small, CLASSES, annotations=annotations)
    store = BetonStore(small)
    assert_same(store.annotations, annotations)
    assert store.classes == CLASSES
    assert store.labels.tolist() == list(range(6))  # though there are only five classes
    none = random_annotations(np.random.default_rng(), store.heights, store.widths, most=0)
    add_sidecar(small, CLASSES, annotations=none)
    assert_same(BetonStore(small).annotations, none)


def test_a_sidecar_without_annotations_is_as_before(small: Path) -> None:
    add_sidecar(small)
    assert BetonStore(small).annotations is None
    content = json.loads(sidecar_path(small).read_text())
    assert list(content) == [
        "version",
        "count",
        "classes",
        "encoding",
        "crc32",
        "tables_crc32",
        "checksum",
    ]
    text = sidecar_text(Sidecar(("a",), {}, np.array([1, 2**32 - 1], np.uint32), 7))
    assert text == (
        '{"version": 2, "count": 2, "classes": ["a"], "encoding": {},'
        ' "crc32": "AQAAAP////8=", "tables_crc32": 7, "checksum": 4003437465}'
    )


def test_the_writer_takes_annotations(tmp_path: Path, photos: list[np.ndarray]) -> None:
    dst = tmp_path / "out.beton"
    heights, widths = np.array([image.shape[:2] for image in photos[:5]]).T
    annotations = random_annotations(np.random.default_rng(), heights, widths)
    with BetonWriter(dst, 5) as writer:
        for i, image in enumerate(photos[:5]):
            writer.add(Sample(as_jpeg(image), JPG, *image.shape[:2]), i)
        writer.commit(CLASSES, {"source": "a test"}, annotations=annotations)
    store = BetonStore(dst)
    assert_same(store.annotations, annotations)
    # As FFCV sees it: an image and an integer, the row's number.
    assert [label for label, _ in contents(dst)] == [0, 1, 2, 3, 4]


def test_labels_are_the_samples_numbers(tmp_path: Path, photos: list[np.ndarray]) -> None:
    path = write_beton(tmp_path / "odd.beton", photos[:6], [0, 1, 2, 4, 3, 5])
    with pytest.raises(DamagedData, match=r"sample 3: .* the label is not the sample's number"):
        add_sidecar(path, CLASSES, annotations=boxes_of(path))
    assert not sidecar_path(path).exists()


# ------------------------------------------------------------------ damage


def changed(annotations: Annotations, **arrays: Any) -> dict[str, str]:
    """The entry of annotations, with other arrays in it."""
    entry = sidecar._annotations_entry(annotations)
    for name, values in arrays.items():
        entry[name] = base64.b64encode(np.asarray(values).tobytes()).decode()
    return entry


def put_entry(path: Path, entry: Any, **others: Any) -> None:
    """Under a checksum that fits: it guards against damage, not against a hostile writer."""
    content = json.loads(sidecar_path(path).read_text()) | {"annotations": entry} | others
    content["checksum"] = sidecar.content_checksum(content)
    sidecar_path(path).write_text(json.dumps(content))


def small_boxes(path: Path) -> Annotations:
    """Two boxes on the first image, one on the last of six."""
    return Annotations(
        first=np.array([0, 2, 2, 2, 2, 2, 3]),
        boxes=np.array([[0, 0, 9, 9], [1, 2, 30, 40], [4, 5, 6, 7]], np.float32),
        classes=np.array([0, 4, 2], np.int32),
        crowd=np.array([False, True, False]),
        area=np.array([81, 500, 3], np.float32),
    )


F4 = np.float32
WRONG = {  # arrays of the entry, and the message
    "a number is missing": (
        {"boxes_per_image": np.array([2, 0, 0, 0, 1], "<u4")},
        "one number per image",
    ),
    "more boxes than there are": (
        {"boxes_per_image": np.array([2, 0, 0, 0, 0, 2], "<u4")},
        "ascend from 0 to the number of boxes, 3",
    ),
    "numbers beyond reason": (
        {"boxes_per_image": np.full(6, 2**32 - 1, "<u4")},
        "ascend from 0 to the number of boxes, 3",
    ),
    "half a box": ({"boxes": np.zeros(10, F4)}, "cannot reshape"),
    "half a number": ({"area": np.zeros(5, np.uint8)}, "buffer size"),
    "a box too few": ({"boxes": np.ones((2, 4), F4)}, r"boxes: float32 \(2, 4\)"),
    "NaN": ({"boxes": np.full((3, 4), np.nan, F4)}, "image 0, box 0: .* is no box"),
    "infinite": ({"boxes": [[0, 0, 1, 1]] * 2 + [[0, 0, np.inf, 1]]}, "image 5, box 0: .* no box"),
    "negative": ({"boxes": [[-1, 0, 1, 1]] * 3}, "image 0, box 0: .* is no box"),
    "upside down": ({"boxes": [[0, 5, 1, 1]] * 3}, "image 0, box 0: .* is no box"),
    "no area": ({"boxes": [[3, 0, 3, 1]] * 3}, "image 0, box 0: .* is no box"),
    "outside": ({"boxes": [[0, 0, 1, 1]] * 2 + [[0, 0, 1, 9999]]}, "image 5, box 0: .* outside"),
    "crowd of 2": ({"crowd": np.array([0, 2, 1], np.uint8)}, "crowd must be 0 or 1"),
    "no such class": ({"classes": np.array([0, 5, 1], "<i4")}, "none of the 5 classes"),
    "a class below 0": ({"classes": np.array([0, -1, 1], "<i4")}, "none of the 5 classes"),
    "an area of NaN": ({"area": np.array([1, np.nan, 1], F4)}, "an area that is none"),
    "an area below 0": ({"area": np.array([1, -1, 1], F4)}, "an area that is none"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arrays_are_damaged_data(what: str, small: Path) -> None:
    arrays, message = WRONG[what]
    if isinstance(arrays.get("boxes"), list):
        arrays = {"boxes": np.array(arrays["boxes"], F4)}
    annotations = small_boxes(small)
    add_sidecar(small, CLASSES, annotations=annotations)
    put_entry(small, changed(annotations))
    assert_same(BetonStore(small).annotations, annotations)
    put_entry(small, changed(annotations, **arrays))
    with pytest.raises(DamagedData, match=rf"small\.beton.*{message}"):
        BetonStore(small)


@pytest.mark.parametrize(
    "entry", [None, 3, [], {}, "AAAA", {"boxes": "AAAA"}, dict.fromkeys(sidecar.STORED, 3)]
)
def test_an_entry_of_another_kind_is_damaged_data(entry: Any, small: Path) -> None:
    add_sidecar(small, CLASSES, annotations=small_boxes(small))
    put_entry(small, entry)
    with pytest.raises(DamagedData, match=r"small\.beton\.json"):
        BetonStore(small)


def test_annotations_without_class_names_are_damaged_data(small: Path) -> None:
    annotations = small_boxes(small)
    add_sidecar(small, CLASSES, annotations=annotations)
    put_entry(small, changed(annotations), classes=None)
    with pytest.raises(DamagedData, match="has annotations, but names no classes"):
        BetonStore(small)


def test_every_flip_is_noticed_or_changes_nothing(small: Path) -> None:
    annotations = boxes_of(small)
    add_sidecar(small, CLASSES, annotations=annotations)
    side = sidecar_path(small)
    good = side.read_bytes()
    first = good.index(b'"annotations"')
    rng = np.random.default_rng()
    n_noticed = 0
    for at in rng.integers(first, len(good), 150).tolist():
        flip_bit(side, at, int(rng.integers(8)))
        try:
            store = BetonStore(small)
        except DamagedData as error:
            assert str(side) in str(error)  # noqa: PT017
            n_noticed += 1
        else:
            assert_same(store.annotations, annotations)
        side.write_bytes(good)
    assert n_noticed > 100


def test_what_a_sidecar_says_comes_back_whatever_it_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        n = int(rng.integers(1, 40))
        sides = rng.integers(1, 32768, (2, n))
        annotations = random_annotations(rng, *sides, n_classes=3)
        crc32 = rng.integers(0, 2**32, n, dtype=np.uint32)
        text = sidecar_text(Sidecar(("x", "y", "z"), {"a": 1}, crc32, 5, annotations))
        found = parse_sidecar(text)
        assert_same(found.annotations, annotations)
        np.testing.assert_array_equal(found.crc32, crc32)


# ------------------------------------------------------------------ what a store says of them


def test_identity_covers_the_annotations(small: Path) -> None:
    seen = set()
    annotations = small_boxes(small)
    for fields in ({}, {"crowd": np.zeros(3, bool)}, {"area": np.ones(3, F4)}):
        arrays = {name: getattr(annotations, name) for name in ("first", *BOX_FIELDS)}
        add_sidecar(small, CLASSES, annotations=Annotations(**arrays | fields))
        seen.add(BetonStore(small).identity()["content"])
    add_sidecar(small)
    seen.add(BetonStore(small).identity()["content"])
    assert len(seen) == 4
    add_sidecar(small, CLASSES, annotations=annotations)
    assert BetonStore(small).identity()["content"] in seen


def test_the_description_shows_the_numbers_that_reveal_a_mistake(small: Path) -> None:
    add_sidecar(small, CLASSES, annotations=small_boxes(small))
    store = BetonStore(small)
    assert store.describe() == [
        "6 images, 2 boxes and 1 crowd boxes, 5 class(es) ant to emu, 0 to 1 boxes per class",
        "4 images without boxes, at most 1 boxes on one image",
        "no boxes of 3 class(es): bee, dog, emu; the labels of the others do not move",
    ]
    store.check_classes()


@pytest.mark.parametrize("classes", [("thing",), ("train", "val")])
def test_any_class_names_are_those_of_boxes(classes: tuple[str, ...], small: Path) -> None:
    """They were given by whoever drew the boxes: no folder was mistaken for a class."""
    annotations = small_boxes(small)
    annotations.classes[:] = 0
    add_sidecar(small, classes, annotations=annotations)
    BetonStore(small).check_classes()
