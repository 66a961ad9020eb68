"""COCO's JSON: what is read of it, and a message for each way in which it can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.sources import coco
from pipelines.sources.coco import read_coco
from tests.pipelines.annotated_trees import BOXES, CLASSES, NAMES_BY_ID, coco_content, write_json

Content = dict[str, Any]


def test_classes_by_category_ids_and_images_by_theirs(tmp_path: Path) -> None:
    found = read_coco(write_json(tmp_path / "a.json", coco_content()))
    assert found.classes == CLASSES
    assert [entry.name for entry in found.images] == NAMES_BY_ID
    assert [entry.sides for entry in found.images] == [(90, 50), (30, 70), (40, 40), (60, 80)]
    assert len(found.boxes) == len(BOXES)
    # The first: a brush on the image of id 300, which is the last one.
    assert (found.image[0], found.labels[0], found.crowd[0]) == (3, 2, False)
    assert found.boxes[0] == (10.5, 20, 40.5, 40.25)
    assert found.area[0] == 30 * 20.25 / 2
    assert found.crowd == [False, False, True] + [False] * 5


def test_what_may_be_left_out(tmp_path: Path) -> None:
    content = coco_content()
    for entry in content["annotations"]:
        del entry["iscrowd"], entry["area"], entry["segmentation"]
    for entry in content["images"]:
        del entry["height"], entry["width"]
    content["annotations"] = content["annotations"][:2]
    found = read_coco(write_json(tmp_path / "a.json", content))
    assert found.crowd == [False, False]
    assert [entry.sides for entry in found.images] == [None] * 4
    assert found.notes == {coco.NO_AREA_GIVEN: 2, coco.UNUSED: 1}


def test_outlines_are_forgotten_while_they_are_read(tmp_path: Path) -> None:
    """COCO's own take gigabytes of memory."""
    content = coco_content()
    assert all("segmentation" in entry for entry in content["annotations"])
    parsed = coco._parse(write_json(tmp_path / "a.json", content))
    assert not any("segmentation" in entry for entry in parsed["annotations"])


def test_a_byte_order_mark_and_other_alphabets(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"][0]["name"] = "щётка"
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode("utf-8-sig"))
    assert read_coco(path).classes == ("person", "sign", "щётка")


# ------------------------------------------------------------------ what is wrong


def changed(among: str, i: int, /, **values: Any) -> Callable[[Content], None]:
    """Entry i of a list gets other values; ... takes one away."""

    def change(content: Content) -> None:
        entry = content[among][i]
        entry.update(values)
        for key, value in values.items():
            if value is ...:
                del entry[key]

    return change


def replaced(name: str, value: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        content[name] = value
        if value is ...:
            del content[name]

    return change


LONG = "9" * 400
INF = float("inf")
NAN = float("nan")
FOUR = "must be four finite numbers"
WRONG: dict[str, tuple[Callable[[Content], None], str]] = {
    "no images": (replaced("images", ...), "has no images: give COCO's instances"),
    "no annotations": (replaced("annotations", ...), "has no annotations: give COCO's instances"),
    "no categories": (replaced("categories", ...), "has no categories: give COCO's instances"),
    "images are an object": (replaced("images", {}), r"images is \{\}: must be a list"),
    "images are empty": (replaced("images", []), "images: is empty"),
    "categories are empty": (replaced("categories", []), "categories: is empty"),
    "an image is a number": (replaced("images", [3]), r"images\[0\] is 3: must be an object"),
    "a box is null": (replaced("annotations", [None]), r"annotations\[0\] is None: must be an obj"),
    "no image id": (changed("images", 1, id=...), r"images\[1\]: has no id"),
    "image id of text": (changed("images", 1, id="7"), r"images\[1\]: id is '7': must be a whole"),
    "image id true": (changed("images", 1, id=True), r"images\[1\]: id is True: must be a whole"),
    "doubled image": (changed("images", 1, id=300), r"images\[1\], id 300: there is another one"),
    "doubled box": (
        changed("annotations", 3, id=1000),
        r"annotations\[3\], id 1000: there is another one",
    ),
    "doubled category": (
        changed("categories", 2, id=90),
        r"categories\[2\], id 90: there is another one",
    ),
    "doubled name": (changed("categories", 2, name="person"), "'person' stands 2 times"),
    "no name": (changed("categories", 2, name=...), r"categories\[2\], id 13: has no name"),
    "name 5": (changed("categories", 2, name=5), "categories: a class name is 5"),
    "empty name": (changed("categories", 2, name=""), "categories: a class name is ''"),
    "no file": (changed("images", 0, file_name=...), r"images\[0\], id 300: has no file_name"),
    "file 5": (changed("images", 0, file_name=5), r"id 300: file_name is 5: must be a text"),
    "one file twice": (changed("images", 0, file_name="./b.png"), "image 'b.png' stands 2 times"),
    "height of text": (changed("images", 0, height="60"), r"id 300: height is '60': must be a who"),
    "no height": (changed("images", 0, height=...), r"images\[0\], id 300: has no height"),
    "height 0": (changed("images", 0, height=0), r"height and width are \(0, 80\): no sides"),
    "width of 400 digits": (changed("images", 0, width=int(LONG)), "no sides of an image"),
    "unknown image": (
        changed("annotations", 2, image_id=8),
        r"annotations\[2\], id 998: image_id is 8: images has no such id",
    ),
    "unknown category": (
        changed("annotations", 2, category_id=2),
        r"annotations\[2\], id 998: category_id is 2: categories has no such id",
    ),
    "category of text": (
        changed("annotations", 2, category_id="1"),
        "category_id is '1': must be a whole number",
    ),
    "no bbox": (changed("annotations", 2, bbox=...), r"annotations\[2\], id 998: has no bbox"),
    "NaN": (changed("annotations", 2, bbox=[0, NAN, 1, 1]), rf"id 998: bbox is \[.*nan.*{FOUR}"),
    "infinite": (changed("annotations", 2, bbox=[0, 0, 1, INF]), rf"id 998: bbox is .*{FOUR}"),
    "text": (changed("annotations", 2, bbox=[0, "0", 1, 1]), rf"id 998: bbox is .*{FOUR}"),
    "true": (changed("annotations", 2, bbox=[0, True, 1, 1]), rf"id 998: bbox is .*{FOUR}"),
    "huge": (changed("annotations", 2, bbox=[0, 0, 1, int(LONG)]), rf"id 998: bbox is .*{FOUR}"),
    "three": (changed("annotations", 2, bbox=[0, 0, 1]), rf"id 998: bbox is .*{FOUR}"),
    "five": (changed("annotations", 2, bbox=[0, 0, 1, 1, 1]), rf"id 998: bbox is .*{FOUR}"),
    "object": (changed("annotations", 2, bbox={"x": 1}), rf"id 998: bbox is .*{FOUR}"),
    "nested": (changed("annotations", 2, bbox=[[0, 0, 1, 1]]), rf"id 998: bbox is .*{FOUR}"),
    "area NaN": (changed("annotations", 2, area=NAN), "id 998: area is nan: must be a finite"),
    "area below 0": (changed("annotations", 2, area=-1), "id 998: area is -1: must be a finite"),
    "area null": (changed("annotations", 2, area=None), "id 998: area is None: must be a finite"),
    "area too large": (changed("annotations", 2, area=1e40), "id 998: area is 1e.40: must be"),
    "crowd 2": (changed("annotations", 2, iscrowd=2), "id 998: iscrowd is 2: must be 0 or 1"),
    "crowd null": (changed("annotations", 2, iscrowd=None), "id 998: iscrowd is None: must be 0"),
    "crowd of text": (changed("annotations", 2, iscrowd="0"), "id 998: iscrowd is '0': must be"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_entry_is_named(what: str, tmp_path: Path) -> None:
    change, message = WRONG[what]
    content = coco_content()
    change(content)
    with pytest.raises(ValueError, match=rf"wrong\.json: .*{message}"):
        read_coco(write_json(tmp_path / "wrong.json", content))


@pytest.mark.parametrize(
    "name", ["../b.png", "/etc/passwd", "a/../../b.png", "..", "", "b\0.png", "deep/../b.png"]
)
def test_a_path_that_leads_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    content = coco_content()
    content["images"][2]["file_name"] = name
    with pytest.raises(ValueError, match=r"a\.json: images\[2\], id 42: file_name .* must be a pa"):
        read_coco(write_json(tmp_path / "a.json", content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is no JSON that can be read"),
        (b"{", "is no JSON that can be read"),
        (b"\xff\xfe\xff", "is no JSON that can be read"),
        (b"\xd8\x00", "is no JSON that can be read"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"a":' * 200_000, "is nested too deeply"),
        (b'{"images": ' + b"9" * 5000 + b"}", "is no JSON that can be read: Exceeds the limit"),
        (b"[]", "must be an object with images, annotations and categories, not a list"),
        (b"null", "must be an object with .*, not a NoneType"),
        (b"{}", "has no categories"),
    ],
)
def test_what_is_no_coco(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"odd\.json: {message}") as caught:
        read_coco(path)
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_json(tmp_path / "large.json", coco_content())
    monkeypatch.setattr(coco, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"large\.json: has more than 100 bytes"):
        read_coco(path)


def test_no_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(json, "loads", refuse)
    with pytest.raises(MemoryError, match=r"a\.json: not enough memory"):
        read_coco(write_json(tmp_path / "a.json", {}))
