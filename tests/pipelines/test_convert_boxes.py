"""fap-convert coco: images byte for byte, boxes scaled with them, every trap counted and told."""

from __future__ import annotations

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fap.cli.convert import main
from pipelines import open_store
from pipelines.convert import BadImages, Encoding, check
from pipelines.convert_boxes import convert_boxes
from pipelines.sources import annotated, coco, voc
from pipelines.sources.sidecar import read_sidecar
from pipelines.store import RAW
from tests.pipelines.annotated_trees import (
    CLASSES,
    IMAGES,
    coco_content,
    coco_tree,
    random_coco,
    voc_tree,
    write_image,
    write_json,
)
from tests.pipelines.samples import exif_of, no_trace

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, Path]:
    return coco_tree(tmp_path)


def encoding_of(path: Path) -> dict[str, Any]:
    sidecar = read_sidecar(path)
    assert sidecar is not None
    return sidecar.encoding


# ------------------------------------------------------------------ COCO


def test_images_and_boxes_arrive(tree: tuple[Path, Path], tmp_path: Path) -> None:
    images, labels = tree
    dst = tmp_path / "out.beton"
    done = convert_boxes(images, labels, dst)
    assert (done["count"], done["verbatim"], done["skipped"]) == (4, 3, [])
    assert encoding_of(dst) == done
    store = open_store(dst)
    assert store.classes == CLASSES
    assert store.labels.tolist() == [0, 1, 2, 3]
    # By image id; JPEGs byte for byte.
    assert store.read(0).tobytes() == (images / "deep" / "a.jpg").read_bytes()
    assert store.read(1).tobytes() == (images / "none.jpg").read_bytes()
    assert store.read(3).tobytes() == (images / "c.jpg").read_bytes()
    assert (store.heights.tolist(), store.widths.tolist()) == ([90, 30, 40, 60], [50, 70, 40, 80])
    boxes = store.annotations
    assert boxes is not None
    assert boxes.first.tolist() == [0, 2, 2, 3, 5]
    assert boxes.boxes.tolist() == [
        [0, 0, 50, 90],
        [10, 20, 15, 26],
        [0, 30, 15, 40],
        [10.5, 20, 40.5, 40.25],
        [5, 5, 25, 25],
    ]
    assert boxes.classes.tolist() == [0, 2, 1, 2, 0]
    assert boxes.crowd.tolist() == [False] * 4 + [True]
    assert boxes.area.tolist() == [2250, 15, 200, 303.75, 200]
    assert check(dst) == []


def test_every_trap_is_counted_and_told(
    tree: tuple[Path, Path], tmp_path: Path, capfd: Capture
) -> None:
    images, labels = tree
    content = coco_content()
    content["categories"].append({"id": 5, "name": "nobody"})
    del content["annotations"][0]["area"]
    write_json(labels, content)
    dst = tmp_path / "out.beton"
    assert main(["coco", str(images), str(labels), str(dst)]) == 0
    assert encoding_of(dst)["counted"] == {
        annotated.CROWD: 1,
        annotated.NO_AREA: 2,
        annotated.OUTSIDE: 1,
        annotated.CLIPPED: 1,
        annotated.LEFT_OUT: 0,
        annotated.NO_BOXES: 1,
        annotated.NOT_NAMED: 1,
        coco.UNUSED: 1,
        coco.NO_AREA_GIVEN: 1,
    }
    out = capfd.readouterr().out.splitlines()
    assert sorted(out[:-4]) == [
        "1 boxes outside their image: dropped",
        "1 boxes partly outside their image: clipped at its edge",
        "1 boxes whose area is not in the file: that of the box is taken",
        "1 categories without any box: their classes stay",
        "1 crowd boxes: never trained, and never counted against a detector",
        "1 image files that the annotations do not name: passed over",
        "1 images without boxes: kept",
        "2 boxes without area: dropped",
    ]
    assert out[-4:] == [
        "4 images, 4 boxes and 1 crowd boxes, 4 class(es) person to brush, 0 to 2 boxes per class",
        "1 images without boxes, at most 2 boxes on one image",
        "no boxes of 1 class(es): nobody; the labels of the others do not move",
        f"{dst}: 4 images, 0 left out",
    ]
    # The area that was not there is the box's.
    boxes = open_store(dst).annotations
    assert boxes is not None
    assert boxes.area.tolist()[3] == 30 * 20.25


def slowly(content: dict[str, Any], stored: list[tuple[int, int]]) -> list[list[tuple]]:
    """A twin of the parsing, clipping and scaling: per image (class, box, crowd, area)."""
    categories = sorted(category["id"] for category in content["categories"])
    found = []
    for image, (height, width) in zip(
        sorted(content["images"], key=lambda image: image["id"]), stored, strict=True
    ):
        own_height, own_width = image["own"]
        rows = []
        for entry in content["annotations"]:
            x, y, w, h = entry["bbox"]
            if entry["image_id"] != image["id"] or w <= 0 or h <= 0:
                continue
            left, right = max(x, 0), min(x + w, own_width)
            top, bottom = max(y, 0), min(y + h, own_height)
            if left >= right or top >= bottom:
                continue
            across = width / own_width
            down = height / own_height
            box = (left * across, top * down, right * across, bottom * down)
            area = (right - left) * (bottom - top) * across * down
            if "area" in entry:
                area = entry["area"] * across * down
            label = categories.index(entry["category_id"])
            rows.append((label, *box, bool(entry.get("iscrowd", 0)), area))
        found.append(rows)
    return found


@pytest.mark.parametrize(
    "encoding", [Encoding(), Encoding(max_side=40), Encoding(raw=True), Encoding(quality=80)]
)
def test_random_annotations_are_those_of_a_loop(
    encoding: Encoding, tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    for i in range(4):
        images, content = random_coco(rng, tmp_path / f"{i}")
        labels = write_json(tmp_path / f"{i}" / "a.json", content)
        dst = tmp_path / f"{i}.beton"
        convert_boxes(images, labels, dst, encoding)
        store = open_store(dst)
        for image in content["images"]:
            with Image.open(images / image["file_name"]) as opened:
                image["own"] = (opened.height, opened.width)
        stored = list(zip(store.heights.tolist(), store.widths.tolist(), strict=True))
        expected = slowly(content, stored)
        boxes = store.annotations
        assert boxes is not None
        assert np.diff(boxes.first).tolist() == [len(rows) for rows in expected]
        rows = np.array([row for rows in expected for row in rows], np.float64).reshape(-1, 7)
        np.testing.assert_array_equal(boxes.classes, rows[:, 0])
        np.testing.assert_allclose(boxes.boxes, rows[:, 1:5], rtol=1e-6, atol=1e-5)
        np.testing.assert_array_equal(boxes.crowd, rows[:, 5])
        np.testing.assert_allclose(boxes.area, rows[:, 6], rtol=1e-4, atol=1e-3)
        assert check(dst) == []
        for number, image in enumerate(sorted(content["images"], key=lambda each: each["id"])):
            jpeg = image["file_name"].endswith(".jpg")
            if encoding == Encoding() and jpeg:
                file = images / image["file_name"]
                assert store.read(number).tobytes() == file.read_bytes()
        store.close()


def test_boxes_shrink_with_their_image(tree: tuple[Path, Path], tmp_path: Path) -> None:
    images, labels = tree
    dst = tmp_path / "small.beton"
    assert main(["coco", str(images), str(labels), str(dst), "--max-side", "45", "--raw"]) == 0
    store = open_store(dst)
    assert set(store.modes) == {RAW}
    assert (store.heights[0], store.widths[0]) == (45, 25)
    boxes = store.annotations
    assert boxes is not None
    assert boxes.boxes[:2].tolist() == [[0, 0, 25, 45], [5, 10, 7.5, 13]]
    assert boxes.area[:2].tolist() == [2250 / 4, 15 / 4]


# ------------------------------------------------------------------ images that cannot be used


def make_bad(images: Path, labels: Path) -> dict[str, str]:
    """Images of every sort that cannot be used, by name, with the reason."""
    content = coco_content()
    add = content["images"].append
    write_image(images / "turned.jpg", 5, 30, 50, exif=exif_of(6))
    add({"id": 1000, "file_name": "turned.jpg", "height": 30, "width": 50})
    write_image(images / "mirrored.png", 5, 30, 50, "PNG", exif=exif_of(2))
    add({"id": 1001, "file_name": "mirrored.png"})
    write_image(images / "turned.tif", 5, 30, 50, "TIFF", exif=exif_of(8))
    add({"id": 1002, "file_name": "turned.tif"})
    write_image(images / "other.jpg", 5, 30, 50)
    add({"id": 1003, "file_name": "other.jpg", "height": 50, "width": 30})
    add({"id": 1004, "file_name": "gone.jpg", "height": 50, "width": 30})
    (images / "cut.jpg").write_bytes((images / "other.jpg").read_bytes()[:-100])
    add({"id": 1005, "file_name": "cut.jpg", "height": 30, "width": 50})
    (images / "text.jpg").write_text("<html>404</html>")
    add({"id": 1006, "file_name": "text.jpg"})
    os.mkfifo(images / "pipe.jpg")
    add({"id": 1007, "file_name": "pipe.jpg"})
    add({"id": 1008, "file_name": "deep"})
    add({"id": 1009, "file_name": "\ud800.jpg"})
    content["annotations"].append(
        {"id": 1, "image_id": 1004, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 5}
    )
    write_json(labels, content)
    return {
        "turned.jpg": "orientation (6) turns or mirrors it",
        "mirrored.png": "orientation (2) turns or mirrors it",
        "turned.tif": "orientation (8) turns or mirrors it",
        "other.jpg": "the annotations say 30 x 50 pixels, it has 50 x 30 pixels",
        "gone.jpg": "No such file",
        "cut.jpg": "",
        "text.jpg": "not an image",
        "pipe.jpg": "is a named pipe",
        "deep": "is a folder",
        "\ud800.jpg": "encode",
    }


def test_images_that_cannot_be_used_are_listed_or_left_out(
    tree: tuple[Path, Path], tmp_path: Path, capfd: Capture
) -> None:
    images, labels = tree
    reasons = make_bad(images, labels)
    dst = tmp_path / "out.beton"
    with pytest.raises(BadImages) as caught:
        convert_boxes(images, labels, dst)
    assert no_trace(tmp_path)
    found = {os.path.relpath(path, images): why for path, why in caught.value.bad}
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in found[name]
    assert main(["coco", str(images), str(labels), str(dst)]) == 1
    assert "10 image(s) cannot be used: mend or remove them, or use" in capfd.readouterr().err
    assert main(["coco", str(images), str(labels), str(dst), "--skip-bad"]) == 0
    out = capfd.readouterr().out
    assert "left out: gone.jpg" in out
    assert "1 boxes of images that were left out: dropped" in out
    assert encoding_of(dst)["skipped"] == list(reasons)
    store = open_store(dst)
    assert store.labels.tolist() == [0, 1, 2, 3]
    assert store.annotations is not None
    assert store.annotations.first.tolist() == [0, 2, 2, 3, 5]
    assert store.notes == (f"10 damaged images were left out when {dst} was made",)


def test_images_left_out_in_the_middle_move_no_boxes(
    tree: tuple[Path, Path], tmp_path: Path
) -> None:
    images, labels = tree
    whole = tmp_path / "whole.beton"
    part = tmp_path / "part.beton"
    convert_boxes(images, labels, whole)
    (images / "deep" / "a.jpg").unlink()
    (images / "b.png").unlink()
    convert_boxes(images, labels, part, skip_bad=True)
    all_boxes = open_store(whole).annotations
    boxes = open_store(part).annotations
    assert all_boxes is not None
    assert boxes is not None
    assert boxes.first.tolist() == [0, 0, 2]
    np.testing.assert_array_equal(boxes.boxes, all_boxes.boxes[3:])
    assert open_store(part).read(1).tobytes() == (images / "c.jpg").read_bytes()


def test_with_no_image_left_nothing_is_written(tree: tuple[Path, Path], tmp_path: Path) -> None:
    images, labels = tree
    for _, name, *_ in IMAGES:
        (images / name).unlink()
    with pytest.raises(BadImages, match=r"4 image\(s\) cannot be used"):
        convert_boxes(images, labels, tmp_path / "out.beton", skip_bad=True)
    assert no_trace(tmp_path)


# ------------------------------------------------------------------ Pascal VOC


@pytest.mark.parametrize("together", [False, True])
def test_voc(together: bool, tmp_path: Path, capfd: Capture) -> None:
    images, labels = voc_tree(tmp_path)
    if together:
        for file in labels.iterdir():
            file.rename(images / file.name)
        labels = images
    dst = tmp_path / "out.beton"
    assert main(["coco", str(images), str(labels), str(dst)]) == 0
    store = open_store(dst)
    assert store.classes == ("ant", "cat", "dog")
    boxes = store.annotations
    assert boxes is not None
    assert boxes.first.tolist() == [0, 3, 4, 4]
    assert boxes.boxes.tolist() == [[0, 0, 80, 60], [10, 20, 20, 40], [4, 5, 7, 8], [0, 0, 10, 10]]
    assert boxes.crowd.tolist() == [False, True, False, False]
    assert boxes.area.tolist() == [4800, 200, 9, 100]
    assert encoding_of(dst)["counted"] == {
        annotated.CROWD: 1,
        annotated.NO_AREA: 1,
        annotated.OUTSIDE: 1,
        annotated.CLIPPED: 1,
        annotated.LEFT_OUT: 0,
        annotated.NO_BOXES: 1,
        annotated.NOT_NAMED: 0,
        voc.DIFFICULT: 1,
    }
    assert store.read(0).tobytes() == (images / "1.jpg").read_bytes()
    assert "1 crowd boxes: never trained, and never counted" in capfd.readouterr().out
    assert check(dst) == []


def test_voc_files_without_an_image_or_of_other_sides(tmp_path: Path) -> None:
    images, labels = voc_tree(tmp_path)
    (images / "2.png").unlink()
    write_image(images / "1.jpg", 1, 80, 60)
    with pytest.raises(BadImages) as caught:
        convert_boxes(images, labels, tmp_path / "out.beton")
    assert [why for _, why in caught.value.bad] == [
        "the annotations say 80 x 60 pixels, it has 60 x 80 pixels",
        f"there is no such file; {labels}/2.xml names it",
    ]
    assert no_trace(tmp_path)


# ------------------------------------------------------------------ FFCV


@pytest.mark.slow
def test_ffcv_reads_image_and_number(tree: tuple[Path, Path], tmp_path: Path) -> None:
    """In a subprocess: importing ffcv changes torch's thread count, its loader leaves threads."""
    dst = tmp_path / "out.beton"
    convert_boxes(*tree, dst)
    code = """
import sys, numpy as np
from ffcv.fields.decoders import IntDecoder, CenterCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
crop = CenterCropRGBImageDecoder((24, 24), 1)
pipelines = {"image": [crop], "label": [IntDecoder()]}
options = {"batch_size": 4, "num_workers": 1, "order": OrderOption.SEQUENTIAL}
loader = Loader(sys.argv[1], **options, pipelines=pipelines)
for images, labels in loader:
    np.savez(sys.argv[2], images=images.copy(), labels=labels.copy())
"""
    command = [sys.executable, "-c", code, str(dst), str(tmp_path / "seen.npz")]
    subprocess.run(command, check=True, timeout=300)
    seen = np.load(tmp_path / "seen.npz")
    assert seen["labels"].ravel().tolist() == [0, 1, 2, 3]
    assert seen["images"].shape == (4, 24, 24, 3)
    store = open_store(dst)
    for number in range(4):
        image = Image.open(BytesIO(store.read(number).tobytes()))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        crop = image.crop((left, top, left + side, top + side)).resize(
            (24, 24), Image.Resampling.BOX
        )
        assert np.abs(seen["images"][number].astype(int) - np.asarray(crop)).mean() < 10
