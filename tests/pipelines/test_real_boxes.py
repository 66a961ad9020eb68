"""Real photographs with real boxes: deepforest's aerial ones, Pascal VOC's XML beside PNG and TIFF.

The wheel is fetched, not installed (see bench/jpegs.py).
"""

from __future__ import annotations

import re
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import jpegs
from fap.cli.convert import main
from pipelines import open_store
from pipelines.boxes import plan_boxes, source_boxes
from pipelines.convert import Encoding, check
from pipelines.convert_boxes import convert_boxes
from tests.pipelines.random_boxes import RandomPlan
from tests.pipelines.samples import decoded

pytestmark = pytest.mark.slow

IN_THE_WHEEL = "deepforest/data/"
# By the names of the XML files.
IMAGES = [
    "2019_YELL_2_528000_4978000_image_crop2.png",
    "2019_YELL_2_541000_4977000_image_crop.png",
    "OSBS_029.tif",
    "SOAP_061.png",
]
TREES = [574, 279, 61, 37]  # boxes of each
CLASSES = ("Alive", "Dead", "Tree")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images and XML files of the wheel in one folder, as they lie there."""
    folder = tmp_path_factory.mktemp("deepforest")
    (wheel,) = [file for file in jpegs.wheels() if file.name.startswith("deepforest")]
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(IN_THE_WHEEL) and name.endswith((".xml", ".png", ".tif", ".JPG")):
                (folder / name.removeprefix(IN_THE_WHEEL)).write_bytes(archive.read(name))
    return folder


def parsed_by_hand(text: str) -> list[tuple[str, list[int]]]:
    """Name and xmin, ymin, xmax, ymax of every object, without an XML parser."""
    found = []
    for part in text.split("<object>")[1:]:
        name = re.search(r"<name>(.*?)</name>", part)
        assert name is not None
        numbers = [
            int(number)
            for side in ("xmin", "ymin", "xmax", "ymax")
            for number in re.findall(rf"<{side}>(\d+)</{side}>", part)
        ]
        found.append((name[1], numbers))
    return found


@pytest.mark.parametrize("most", [None, 640])
def test_real_boxes_are_those_of_the_files(
    photographs: Path, tmp_path: Path, most: int | None
) -> None:
    dst = tmp_path / "trees.beton"
    done = convert_boxes(photographs, photographs, dst, Encoding(max_side=most))
    assert (done["count"], done["verbatim"], done["skipped"]) == (4, 0, [])
    store = open_store(dst)
    assert store.classes == CLASSES
    boxes = store.annotations
    assert boxes is not None
    assert boxes.trained_per_image().tolist() == TREES
    assert check(dst) == []
    n_clipped = 0
    for i, name in enumerate(IMAGES):
        with Image.open(photographs / name) as image:
            width, height = image.size
        sides = (int(store.heights[i]), int(store.widths[i]))
        assert max(sides) == min(max(height, width), most or 10**6)
        across = sides[1] / width
        down = sides[0] / height
        rows = slice(boxes.first[i], boxes.first[i + 1])
        text = (photographs / name).with_suffix(".xml").read_text()
        objects = parsed_by_hand(text)
        assert [CLASSES[label] for label in boxes.classes[rows]] == [name for name, _ in objects]
        corners = np.array([numbers for _, numbers in objects], float) - [1, 1, 0, 0]
        inside = np.clip(corners, 0, [width, height, width, height])
        n_clipped += int((inside != corners).any(1).sum())
        expected = inside * [across, down, across, down]
        np.testing.assert_allclose(boxes.boxes[rows], expected, rtol=1e-6, atol=1e-4)
        w, h = (expected[:, 2:] - expected[:, :2]).T
        np.testing.assert_allclose(boxes.area[rows], w * h, rtol=1e-4)
    clipped = [n for what, n in done["counted"].items() if "clipped" in what]
    assert clipped == [n_clipped]


def test_the_command_tells_what_is_there(
    photographs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "trees.beton"
    assert main(["coco", str(photographs), str(photographs), str(dst)]) == 0
    out = capfd.readouterr().out.splitlines()
    assert "4 images, 951 boxes and 0 crowd boxes, 3 class(es) Alive to Tree" in out[-3]
    assert out[-2] == "0 images without boxes, at most 574 boxes on one image"
    assert "3 image files that the annotations do not name: passed over" in out
    assert main(["--check", str(dst)]) == 0


def test_a_tree_is_where_its_box_is(photographs: Path, tmp_path: Path) -> None:
    """The pixels under a box, in the source, as stored, and on a flipped canvas."""
    dst = tmp_path / "trees.beton"
    convert_boxes(photographs, photographs, dst, Encoding(raw=True))
    store = open_store(dst)
    boxes = store.annotations
    assert boxes is not None
    i = IMAGES.index("OSBS_029.tif")
    stored = decoded(store, i)
    with Image.open(BytesIO((photographs / IMAGES[i]).read_bytes())) as image:
        source = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(stored, source)

    # The image once, flipped, on a canvas of its own size with a border to the right.
    height, width = source.shape[:2]
    whole = np.array([[[0, 0, height, width]]], np.int16)
    plan = RandomPlan(np.array([[i]], np.uint32), whole, whole, np.array([[True]]))
    canvas = np.zeros((height, width + 50, 3), np.uint8)
    canvas[:, :width] = source[:, ::-1]
    targets = plan_boxes(plan, boxes, 100)[0, 0]
    n = TREES[i]
    assert (targets[:n, 0] == CLASSES.index("Tree")).all()
    assert (targets[n:, 0] == -1).all()
    for k in range(n):
        left, top, right, bottom = boxes.boxes[boxes.first[i] + k].astype(int)
        there = source[top:bottom, left:right]
        left, top, right, bottom = targets[k, 1:].astype(int)
        np.testing.assert_array_equal(canvas[top:bottom, left:right], there[:, ::-1])
    unflipped = plan_boxes(RandomPlan(plan.index, whole, whole, np.array([[False]])), boxes, 100)[
        0, 0, :n, 1:
    ]
    back = source_boxes(unflipped, whole[0, 0], whole[0, 0])
    np.testing.assert_allclose(back, boxes.boxes[boxes.first[i] : boxes.first[i + 1]], atol=1e-3)
