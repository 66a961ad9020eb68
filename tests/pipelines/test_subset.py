"""Some images of a store, and the part that is held out for validation."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

import pipelines
from fap.cli.convert import main as convert
from pipelines.sources.beton import BetonStore
from pipelines.subset import SubsetStore, held_out
from tests.conftest import noise_beton
from tests.pipelines.samples import contents
from tests.run.detections import write_boxes

NUMBERS = np.array([39, 3, 20, 21])


def samples(store: pipelines.Store) -> list[tuple[int, bytes]]:
    """(label, encoded bytes) of every image."""
    return [(int(store.labels[i]), store.read(i).tobytes()) for i in range(len(store))]


def test_a_subset_shows_its_images(jpeg_folder: Path) -> None:
    whole = pipelines.open_store(jpeg_folder)
    subset = SubsetStore(whole, NUMBERS)
    assert len(subset) == 4
    assert subset.classes == whole.classes
    assert subset.labels.tolist() == [3, 0, 2, 2]
    for index, number in enumerate(NUMBERS.tolist()):
        assert subset.read(index).tobytes() == whole.read(number).tobytes()
        assert subset.name_of(index) == whole.name_of(number)
        assert subset.file(index) == whole.file(number)
        for table in ("heights", "widths", "modes", "sizes"):
            assert getattr(subset, table)[index] == getattr(whole, table)[number]
    many = subset.read_many([2, 0])
    assert [data.tobytes() for data in many] == [whole.read(20).tobytes(), whole.read(39).tobytes()]
    for beyond in (-1, 4):
        with pytest.raises(IndexError):
            subset.read(beyond)
    assert subset.files() == whole.files()


def test_its_identity_says_which_images_of_what(jpeg_folder: Path, tmp_path: Path) -> None:
    whole = pipelines.open_store(jpeg_folder)
    identity = SubsetStore(whole, NUMBERS).identity()
    assert SubsetStore(pipelines.open_store(jpeg_folder), NUMBERS).identity() == identity
    assert identity["count"] == 4
    content = identity["content"]
    assert SubsetStore(whole, NUMBERS[::-1]).identity()["content"] != content
    other = pipelines.open_store(noise_beton(tmp_path / "noise.beton", seed=3, count=40, classes=4))
    assert SubsetStore(other, NUMBERS).identity()["content"] != content


def test_what_is_proven_stays_so(jpeg_folder: Path, tmp_path: Path) -> None:
    assert convert([str(jpeg_folder), str(tmp_path / "a.beton")]) == 0
    for path, proven in ((jpeg_folder, False), (tmp_path / "a.beton", True)):
        subset = SubsetStore(pipelines.open_store(path), NUMBERS)
        assert [subset.is_proven(i) for i in range(4)] == [proven] * 4


def test_the_images_held_out_are_those_of_fap_convert(jpeg_folder: Path, tmp_path: Path) -> None:
    """In every form that is read in place."""
    words = [str(jpeg_folder), str(tmp_path / "a.beton"), "--val-split", "0.3"]
    assert convert(words) == 0
    assert convert([str(jpeg_folder), str(tmp_path / "whole.beton")]) == 0
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(jpeg_folder, "photos")
    for path in (jpeg_folder, tmp_path / "whole.beton", tmp_path / "photos.tar"):
        train, val = held_out(pipelines.open_store(path), 0.3)
        assert samples(train) == contents(tmp_path / "a.beton"), path
        assert samples(val) == contents(tmp_path / "a.val.beton"), path
        assert np.bincount(val.labels).tolist() == [3, 3, 3, 3]
        assert "held out of" in val.notes[0]
        assert "0.3 of every class" in val.notes[0]


def test_boxes_follow_their_images(tmp_path: Path) -> None:
    whole = BetonStore(write_boxes(tmp_path / "boxes.beton", seed=1))
    assert whole.annotations is not None
    train, val = held_out(whole, 0.25)
    assert len(val) == 6
    assert sorted([*train.numbers, *val.numbers]) == list(range(24))
    for part in (train, val):
        assert part.annotations is not None
        part.annotations.check(part.heights, part.widths, 3)
        assert part.labels.tolist() == list(range(len(part)))
        for index, number in enumerate(part.numbers.tolist()):
            mine = slice(*part.annotations.first[index : index + 2])
            theirs = slice(*whole.annotations.first[number : number + 2])
            for name in ("boxes", "classes", "crowd", "area"):
                found = getattr(part.annotations, name)[mine]
                np.testing.assert_array_equal(found, getattr(whole.annotations, name)[theirs])
    assert train.identity()["content"] != val.identity()["content"]


def test_where_no_image_can_be_spared_it_is_said(tmp_path: Path) -> None:
    single = noise_beton(tmp_path / "one.beton", seed=1, count=4, classes=4)
    with pytest.raises(ValueError, match=r"one\.beton: no class has two images"):
        held_out(pipelines.open_store(single), 0.2)
