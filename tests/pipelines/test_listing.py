"""Which files are images of which class: random trees against a slow twin and torchvision."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from pipelines.archives.listing import LINKS, SUFFIXES, list_images
from tests.pipelines.image_files import write_folder
from tests.pipelines.trees import is_trap, listed_slowly, put, random_tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images")


def test_random_trees_with_traps_and_links(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    for i in range(30):
        root = tmp_path / f"{i}"
        random_tree(rng, root)
        listing = list_images(root)
        assert listing.classes == ("c 2", "c1", "c10")
        assert [path for path, _ in listing.files] == listed_slowly(root)
        for path, label in listing.files:
            assert path.startswith(f"{root}/{listing.classes[label]}/")


def test_the_order_of_trees_without_traps_is_torchvisions(tmp_path: Path) -> None:
    assert SUFFIXES == IMG_EXTENSIONS
    rng = np.random.default_rng()
    for i in range(20):
        root = tmp_path / f"{i}"
        random_tree(rng, root)
        for folder, inner, files in os.walk(root, topdown=False):
            for name in [*inner, *files]:
                path = Path(folder, name)
                if is_trap(name) and path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif is_trap(name) or path.is_symlink():
                    path.unlink()
        assert list_images(root).files == ImageFolder(str(root)).samples


def test_a_link_to_a_folder_above_multiplies_nothing(folder: Path) -> None:
    before = list_images(folder).files
    for target in (".", "..", "../..", "../../..", "/"):
        (folder / "c" / f"to {target.replace('/', ' ')}").symlink_to(target)
    (folder / "up").symlink_to(".")
    (folder / "c" / "self").symlink_to("self")
    listing = list_images(folder)
    assert listing.files == before
    assert listing.ignored[LINKS] == 6
    beside = folder.parent / "more"
    put(beside / "y.JPEG")
    (folder / "c" / "more").symlink_to(beside)
    (folder / "c" / "again").symlink_to(beside)  # the same folder
    assert [path for path, _ in list_images(folder).files][-2:] == [
        f"{folder}/c/x.JPEG",
        f"{folder}/c/again/y.JPEG",
    ]


def test_links_cannot_make_a_small_tree_a_huge_one(tmp_path: Path) -> None:
    """Two links from each of 30 folders to the next: 2^30 paths."""
    for i in range(30):
        put(tmp_path / "src" / f"{i}" / "0.JPEG")
        for name in "ab":
            (tmp_path / "src" / f"{i}" / name).symlink_to(f"../{(i + 1) % 30}")
    assert len(list_images(tmp_path / "src").files) == 30 * 30


PASSED_OVER = {
    ".avif": ["a/1.avif", "b/2.AVIF"],
    ".jfif": ["b/3.jfif"],
    ".db": ["c/Thumbs.db"],
    "hidden files": ["c/._x.JPEG", "c/.DS_Store", ".x"],
    "files without suffix": ["c/README"],
    "files beside the class folders": ["top.jpg"],
    "@eaDir folders": ["a/@eaDir/x.jpg"],
    "@EADIR folders": ["@EADIR/x.jpg"],
    "hidden folders": ["a/.ipynb_checkpoints/x.jpg"],
    "__MACOSX folders": ["__MACOSX/a/._1.JPEG"],
    "lost+found folders": ["lost+found/x.jpg"],
}


def test_what_is_passed_over_is_listed_by_suffix(folder: Path) -> None:
    wanted = {".txt": 1}
    for sort, names in PASSED_OVER.items():
        wanted[sort] = len(names)
        for name in names:
            put(folder / name)
    put(folder / ".fap-index.npz")  # ours: not told
    listing = list_images(folder)
    assert listing.ignored == wanted
    assert listing.notes()[0].startswith("ignored: 3 hidden files, 2 .avif, 1 ")
    assert len(listing.files) == 5


def test_a_note_is_one_short_line(folder: Path) -> None:
    for i in range(1000):
        put(folder / "a" / f"file.{i:04d}\n")
    (note,) = list_images(folder).notes()
    assert len(note) < 400
    assert note.isprintable()
    assert note.startswith("ignored: 1 .0000\\n, 1 .0001\\n")
    assert note.endswith("991 of 991 other kinds")


def test_an_empty_class_says_what_lies_there_instead(folder: Path) -> None:
    put(folder / "d" / "1.avif")
    (folder / "e").mkdir()
    told = r"no images under d, e: 2 class folder.*\.webp; ignored: 1 \.avif, 1 \.txt"
    with pytest.raises(ValueError, match=told):
        list_images(folder)


def test_a_folder_that_cannot_be_read_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="a/deep"):
        list_images(folder)
