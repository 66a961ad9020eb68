"""What every store has in common: identity, description, class names."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.sources.beton import BetonStore
from pipelines.sources.folder import FolderStore
from pipelines.store import RAW, Store, check_class_names
from tests.conftest import as_jpeg, write_beton
from tests.pipelines.samples import add_sidecar, contents, small_beton


@pytest.fixture
def small(tmp_path: Path, photos: list[np.ndarray]) -> Path:
    return small_beton(tmp_path / "small.beton", photos)


def test_identity_is_the_contents_and_not_the_paths(
    photos: list[np.ndarray], tmp_path: Path
) -> None:
    jpegs = [as_jpeg(image) for image in photos]
    labels = [i // 10 for i in range(40)]

    def identity(name: str, samples: list, labels: list[int] = labels) -> dict:
        return BetonStore(write_beton(tmp_path / name, samples, labels)).identity()

    def identity_with_sidecar(name: str, samples: list) -> dict:
        path = write_beton(tmp_path / name, samples, labels)
        add_sidecar(path, tuple("abcd"))
        return BetonStore(path).identity()

    here = identity("a.beton", jpegs)
    assert identity("b.beton", jpegs) == here
    assert here["count"] == 40
    assert here["classes"] is None
    assert identity("e.beton", jpegs, labels[::-1])["content"] != here["content"]
    # Raw and of one size: the tables are equal whatever the pixels.
    raw = [np.ascontiguousarray(image[:48, :48]) for image in photos]
    turned = [image[::-1].copy() for image in raw]
    assert identity("c.beton", raw)["content"] != identity("d.beton", turned)["content"]
    checked = identity_with_sidecar("f.beton", jpegs)
    one_changed = identity_with_sidecar("g.beton", [*jpegs[1:], jpegs[0]])
    assert checked["classes"] == tuple("abcd")
    assert checked["content"] != one_changed["content"]


def test_a_copied_folder_is_the_same_data(jpeg_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(jpeg_folder, tmp_path / "copy", copy_function=shutil.copyfile)
    here = FolderStore(jpeg_folder).identity()
    assert FolderStore(copy).identity() == here
    first = sorted(copy.rglob("*.JPEG"))[0]
    content = bytearray(first.read_bytes())
    content[-10] ^= 1
    first.write_bytes(content)
    assert FolderStore(copy).identity()["content"] != here["content"]
    first.rename(first.with_name("zzz.JPEG"))
    assert FolderStore(copy).identity()["content"] != here["content"]


class PlainStore(Store):
    """Grey images of one pixel, with nothing that it need not have."""

    def __init__(self, path: str, levels: list[int], labels: list[int]) -> None:
        super().__init__(path)
        self.classes = None
        self.levels = levels
        self.labels = np.array(labels, np.int64)
        self.heights = np.ones(len(labels), np.int32)
        self.widths = np.ones(len(labels), np.int32)
        self.modes = np.full(len(labels), RAW, np.uint8)
        self.sizes = np.full(len(labels), 3, np.int64)

    def read(self, index: int) -> np.ndarray:
        return np.full(3, self.levels[index], np.uint8)


def test_a_store_that_says_no_more_than_it_must_has_an_identity() -> None:
    here = PlainStore("here", [5, 6, 7], [0, 1, 2])
    assert PlainStore("there", [5, 6, 7], [0, 1, 2]).identity() == here.identity()
    assert PlainStore("here", [5, 6, 8], [0, 1, 2]).identity() != here.identity()
    assert PlainStore("here", [5, 6, 7], [0, 2, 1]).identity() != here.identity()
    assert here.file(2) == Path("here")
    assert not here.accepts(Path("here"))


def test_describe_shows_the_numbers_that_reveal_a_mistake(small: Path) -> None:
    assert BetonStore(small).describe() == [
        "6 images, labels 0 to 5 without class names, 1 images per class"
    ]
    add_sidecar(small, (*"abcdef", "g\n"), {"skipped": ["g/1.JPEG"]})
    opened = BetonStore(small)
    assert opened.describe() == [
        "6 images, 7 class(es) a to g\\n, 0 to 1 images per class",
        "no images of 1 class(es): g\\n; the labels of the others do not move",
    ]
    assert opened.notes == (f"1 damaged images were left out when {small} was made",)


@pytest.mark.parametrize(
    ("classes", "odd"),
    [
        (["train", "val"], True),
        (["Train2017", "dogs"], True),
        (["annotations", "images", "labels", "test", "val"], True),
        (["n01440764"], True),
        (["validation"], True),
        (["bus", "car", "train"], False),  # vehicles
        (["cat", "dog"], False),
        (["0", "1", "10", "2"], False),
    ],
)
def test_class_names_that_are_parts_of_a_data_set(
    classes: list[str], odd: bool, small: Path
) -> None:
    def refused_if(condition: bool, message: str) -> contextlib.AbstractContextManager[object]:
        if condition:
            return pytest.raises(ValueError, match=message)
        return contextlib.nullcontext()

    hint = r"data: .*(give data/|folder per class).*--allow-odd-classes"
    with refused_if(odd, hint):
        check_class_names(Path("data"), classes)
    jpegs = [data for _, data in contents(small)[:4]]
    path = write_beton(small.with_name("odd.beton"), jpegs, [0] * 4)
    for allowed in (False, True):
        add_sidecar(path, tuple(classes), {"allow_odd_classes": allowed})
        with refused_if(odd and not allowed, r"odd\.beton"):
            BetonStore(path).check_classes()
