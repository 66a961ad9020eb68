"""Hostile, odd and damaged archives: clear errors, nothing written outside, nothing lost."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.archives.tar import MOST_HEADER, StreamedTar, TarTree
from pipelines.archives.tree import Tree
from pipelines.archives.zips import ZipTree
from pipelines.convert import BadImages
from pipelines.convert_images import convert_images
from pipelines.intake.recognise import Wishes, recognise
from pipelines.sources.beton import BetonStore
from pipelines.sources.sidecar import read_sidecar
from tests.pipelines.intake import forms
from tests.pipelines.samples import contents, jpeg, no_trace

SEED = 5
IMAGES = {"cat/1.jpg": jpeg(1), "cat/2.jpg": jpeg(2), "dog/1.jpg": jpeg(3), "dog/2.jpg": jpeg(4)}


def refused(src: Path | str, told: str, tmp_path: Path, wishes: Wishes = Wishes()) -> None:  # noqa: B008
    with pytest.raises(ValueError, match=told) as caught:
        convert_images(src, tmp_path / "out.beton", wishes=wishes)
    assert str(caught.value).isprintable() or isinstance(caught.value, BadImages)
    assert no_trace(tmp_path)


def tar_of(
    members: list[tarfile.TarInfo], path: Path, content: bytes = IMAGES["cat/1.jpg"]
) -> Path:
    """The images, and these members, regular ones with `content`."""
    forms.tar(IMAGES.items(), path)
    with tarfile.open(path, "a") as archive:
        for info in members:
            if info.isreg():
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return path


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


# ------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["../cat/3.jpg", "cat/../../3.jpg", "/tmp/3.jpg", "cat/.."])
def test_names_that_lead_outside(name: str, tmp_path: Path) -> None:
    refused(tar_of([tarfile.TarInfo(name)], tmp_path / "x.tar"), "leads outside", tmp_path)
    refused(forms.zipped(IMAGES | {name: b"x"}, tmp_path / "x.zip"), "leads outside", tmp_path)
    assert not (tmp_path.parent / "3.jpg").exists()


def test_two_files_of_one_name(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "./cat//1.jpg"):
        path = tar_of([tarfile.TarInfo(name)], tmp_path / "x.tar")
        refused(path, r"holds cat/1\.jpg 2 times", tmp_path)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (*IMAGES, "dog/1.jpg"):
            archive.writestr(name, IMAGES[name])
    refused(tmp_path / "x.zip", r"holds dog/1\.jpg 2 times", tmp_path)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """In Latin-1, as old tars have them."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        for name in (*IMAGES, "caf\u00e9/\u00e9\n.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(IMAGES["cat/1.jpg"])
            archive.addfile(info, io.BytesIO(IMAGES["cat/1.jpg"]))
    convert_images(path, tmp_path / "out.beton")
    assert BetonStore(tmp_path / "out.beton").classes == (os.fsdecode(b"caf\xe9"), "cat", "dog")


def test_long_names(tmp_path: Path) -> None:
    files = {f"{'d' * 90}/{'e' * 90}/{'f' * 200}.jpg": jpeg(1)} | IMAGES
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{tar_format}.tar"
        with tarfile.open(path, "w", format=tar_format) as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        assert set(TarTree(path).names) == set(files)
    refused(forms.tar([("x/" * 2500 + "a.jpg", b"")], tmp_path / "x.tar"), "a name of", tmp_path)


# ------------------------------------------------------------------ members that are no files


def test_links_and_devices_are_told_and_hard_links_are_files(tmp_path: Path) -> None:
    members = [
        link("cat/3.jpg", "../dog/1.jpg", tarfile.SYMTYPE),
        link("cat/4.jpg", "/etc/passwd", tarfile.SYMTYPE),
        link("dog/3.jpg", "./cat/2.jpg", tarfile.LNKTYPE),
        link("dog/pipe.jpg", "", tarfile.FIFOTYPE),
        link("dog/device.jpg", "", tarfile.CHRTYPE),
    ]
    done = convert_images(tar_of(members, tmp_path / "x.tar"), tmp_path / "out.beton")
    assert done["ignored"] == {"symbolic links": 2, "special files": 2}
    wanted = [*IMAGES.values(), IMAGES["cat/2.jpg"]]
    assert [data for _, data in contents(tmp_path / "out.beton")] == wanted
    nowhere = tar_of([link("dog/3.jpg", "cat/9.jpg", tarfile.LNKTYPE)], tmp_path / "y.tar")
    with pytest.raises(ValueError, match=r"dog/3\.jpg is a link to cat/9\.jpg, which is not bef"):
        convert_images(nowhere, tmp_path / "none.beton")


def test_links_in_a_zip(tmp_path: Path) -> None:
    path = forms.zipped(IMAGES, tmp_path / "x.zip")
    info = zipfile.ZipInfo("cat/3.jpg")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    done = convert_images(path, tmp_path / "out.beton")
    assert (done["count"], done["ignored"]) == (4, {"symbolic links": 1})


@pytest.mark.parametrize("flagged", [True, False])
def test_names_in_a_zip_are_utf_8(flagged: bool, tmp_path: Path) -> None:
    """Info-ZIP does not say so; others do."""
    files = {name.replace("cat", "caf\u00e9"): content for name, content in IMAGES.items()}
    path = forms.zipped(files, tmp_path / "x.zip")
    if not flagged:
        data = bytearray(path.read_bytes())
        for signature, flags in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):
            at = -1
            while (at := data.find(signature, at + 1)) >= 0:
                data[at + flags] &= ~0x08
        path.write_bytes(data)
        assert not any(info.flag_bits & 0x800 for info in zipfile.ZipFile(path).infolist())
    convert_images(path, tmp_path / "out.beton")
    names = BetonStore(tmp_path / "out.beton").classes
    assert names is not None
    assert "caf\u00e9" in names


def test_a_zip_with_a_password(tmp_path: Path) -> None:
    path = forms.zipped(IMAGES, tmp_path / "x.zip")
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 8  # the flags in the central directory
    data[at] |= 1
    path.write_bytes(data)
    refused(path, r"cat/1\.jpg has a password", tmp_path)


def test_what_lies_about_in_archives_is_told(tmp_path: Path) -> None:
    about = {
        "__MACOSX/cat/._1.jpg": b"",
        "cat/.DS_Store": b"",
        "cat/Thumbs.db": b"",
        "readme.txt": b"",
        "cat/@eaDir/1.jpg": b"",
    }
    wanted = {
        "__MACOSX folders": 1,
        "hidden files": 1,
        ".db": 1,
        "files beside the class folders": 1,
        "@eaDir folders": 1,
    }
    for src in (
        forms.tar((IMAGES | about).items(), tmp_path / "x.tar"),
        forms.zipped(IMAGES | about, tmp_path / "x.zip"),
        forms.folders(IMAGES | about, tmp_path / "folder"),
    ):
        dst = tmp_path / f"{src.name}.beton"
        assert convert_images(src, dst)["ignored"] == wanted
        assert len(contents(dst)) == 4


# ------------------------------------------------------------------ damage


MAKERS: dict[str, Callable[[Path], Path]] = {
    "tar": lambda folder: forms.tar(IMAGES.items(), folder / "x.tar"),
    "tar of tars": lambda folder: forms.tar(
        [("a.tar", forms.as_bytes(lambda path: forms.tar([("1.jpg", jpeg(1))], path), folder))] * 1
        + [("b.tar", forms.as_bytes(lambda path: forms.tar([("1.jpg", jpeg(2))], path), folder))],
        folder / "x.tar",
    ),
    "tar.gz": lambda folder: forms.tar(IMAGES.items(), folder / "x.tar.gz", "w:gz"),
    "tar.xz": lambda folder: forms.tar(IMAGES.items(), folder / "x.tar.xz", "w:xz"),
    "zip": lambda folder: forms.zipped(IMAGES, folder / "x.zip"),
    "parquet": lambda folder: (
        forms.parquets(forms.train_files(), folder, np.random.default_rng(SEED), n_files=1)
        / "train-00000-of-00001.parquet"
    ),
}


@pytest.mark.parametrize("form", MAKERS)
def test_a_truncated_file_is_never_half_a_data_set(form: str, tmp_path: Path) -> None:
    path = MAKERS[form](tmp_path)
    whole = path.read_bytes()
    padding = len(whole) - len(whole.rstrip(b"\0")) if form.startswith("tar") else 0
    rng = np.random.default_rng(SEED)
    blocks = range(0, len(whole) - padding, tarfile.BLOCKSIZE)  # where members end
    cuts = {*rng.integers(0, len(whole) - padding, 40).tolist(), *rng.choice(blocks, 10).tolist()}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError) as caught:
            convert_images(path, tmp_path / "out.beton")
        assert str(path) in str(caught.value)
        assert no_trace(tmp_path)


def test_a_damaged_header_does_not_end_a_tar(tmp_path: Path) -> None:
    """`tarfile` takes it for the end."""
    path = MAKERS["tar"](tmp_path)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        offsets = [member.offset for member in archive]
    for offset in offsets:
        damaged = bytearray(whole)
        damaged[offset + 2] ^= 4
        path.write_bytes(damaged)
        refused(path, "damaged", tmp_path)


def test_several_tars_in_one_file(tmp_path: Path) -> None:
    path = MAKERS["tar"](tmp_path)
    path.write_bytes(path.read_bytes() * 2)
    refused(path, "several tars in one file", tmp_path)


def test_a_file_that_ends_in_zeros_is_a_broken_download(tmp_path: Path) -> None:
    """Room was made for the whole file, and half of it came."""
    files = {f"cat/{i}.jpg": jpeg(i) for i in range(20)} | IMAGES
    path = forms.tar(files.items(), tmp_path / "x.tar")
    with tarfile.open(path) as archive:
        offset = archive.getmember("cat/9.jpg").offset
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + bytes(len(whole) - offset))
    refused(path, "more than 11,264 zeros follow, as after a download that broke off", tmp_path)
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        for count in range(1, 24):  # whatever fills the last record
            with tarfile.open(path, "w", format=kind) as archive:
                for i in range(count):
                    archive.addfile(tarfile.TarInfo(f"{i}"))
            assert len(TarTree(path).names) == count


def test_a_member_without_a_name(tmp_path: Path) -> None:
    path = forms.zipped(IMAGES, tmp_path / "x.zip")
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("", "./", "."):
            archive.writestr(zipfile.ZipInfo(name), b"")
    assert convert_images(path, tmp_path / "out.beton")["count"] == 4


def test_a_header_that_would_take_gigabytes(tmp_path: Path) -> None:
    """A header of extended names may claim any size."""
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("pax")
    info.type = tarfile.XHDTYPE
    info.size = 8 * MOST_HEADER
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(9 * MOST_HEADER))
    refused(path, "a header of 8,388,608 bytes", tmp_path)


def test_data_that_a_zip_has_a_checksum_of(tmp_path: Path) -> None:
    path = forms.zipped(IMAGES, tmp_path / "x.zip", zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    at = data.index(IMAGES["dog/1.jpg"]) + len(IMAGES["dog/1.jpg"]) - 20
    data[at] ^= 1
    path.write_bytes(data)
    refused(path, r"dog/1\.jpg: damaged in its zip: Bad CRC-32", tmp_path)
    done = convert_images(path, tmp_path / "out.beton", skip_bad=True)
    assert done["skipped"] == ["dog/1.jpg"]
    assert [label for label, _ in contents(tmp_path / "out.beton")] == [0, 0, 1]


def test_a_zip_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    path = forms.zipped(IMAGES, tmp_path / "x.zip")
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 24  # the size in the central directory
    data[at : at + 4] = struct.pack("<I", 3 << 30)
    path.write_bytes(data)
    refused(path, r"cat/1\.jpg has 3,221,225,472 bytes, more than", tmp_path)


def test_bad_images_in_an_archive_are_named(tmp_path: Path) -> None:
    files = IMAGES | {"cat/3.jpg": b"no image", "dog/3.jpg": jpeg(9)[:-300]}
    path = forms.tar(files.items(), tmp_path / "x.tar")
    with pytest.raises(BadImages) as caught:
        convert_images(path, tmp_path / "out.beton")
    assert [name for name, _ in caught.value.bad] == [f"{path}/cat/3.jpg", f"{path}/dog/3.jpg"]
    done = convert_images(path, tmp_path / "out.beton", skip_bad=True)
    assert done["skipped"] == ["cat/3.jpg", "dog/3.jpg"]
    sidecar = read_sidecar(tmp_path / "out.beton")
    assert sidecar is not None and sidecar.encoding == done
    assert [data for _, data in contents(tmp_path / "out.beton")] == list(IMAGES.values())


# ------------------------------------------------------------------ forms that are not meant so


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"readme.txt": b""}, "no images under CLASS/IMAGE.JPEG"),
        ({}, "no images under CLASS/IMAGE.JPEG"),
        ({"1.jpg": jpeg(1), "2.jpg": jpeg(2)}, "2 images in no class folders: name their labels"),
        ({"x/y/1.jpg": jpeg(1)}, "the only class is 'y'"),
    ],
)
def test_archives_without_classes(files: dict[str, bytes], told: str, tmp_path: Path) -> None:
    refused(forms.tar(files.items(), tmp_path / "x.tar"), told, tmp_path)
    if files:
        refused(forms.zipped(files, tmp_path / "x.zip"), told, tmp_path)


def test_what_is_no_form_lists_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_bytes(b"no archive")
    for src in (tmp_path / "x.dat", tmp_path / "missing"):
        refused(src, "accepted are class folders, in a folder, a .tar", tmp_path)
    refused(f"{tmp_path}/*.tar", "no file matches", tmp_path)
    refused(f"{tmp_path}/*.dat", "matches x.dat: expected tars", tmp_path)
    os.mkfifo(tmp_path / "pipe.tar")
    refused(tmp_path / "pipe.tar", "is a named pipe, not a file", tmp_path)


def test_roots_have_parts(tmp_path: Path) -> None:
    forms.folders(IMAGES, tmp_path / "a" / "train")
    forms.folders(IMAGES, tmp_path / "a" / "val")
    refused(tmp_path / "a", "look like parts of a data set", tmp_path)
    refused(tmp_path / "a", "split = test: holds neither a folder test", tmp_path, Wishes("test"))
    forms.folders(IMAGES, tmp_path / "b" / "ILSVRC/Data/CLS-LOC/train")
    refused(tmp_path / "b", "Kaggle's ImageNet: add --split train", tmp_path)
    forms.tar(IMAGES.items(), tmp_path / "c" / "ILSVRC2012_img_train.tar")
    refused(tmp_path / "c", "holds ILSVRC2012_img_train.tar: give that file, or", tmp_path)
    refused(
        forms.tar(IMAGES.items(), tmp_path / "x.tar"),
        "split = val: no folder of that name",
        tmp_path,
        Wishes("val"),
    )
    rng = np.random.default_rng(SEED)
    forms.parquets(forms.train_files(), tmp_path / "d", rng)
    forms.parquets(forms.train_files(), tmp_path / "d", rng, "validation")
    refused(tmp_path / "d", r"several splits \(train, val\): add --split", tmp_path)
    refused(tmp_path / "d", "split = test: no file", tmp_path, Wishes("test"))


@pytest.mark.parametrize("wishes", [Wishes("train"), Wishes(labels=Path("x"))])
def test_wishes_that_a_form_does_not_have(wishes: Wishes, tmp_path: Path) -> None:
    folder = forms.shards(forms.train_files(), tmp_path / "s", np.random.default_rng(SEED), 1)
    refused(folder / "imagenet-000000.tar", "takes no --", tmp_path, wishes)
    convert_images(folder, tmp_path / "first.beton")
    refused(tmp_path / "first.beton", "a .beton file, which takes no --", tmp_path, wishes)


# ------------------------------------------------------------------ parquet


def table(**columns: pa.Array) -> pa.Table:
    return pa.table(columns)


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TWO = pa.array([{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(2)], STRUCT)
LABELS = pa.array([0, 1], pa.int64())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (table(text=pa.array(["a", "b"]), label=LABELS), "needs one column of images"),
        (table(image=TWO), "needs one column of numbers as labels"),
        (table(image=TWO, a=LABELS, b=LABELS), "needs one column of numbers as labels, called lab"),
        (table(image=TWO, label=pa.array([0, None], pa.int64())), "row 1 has no label"),
        (table(image=TWO, label=pa.array([0, -1], pa.int64())), "a label is -1, which means"),
        (table(image=TWO.slice(0, 0), label=LABELS.slice(0, 0)), "no rows"),
    ],
    ids=["no images", "no labels", "two labels", "null label", "minus one", "no rows"],
)
def test_parquet_files_without_what_is_needed(content: pa.Table, told: str, tmp_path: Path) -> None:
    pq.write_table(content, tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", told, tmp_path)


def test_parquet_rows_without_bytes_are_bad_images(tmp_path: Path) -> None:
    rows = [{"bytes": jpeg(1), "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]
    rows += [{"bytes": jpeg(2), "path": "c.jpg"}]
    labels = pa.array([0, 0, 1, 1], pa.int32())
    pq.write_table(table(img=pa.array(rows, STRUCT), fine_label=labels), tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", r"b\.jpg: has no bytes", tmp_path)
    done = convert_images(tmp_path / "x.parquet", tmp_path / "out.beton", skip_bad=True)
    assert len(done["skipped"]) == 2
    assert contents(tmp_path / "out.beton") == [(0, jpeg(1)), (1, jpeg(2))]


def test_parquet_files_of_other_columns(tmp_path: Path) -> None:
    pq.write_table(table(image=TWO, label=LABELS), tmp_path / "1.parquet")
    pq.write_table(table(image=TWO, cls=LABELS), tmp_path / "2.parquet")
    refused(tmp_path, r"2\.parquet: its columns are not those of .*1\.parquet", tmp_path)


def test_columns_of_plain_bytes(tmp_path: Path) -> None:
    plain = pa.array([jpeg(1), jpeg(2)], pa.large_binary())
    pq.write_table(table(jpg=plain, label=LABELS), tmp_path / "x.parquet")
    convert_images(tmp_path / "x.parquet", tmp_path / "out.beton")
    assert contents(tmp_path / "out.beton") == [(0, jpeg(1)), (1, jpeg(2))]


# ------------------------------------------------------------------ WebDataset


def shard(path: Path, **fields: bytes) -> Path:
    """Two whole samples, and a third of these fields."""
    members = [("a.jpg", jpeg(1)), ("a.cls", b"0"), ("b.jpg", jpeg(2)), ("b.cls", b"1\n")]
    members += [(f"c.{field}", content) for field, content in fields.items()]
    return forms.tar(members, path)


def test_samples_without_a_label_are_bad_images(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", jpg=jpeg(3), json=b'{"text": "cat"}')
    refused(path, r"c\.jpg: has no label", tmp_path)
    done = convert_images(path, tmp_path / "out.beton", skip_bad=True)
    assert done["skipped"] == ["c.jpg"]
    assert contents(tmp_path / "out.beton") == [(0, jpeg(1)), (1, jpeg(2))]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"jpg": jpeg(3), "cls": b"cat"}, r"c\.cls: 'cat' is no label: expected a number"),
        ({"jpg": jpeg(3), "cls": b"-1"}, "'-1' is no label"),
        ({"jpg": jpeg(3), "cls": b"9" * 5000}, "is no label"),
        ({"jpg": jpeg(3), "json": b"{"}, r"c\.json: is no JSON"),
        ({"jpg": jpeg(3), "json": b"[" * 99999}, r"c\.json: is no JSON"),
        ({"jpg": jpeg(3), "png": b"", "cls": b"0"}, "c has several images: jpg, png"),
    ],
    ids=["text", "minus", "long", "JSON", "deep JSON", "two images"],
)
def test_labels_that_are_none(fields: dict[str, bytes], told: str, tmp_path: Path) -> None:
    refused(shard(tmp_path / "x.tar", **fields), told, tmp_path)


def test_fields_that_are_no_images_are_told(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", jpg=jpeg(3), json=json.dumps({"label": 1}).encode(), txt=b"a")
    assert convert_images(path, tmp_path / "out.beton")["ignored"] == {".txt": 1}


# ------------------------------------------------------------------ labels of flat images


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    folder = tmp_path / "flat"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    return folder


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("path,label\n", "is empty"),
        ("0.jpg,a\n1.jpg,b\n", ""),
        ("0.jpg,a\n0.jpg,b\n", r"row 2: 0\.jpg has two labels, a and b"),
        ("0.jpg,a\n9.jpg,b\n", r"1 of the 2 images in labels\.csv are not there: 9\.jpg"),
        ("0.jpg\n1.jpg\n", "row 1: .* expected a path and a label"),
        ("0.jpg,a,b\n", "row 1: .* expected a path and a label"),
        ("0.jpg,\n", "row 1: .* expected a path and a label"),
        ("ImageId,PredictionString\n0,n01440764 1 2 3 4 n01443537 1 2 3 4\n", "boxes of one class"),
        ("ImageId,PredictionString\n0,cat 1 2 3 4\n", "line 2: .* boxes of one class"),
        ("\udcff", "is no UTF-8 text"),
    ],
    ids=str,
)
def test_label_files(text: str, told: str, flat: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text(text, errors="surrogateescape")
    if told:
        refused(flat, told, tmp_path, Wishes(labels=labels))
        return
    done = convert_images(flat, tmp_path / "out.beton", wishes=Wishes(labels=labels))
    assert (done["count"], done["ignored"]) == (2, {"images that the labels do not name": 1})


def test_a_missing_label_file_and_a_folder_that_is_no_devkit(flat: Path, tmp_path: Path) -> None:
    refused(
        flat, "no such file or folder; expected ImageNet's", tmp_path, Wishes(labels=flat / "x")
    )
    refused(flat, "holds no ILSVRC2012_val.* and no meta", tmp_path, Wishes(labels=flat))


def test_a_devkit_that_is_damaged(tmp_path: Path) -> None:
    rng = np.random.default_rng(SEED)
    val = forms.val_files(rng)
    src = forms.flat_folder(val, tmp_path / "val")
    kit = forms.devkit_files(val, tmp_path)
    meta = next(name for name in kit if name.endswith(".mat"))
    truth = next(name for name in kit if name.endswith("truth.txt"))
    for change, told in (
        ({meta: kit[meta][:200]}, r"meta\.mat is not that of ILSVRC2012"),
        ({meta: b"no mat"}, r"meta\.mat is not that of ILSVRC2012"),
        ({truth: kit[truth] + b"77\n"}, r"line 11: b'77' is no id of a class"),
        ({truth: kit[truth] + b"4\n"}, r"line 11: b'4' is no id of a class"),  # it has children
        ({truth: kit[truth] + b"1\n"}, r"1 of the 11 images .* ILSVRC2012_val_00000011"),
    ):
        forms.folders(kit | change, tmp_path / "kit")
        refused(src, told, tmp_path, Wishes(labels=tmp_path / "kit"))


# ------------------------------------------------------------------ many, large, at once


@pytest.mark.slow
def test_ten_thousand_tiny_files(tmp_path: Path) -> None:
    tiny = jpeg(1)
    files = {f"c{i % 7}/{i}.jpg": tiny for i in range(10_000)}
    path = forms.tar(files.items(), tmp_path / "x.tar")
    done = convert_images(path, tmp_path / "out.beton")
    assert done["count"] == 10_000
    store = BetonStore(tmp_path / "out.beton")
    assert np.bincount(store.labels).tolist() == [1429] * 4 + [1428] * 3


def test_many_shards_hold_no_files_open(tmp_path: Path) -> None:
    """There may be more of them than a process may open."""
    files = forms.train_files()
    forms.shards(files, tmp_path / "s", np.random.default_rng(SEED), len(files))
    collection = recognise(tmp_path / "s")
    held = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if fd.isdecimal() and os.path.lexists(f"/proc/self/fd/{fd}")
    ]
    assert not any("imagenet-" in path for path in held)
    collection.close()


@pytest.mark.parametrize("form", ["tar.gz", "tar.xz"])
def test_a_stream_gives_what_random_reading_gives(form: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(SEED)
    files = {f"{i}": rng.bytes(int(rng.integers(0, 400_000))) for i in range(30)}
    plain = TarTree(forms.tar(files.items(), tmp_path / "x.tar"))
    path = forms.tar(files.items(), tmp_path / f"x.{form}", f"w:{form[4:]}")
    streamed: Tree = StreamedTar(path)
    assert list(streamed.names) == list(plain.names) == list(files)
    wanted = rng.permutation(30)[:20]
    found = {number: read() for number, read in streamed.contents(wanted)}
    assert found == {number: plain.read(number) for number in wanted.tolist()}
    assert list(found) == sorted(wanted)  # as they lie


def test_a_zip_is_read_from_many_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(SEED)
    files = {f"{i}": rng.bytes(int(rng.integers(1, 50_000))) for i in range(50)}
    tree = ZipTree(forms.zipped(files, tmp_path / "x.zip"))
    numbers = rng.integers(0, 50, 500).tolist()
    with ThreadPoolExecutor(8) as pool:
        for number, data in zip(numbers, pool.map(tree.read, numbers), strict=True):
            assert data == files[tree.names[number]]
