"""A tar of class folders, or of tars, trained in place: the store that the folder is."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipelines import DamagedData, open_store
from pipelines.archives.tar import TarTree
from pipelines.sources.folder import FolderStore
from pipelines.sources.tar import TarStore
from tests.pipelines.intake import forms
from tests.pipelines.samples import encoded, exif_of, jpeg, picture

SEED = 4


@pytest.fixture
def files() -> forms.Files:
    """ImageNet's names; a PNG named JPEG, a grey one and a turned one among them."""
    one = forms.WNIDS[2]
    grey = encoded(picture(5).convert("L"), "JPEG", quality=95)
    turned = encoded(picture(6), "JPEG", quality=95, exif=exif_of(6))
    return forms.train_files() | {f"{one}/{one}_3.JPEG": grey, f"{one}/{one}_4.JPEG": turned}


@pytest.mark.parametrize("form", ["class folders", "tars", "made from outside"])
def test_it_is_the_store_that_the_folder_is(form: str, files: forms.Files, tmp_path: Path) -> None:
    members = list(files.items())
    if form == "tars":
        members = list(forms.class_tars(files, tmp_path).items())
    if form == "made from outside":
        members = [(f"./train/{name}", data) for name, data in members]
    path = forms.tar(members, tmp_path / "x.tar")
    folder = open_store(forms.folders(files, tmp_path / "folder"))
    for _ in range(2):  # the second time from the index
        store = open_store(path)
        assert isinstance(store, TarStore)
        assert store.classes == folder.classes
        for name in ("labels", "sizes", "heights", "widths", "modes"):
            assert np.array_equal(getattr(store, name), getattr(folder, name))
            assert getattr(store, name).dtype == getattr(folder, name).dtype
        for i in np.random.default_rng(SEED).permutation(len(folder)).tolist():
            assert store.read(i).tobytes() == folder.read(i).tobytes()
        assert store.identity() == folder.identity()
        assert store.files() == [path]  # a member has no date of its own
        store.close()


def test_the_index_saves_headers_and_notices_another_tar(
    files: forms.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = forms.tar(files.items(), tmp_path / "x.tar")
    TarStore(path)
    assert (tmp_path / ".x.tar.fap-index.npz").exists()
    scanned = []
    sides = TarStore._sides

    def watched(store: TarStore, index: int) -> tuple[int, int]:
        scanned.append(index)
        return sides(store, index)

    monkeypatch.setattr(TarStore, "_sides", watched)
    TarStore(path)
    assert not scanned
    forms.tar(list(files.items())[:-1], path)
    assert len(TarStore(path)) == len(scanned) == len(files) - 1
    (tmp_path / ".x.tar.fap-index.npz").write_bytes(b"PK damaged")
    assert len(TarStore(path)) == len(files) - 1


def test_damage_names_the_member(files: forms.Files, tmp_path: Path) -> None:
    path = forms.tar(files.items(), tmp_path / "x.tar")
    store = TarStore(path)
    tree = TarTree(path)
    with path.open("r+b") as file:
        file.seek(int(tree.positions[0]))
        file.write(b"no JPEG")
    damaged = f"x.tar/{tree.names[0]}: sample "
    number = [store.file(i).name for i in range(len(store))].index(Path(tree.names[0]).name)
    with pytest.raises(DamagedData, match=damaged):
        store.read(number)
    with pytest.raises(ValueError, match=r"1 files cannot be used"):
        TarStore(path)
    os.truncate(path, int(tree.positions[0]) + 9)
    with pytest.raises(DamagedData, match=damaged):
        store.read(number)
    with pytest.raises(ValueError, match=r"x\.tar: a damaged or truncated tar"):
        TarStore(path)


def test_shards_are_converted_and_flat_tars_need_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(SEED)
    folder = forms.shards(forms.train_files(), tmp_path, rng, 1)
    with pytest.raises(ValueError, match="WebDataset shards are not read in place: convert them"):
        open_store(folder / "imagenet-000000.tar")
    flat = forms.tar([("1.JPEG", jpeg(1))], tmp_path / "flat.tar")
    with pytest.raises(ValueError, match="no images under CLASS/IMAGE"):
        open_store(flat)
    with pytest.raises(ValueError, match=r"expected a \.beton file.* a tar of class folders"):
        open_store(forms.tar([("1.JPEG", jpeg(1))], tmp_path / "x.tar.gz", "w:gz"))


def test_accepted_by_content(files: forms.Files, tmp_path: Path) -> None:
    path = forms.tar(files.items(), tmp_path / "no suffix")
    assert isinstance(open_store(path), TarStore)
    old = tmp_path / "old.tar"
    with tarfile.open(old, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(forms.folders(files, tmp_path / "f"), "f")
    assert len(open_store(old)) == len(open_store(tmp_path / "f"))
    assert isinstance(open_store(tmp_path / "f"), FolderStore)
