"""Folders of images with boxes, as COCO and Pascal VOC have them, and what is odd in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.pipelines.samples import encoded, picture

# Ids in no order and with gaps, as COCO's 80 of 90.
CATEGORIES = [{"id": 90, "name": "brush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "sign"}]
CLASSES = ("person", "sign", "brush")

# id, file, height, width, format
IMAGES = [
    (300, "c.jpg", 60, 80, "JPEG"),
    (7, "deep/a.jpg", 90, 50, "JPEG"),
    (42, "b.png", 40, 40, "PNG"),
    (41, "none.jpg", 30, 70, "JPEG"),
]
NAMES_BY_ID = ["deep/a.jpg", "none.jpg", "b.png", "c.jpg"]

# image, category, left, top, width, height, crowd: plain ones, a crowd, and every trap
BOXES = [
    (300, 90, 10.5, 20, 30, 20.25, 0),
    (7, 1, 0, 0, 50, 90, 0),  # all of the image
    (300, 1, 5, 5, 20, 20, 1),  # a crowd
    (42, 13, -5, 30, 20, 20, 0),  # clipped at two edges
    (42, 1, 10, 10, 0, 5, 0),  # without area
    (42, 1, 10, 10, 5, -2, 0),  # of negative height
    (7, 13, 60, 10, 10, 10, 0),  # outside
    (7, 90, 10, 20, 5, 6, 0),
]


def coco_content() -> dict[str, Any]:
    """What an `instances_*.json` would say of IMAGES and BOXES."""
    images = []
    for number, name, height, width, _ in IMAGES:
        images.append({"id": number, "file_name": name, "height": height, "width": width})
    annotations = []
    for i, (image, category, left, top, width, height, crowd) in enumerate(BOXES):
        annotations.append(
            {
                "id": 1000 - i,
                "image_id": image,
                "category_id": category,
                "bbox": [left, top, width, height],
                "area": abs(width * height) / 2,
                "iscrowd": crowd,
                "segmentation": [[1, 2, 3, 4, 5, 6]],
            }
        )
    return {
        "info": {"year": 2017},
        "images": images,
        "annotations": annotations,
        "categories": [dict(each) for each in CATEGORIES],
    }


def write_images(folder: Path) -> None:
    """The files of IMAGES, one that no annotation names, and what is no image."""
    for i, (_, name, height, width, image_format) in enumerate(IMAGES):
        write_image(folder / name, i, height, width, image_format)
    write_image(folder / "deep" / "unnamed.jpg", 9, 20, 20)
    (folder / "readme.txt").write_text("no image")
    (folder / ".hidden.jpg").write_bytes(b"")


def write_image(
    path: Path, seed: int, height: int, width: int, image_format: str = "JPEG", **save: object
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(seed, height, width), image_format, **save))


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def coco_tree(root: Path) -> tuple[Path, Path]:
    """The folder of the images, and the JSON."""
    write_images(root / "images")
    return root / "images", write_json(root / "instances.json", coco_content())


def random_coco(rng: np.random.Generator, root: Path) -> tuple[Path, dict[str, Any]]:
    """Images of random sides, and boxes of which many are odd; categories that nothing uses."""
    folder = root / "images"
    n_images = int(rng.integers(1, 8))
    ids = rng.choice(10**6, n_images, replace=False).tolist()
    images = []
    for i, number in enumerate(ids):
        height, width = (int(side) for side in rng.integers(16, 120, 2))
        image_format, suffix = [("JPEG", "jpg"), ("PNG", "png")][int(rng.integers(2))]
        name = f"{i}.{suffix}"
        write_image(folder / name, i, height, width, image_format)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        if rng.random() < 0.2:
            del images[-1]["height"], images[-1]["width"]
    categories = []
    for number in rng.choice(100, 6, replace=False).tolist():
        categories.append({"id": number, "name": f"class {number}", "supercategory": "thing"})
    annotations: list[dict[str, Any]] = []
    for i in range(int(rng.integers(1, 40))):
        left, top = (rng.random(2) * 150 - 20).round(2).tolist()
        width, height = (rng.random(2) * 80 - 5).round(2).tolist()
        annotations.append(
            {
                "id": 5 * i,
                "image_id": int(rng.choice(ids)),
                "category_id": categories[int(rng.integers(4))]["id"],
                "bbox": [left, top, width, height],
                "iscrowd": int(rng.random() < 0.15),
                "area": float(rng.random() * 1000),
            }
        )
        if rng.random() < 0.1:
            del annotations[-1]["area"]
        if rng.random() < 0.1:
            del annotations[-1]["iscrowd"]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return folder, content


# ------------------------------------------------------------------ Pascal VOC


def voc_object(
    name: str,
    box: tuple[object, ...],  # xmin, ymin, xmax, ymax: of the first and the last pixel, from 1
    difficult: object = None,
    more: str = "",
) -> str:
    xmin, ymin, xmax, ymax = box
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return (
        f"<object><name>{name}</name>{flag}{more}<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin>"
        f"<xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>"
    )


def voc_xml(filename: str | None, sides: tuple[int, int] | None, *objects: str) -> str:
    """An XML file's content; sides are height and width."""
    named = "" if filename is None else f"<filename>{filename}</filename>"
    size = ""
    if sides is not None:
        height, width = sides
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><folder>x</folder>{named}{size}{''.join(objects)}</annotation>"


def voc_tree(root: Path) -> tuple[Path, Path]:
    """The folders of the images and of the XML files: plain, by stem, without objects, all odd."""
    images = root / "images"
    labels = root / "labels"
    labels.mkdir(parents=True)
    write_image(images / "1.jpg", 1, 60, 80)
    write_image(images / "2.png", 2, 30, 40, "PNG")
    write_image(images / "3.jpg", 3, 50, 50)
    (labels / "1.xml").write_text(
        voc_xml(
            "1.jpg",
            (60, 80),
            voc_object("dog", (1, 1, 80, 60), 0),
            voc_object("cat", (11, 21, 20, 40), 1),
            # A part has a box of its own.
            voc_object("dog", (5, 6, 7, 8), 0, "<part><bndbox><xmin>x</xmin></bndbox></part>"),
        )
    )
    (labels / "2.xml").write_text(
        voc_xml(
            "2.jpg",  # it is a PNG now
            (30, 40),
            voc_object("ant", (0, 0, 10, 10)),  # from 0, against the rules: clipped
            voc_object("ant", (41, 1, 50, 5)),  # outside
            voc_object("ant", (5, 5, 4, 9)),  # without area
        )
    )
    (labels / "3.xml").write_text(voc_xml(None, None))
    return images, labels
