"""Every form in which people hold ImageNet makes the `.beton` that its class folders make."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.convert import check
from pipelines.convert_images import convert_images
from pipelines.intake.recognise import Wishes
from pipelines.sources.beton import BetonStore
from tests.pipelines.intake import forms
from tests.pipelines.intake.forms import Files
from tests.pipelines.samples import contents

SEED = 3

# What is held: a path, and what the user says beside it.
Held = tuple[Path | str, Wishes]
Make = Callable[[Files, Path, np.random.Generator], Held]

NOTHING = Wishes()


def folder_in_root(files: Files, root: Path, split: str) -> Held:
    forms.folders(files, root / split)
    return root, Wishes(split)  # type: ignore[arg-type]


def tar_of_tars(files: Files, root: Path) -> Path:
    return forms.tar(forms.class_tars(files, root).items(), root / "ILSVRC2012_img_train.tar")


def kaggle(files: Files, root: Path, rng: np.random.Generator) -> Held:
    forms.folders(files, root / "ILSVRC/Data/CLS-LOC/train")
    forms.folders({"train/n1/1.xml": b"<xml>"}, root / "ILSVRC/Annotations/CLS-LOC")
    (root / "LOC_synset_mapping.txt").write_text("n01440764 tench\n")
    return root, Wishes("train")


def kaggle_zip(files: Files, root: Path, rng: np.random.Generator) -> Held:
    inside = {f"ILSVRC/Data/CLS-LOC/train/{name}": data for name, data in files.items()}
    others = {
        "ILSVRC/Annotations/CLS-LOC/train/n1/1.xml": b"<xml>",
        "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG": b"",
    }
    return forms.zipped(inside | others, root / "imagenet.zip"), Wishes("train")


def torchvision_root(files: Files, root: Path, rng: np.random.Generator) -> Held:
    tar_of_tars(files, root)
    return root, Wishes("train")


def class_tars(files: Files, root: Path, rng: np.random.Generator) -> Held:
    for name, content in forms.class_tars(files, root).items():
        (root / name).write_bytes(content)
    return root, NOTHING


def parquet_root(files: Files, root: Path, rng: np.random.Generator) -> Held:
    forms.parquets(files, root / "data", rng)
    forms.parquets({"n01440764/n01440764_1.JPEG": b"no"}, root / "data", rng, "validation", 1)
    return root, Wishes("train")


def parquet_pattern(files: Files, root: Path, rng: np.random.Generator) -> Held:
    return f"{forms.parquets(files, root, rng)}/train-*.parquet", NOTHING


def from_beton(files: Files, root: Path, rng: np.random.Generator) -> Held:
    forms.folders(files, root / "folders")
    convert_images(root / "folders", root / "first.beton")
    return root / "first.beton", NOTHING


TRAIN: dict[str, Make] = {
    "folders": lambda files, root, rng: (forms.folders(files, root), NOTHING),
    "train and val folders": lambda files, root, rng: folder_in_root(files, root, "train"),
    "tar": lambda files, root, rng: (forms.tar(files.items(), root / "x.tar"), NOTHING),
    "tar, made from outside": lambda files, root, rng: (
        forms.tar([(f"./data/train/{name}", data) for name, data in files.items()], root / "x.tar"),
        NOTHING,
    ),
    "tar of another name": lambda files, root, rng: (
        forms.tar(files.items(), root / "images"),
        NOTHING,
    ),
    "tar.gz": lambda files, root, rng: (
        forms.tar(files.items(), root / "x.tar.gz", "w:gz"),
        NOTHING,
    ),
    "tar.bz2": lambda files, root, rng: (
        forms.tar(files.items(), root / "x.tar.bz2", "w:bz2"),
        NOTHING,
    ),
    "tar.xz of tars": lambda files, root, rng: (
        forms.tar(forms.class_tars(files, root).items(), root / "x.txz", "w:xz"),
        NOTHING,
    ),
    "ILSVRC2012_img_train.tar": lambda files, root, rng: (tar_of_tars(files, root), NOTHING),
    "a tar per class": class_tars,
    "torchvision's root": torchvision_root,
    "zip": lambda files, root, rng: (forms.zipped(files, root / "x.zip"), NOTHING),
    "zip, stored": lambda files, root, rng: (
        forms.zipped(files, root / "x.zip", zipfile.ZIP_STORED),
        NOTHING,
    ),
    "Kaggle's root": kaggle,
    "Kaggle's zip": kaggle_zip,
    "parquet": lambda files, root, rng: (forms.parquets(files, root, rng), NOTHING),
    "parquet, the hub's root": parquet_root,
    "parquet, a pattern": parquet_pattern,
    "WebDataset": lambda files, root, rng: (forms.shards(files, root, rng), NOTHING),
    "WebDataset, one shard": lambda files, root, rng: (
        forms.shards(files, root, rng, 1) / "imagenet-000000.tar",
        NOTHING,
    ),
    "WebDataset, numbers and JSON": lambda files, root, rng: (
        f"{forms.shards(files, root, rng, 3, keys='numbers', labels='json')}/imagenet-*.tar",
        NOTHING,
    ),
    "beton": from_beton,
}


def compare(held: Held, files: Files, tmp_path: Path) -> BetonStore:
    """Convert both, and compare all that a loader gets."""
    wanted_path, found_path = tmp_path / "wanted.beton", tmp_path / "found.beton"
    convert_images(forms.folders(files, tmp_path / "wanted"), wanted_path)
    src, wishes = held
    done = convert_images(src, found_path, wishes=wishes)
    wanted, found = BetonStore(wanted_path), BetonStore(found_path)
    assert found.classes == wanted.classes == forms.WNIDS
    assert found.labels.tolist() == wanted.labels.tolist()
    assert found.crc32 is not None and wanted.crc32 is not None
    assert contents(found_path) == contents(wanted_path)
    assert np.array_equal(found.crc32, wanted.crc32)
    assert np.array_equal(found.heights, wanted.heights)
    assert np.array_equal(found.widths, wanted.widths)
    assert (done["count"], done["skipped"]) == (len(files), [])
    assert check(found_path) == []
    return found


@pytest.mark.parametrize("form", TRAIN)
def test_train(form: str, tmp_path: Path) -> None:
    files = forms.train_files()
    held = tmp_path / "held"
    held.mkdir()
    compare(TRAIN[form](files, held, np.random.default_rng(SEED)), files, tmp_path)


# ------------------------------------------------------------------ val, whose images lie flat


def flat_beside_the_devkit(files: Files, root: Path, rng: np.random.Generator) -> Held:
    forms.folders(forms.devkit_files(files, root), root)
    return forms.flat_folder(files, root / "val"), NOTHING


def devkit_tar(files: Files, root: Path) -> Path:
    path = root / "ILSVRC2012_devkit_t12.tar.gz"
    return forms.tar(forms.devkit_files(files, root).items(), path, "w:gz")


def flat_tar(files: Files, path: Path) -> Path:
    return forms.tar([(forms.file_name(one), data) for one, data in files.items()], path)


def val_tar_with_devkit(files: Files, root: Path, rng: np.random.Generator) -> Held:
    devkit_tar(files, root)
    return flat_tar(files, root / "ILSVRC2012_img_val.tar"), NOTHING


def torchvision_val(files: Files, root: Path, rng: np.random.Generator) -> Held:
    val_tar_with_devkit(files, root, rng)
    return root, Wishes("val")


def named_devkit(files: Files, root: Path, rng: np.random.Generator) -> Held:
    (root / "elsewhere").mkdir()
    devkit = devkit_tar(files, root / "elsewhere")
    return forms.flat_folder(files, root / "val"), Wishes(labels=devkit)


def kaggle_val(files: Files, root: Path, rng: np.random.Generator) -> Held:
    forms.flat_folder(files, root / "ILSVRC/Data/CLS-LOC/val")
    forms.kaggle_csv(files, root / "LOC_val_solution.csv", rng)
    return root, Wishes("val")


def kaggle_val_alone(files: Files, root: Path, rng: np.random.Generator) -> Held:
    src, _ = kaggle_val(files, root, rng)
    return f"{src}/ILSVRC/Data/CLS-LOC/val", NOTHING


def kaggle_val_zip(files: Files, root: Path, rng: np.random.Generator) -> Held:
    inside = {
        f"ILSVRC/Data/CLS-LOC/val/{forms.file_name(one)}": data for one, data in files.items()
    }
    table = forms.kaggle_csv(files, root / "temporary.csv", rng)
    others = {
        "ILSVRC/Data/CLS-LOC/train/n1/1.JPEG": b"",
        "LOC_val_solution.csv": table.read_bytes(),
    }
    return forms.zipped(inside | others, root / "imagenet.zip"), Wishes("val")


def flat_zip_and_csv(files: Files, root: Path, rng: np.random.Generator) -> Held:
    flat = {forms.file_name(one): data for one, data in files.items()}
    return forms.zipped(flat, root / "val.zip"), Wishes(labels=forms.own_csv(files, root / "a.csv"))


def own(header: bool, delimiter: str) -> Make:
    def make(files: Files, root: Path, rng: np.random.Generator) -> Held:
        labels = forms.own_csv(files, root / "labels.txt", header, delimiter)
        return forms.flat_folder(files, root / "val"), Wishes(labels=labels)

    return make


def parquet_val(files: Files, root: Path, rng: np.random.Generator) -> Held:
    forms.parquets(files, root, rng, "validation", 2)
    return root, NOTHING


VAL: dict[str, Make] = {
    "val folder": lambda files, root, rng: folder_in_root(files, root, "val"),
    "a flat folder beside the devkit": flat_beside_the_devkit,
    "a flat folder and a devkit": named_devkit,
    "ILSVRC2012_img_val.tar": val_tar_with_devkit,
    "torchvision's root": torchvision_val,
    "Kaggle's root": kaggle_val,
    "Kaggle's folder": kaggle_val_alone,
    "Kaggle's zip": kaggle_val_zip,
    "a zip and a CSV": flat_zip_and_csv,
    "CSV": own(True, ","),
    "CSV without header": own(False, ","),
    "tabs": own(True, "\t"),
    "spaces": own(False, " "),
    "parquet": parquet_val,
}


@pytest.mark.parametrize("form", VAL)
def test_val(form: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(SEED)
    files = forms.val_files(rng)
    held = tmp_path / "held"
    held.mkdir()
    compare(VAL[form](files, held, rng), files, tmp_path)


# ------------------------------------------------------------------ labels without ImageNet's names


def test_names_that_hugging_face_noted(tmp_path: Path) -> None:
    files = forms.train_files()
    rng = np.random.default_rng(SEED)
    forms.parquets(files, tmp_path / "p", rng, names=False)
    convert_images(tmp_path / "p", tmp_path / "out.beton")
    store = BetonStore(tmp_path / "out.beton")
    assert store.classes == ("tench, Tinca", "goldfish", "spaniel")
    by_label = {(forms.WNIDS.index(forms.wnid(one)), data) for one, data in files.items()}
    png = forms.WNIDS[1] + "/" + forms.WNIDS[1] + "_18.JPEG"
    found = set(contents(tmp_path / "out.beton"))
    assert by_label - found == {(1, files[png])}  # which was encoded again
    assert np.all(np.diff(store.labels) >= 0)


def test_numbers_as_labels_and_their_names(tmp_path: Path) -> None:
    files = forms.train_files()
    flat = forms.flat_folder(files, tmp_path / "flat")
    lines = [f"{forms.file_name(one)},{forms.WNIDS.index(forms.wnid(one)) + 2}" for one in files]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(lines))
    convert_images(flat, tmp_path / "a.beton", wishes=Wishes(labels=labels))
    store = BetonStore(tmp_path / "a.beton")
    assert store.classes is None
    assert store.labels.tolist() == [2] * 4 + [3] * 4 + [4] * 4
    names = ("a", "b", "c", "d", "e")
    convert_images(flat, tmp_path / "b.beton", wishes=Wishes(labels=labels, classes=names))
    assert BetonStore(tmp_path / "b.beton").classes == names
    with pytest.raises(ValueError, match="holds labels up to 4, --classes 2 names"):
        convert_images(flat, tmp_path / "c.beton", wishes=Wishes(labels=labels, classes=("a", "b")))
    folders = forms.folders(files, tmp_path / "folders")
    with pytest.raises(ValueError, match="names its classes itself"):
        convert_images(folders, tmp_path / "c.beton", wishes=Wishes(classes=names))
