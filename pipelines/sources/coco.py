"""COCO's annotations: `instances_*.json`, https://cocodataset.org/#format-data.

images       id, file_name, and perhaps height and width
categories   id, name: sorted by id, so that COCO's 80 of the ids up to 90 are classes 0 to 79
annotations  id, image_id, category_id, bbox (left, top, width, height), area, iscrowd
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.files import one_line, read_regular, readable, shown
from pipelines.names import checked_names
from pipelines.sources.annotated import Annotated, ImageEntry, finite, inside_folder, refuse_doubles

MOST_BYTES = 2 << 30  # of a file; COCO's largest has 450 MB
MOST_SIDE = (1 << 31) - 1  # pixels that are believed until the image is read
MOST_AREA = 1e30  # square pixels, which float32 holds
UNUSED = "categories without any box: their classes stay"
NO_AREA_GIVEN = "boxes whose area is not in the file: that of the box is taken"


class EntryError(ValueError):
    """What is wrong with an entry; the message names the entry, but not yet the file."""


def read_coco(path: str | Path) -> Annotated:
    """What an `instances_*.json` says, images by their ids.

    Raises:
        ValueError: it is no such file, or an entry contradicts another one or itself.
        OSError: it cannot be read.
    """
    path = Path(path)
    content = _parse(path)
    try:
        return _annotated(content, path)
    except EntryError as error:
        raise ValueError(f"{readable(path)}: {error}") from None


def _parse(path: Path) -> dict[str, Any]:
    """The JSON, without the outlines of the objects."""
    data = read_regular(path, MOST_BYTES)
    try:
        content = json.loads(data, object_hook=_without_outline)
    except MemoryError:
        raise MemoryError(f"{readable(path)}: not enough memory to read it") from None
    except RecursionError:
        raise ValueError(f"{readable(path)}: is nested too deeply") from None
    except ValueError as error:
        why = one_line(error)
        raise ValueError(f"{readable(path)}: is no JSON that can be read: {why}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{readable(path)}: must be an object with images, annotations and categories,"
            f" not a {type(content).__name__}: COCO's instances_*.json"
        )
    return content


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    """An object as it is parsed. Polygons take many times the memory of all else."""
    entry.pop("segmentation", None)
    return entry


def _annotated(content: dict[str, Any], path: Path) -> Annotated:
    classes, label_of = _categories(content)
    images, place_of = _images(content)
    refuse_doubles(path, (image.name for image in images))

    annotated = Annotated(classes, images)
    n_without_area = 0
    for where, entry in _entries(content, "annotations"):
        image = _look_up(place_of, where, entry, "image_id", "images")
        label = _look_up(label_of, where, entry, "category_id", "categories")
        left, top, width, height = _bbox(where, entry)
        if "area" not in entry:
            n_without_area += 1
        area = _area(where, entry)
        box = (left, top, left + width, top + height)
        annotated.add(image, box, label, crowd=_is_crowd(where, entry), area=area)
    annotated.notes = {
        UNUSED: len(classes) - len(set(annotated.labels)),
        NO_AREA_GIVEN: n_without_area,
    }
    return annotated


# ------------------------------------------------------------------ the three lists


def _entries(content: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with what to call it in a message; ids are checked."""
    if name not in content:
        raise EntryError(f"has no {name}: give COCO's instances_*.json, or a file of its form")
    entries = content[name]
    if not isinstance(entries, list):
        raise EntryError(f"{name} is {shown(entries, 60)}: must be a list")
    seen: set[int] = set()
    for i, entry in enumerate(entries):
        where = f"{name}[{i}]"
        if not isinstance(entry, dict):
            raise EntryError(f"{where} is {shown(entry, 60)}: must be an object")
        number = _integer(where, entry, "id")
        where += f", id {shown(number, 40)}"
        if number in seen:
            raise EntryError(f"{where}: there is another one of this id")
        seen.add(number)
        yield where, entry


def _categories(content: dict[str, Any]) -> tuple[tuple[str, ...], dict[int, int]]:
    """Names of the classes, and the class of every category id."""
    name_of = {}
    for where, entry in _entries(content, "categories"):
        name_of[entry["id"]] = _required(where, entry, "name")
    if not name_of:
        raise EntryError("categories: is empty")
    ids = sorted(name_of)
    try:
        classes = checked_names([name_of[number] for number in ids])
    except ValueError as error:
        raise EntryError(f"categories: {error}") from None
    assert classes is not None
    return classes, {number: label for label, number in enumerate(ids)}


def _images(content: dict[str, Any]) -> tuple[list[ImageEntry], dict[int, int]]:
    """The images by their ids, and the place of every id."""
    found: dict[int, ImageEntry] = {}
    for where, entry in _entries(content, "images"):
        name = _required(where, entry, "file_name")
        if not isinstance(name, str):
            raise EntryError(f"{where}: file_name is {shown(name, 60)}: must be a text")
        try:
            name = inside_folder(name)
        except ValueError as error:
            raise EntryError(f"{where}: file_name {error}") from None
        found[entry["id"]] = ImageEntry(name, _sides(where, entry))
    if not found:
        raise EntryError("images: is empty")
    ids = sorted(found)
    return [found[number] for number in ids], {number: place for place, number in enumerate(ids)}


def _sides(where: str, entry: dict[str, Any]) -> tuple[int, int] | None:
    if "height" not in entry and "width" not in entry:
        return None
    sides = _integer(where, entry, "height"), _integer(where, entry, "width")
    if min(sides) < 1 or max(sides) > MOST_SIDE:
        raise EntryError(f"{where}: height and width are {shown(sides, 60)}: no sides of an image")
    return sides


# ------------------------------------------------------------------ the values of an entry


def _required(where: str, entry: dict[str, Any], key: str) -> Any:
    if key not in entry:
        raise EntryError(f"{where}: has no {key}")
    return entry[key]


def _integer(where: str, entry: dict[str, Any], key: str) -> int:
    value = _required(where, entry, key)
    if type(value) is not int:  # `type`, since True is an instance of int
        raise EntryError(f"{where}: {key} is {shown(value, 60)}: must be a whole number")
    return value


def _look_up(
    places: dict[int, int], where: str, entry: dict[str, Any], key: str, among: str
) -> int:
    number = _integer(where, entry, key)
    if number not in places:
        raise EntryError(f"{where}: {key} is {shown(number, 40)}: {among} has no such id")
    return places[number]


def _bbox(where: str, entry: dict[str, Any]) -> list[float]:
    value = _required(where, entry, "bbox")
    numbers = []
    if isinstance(value, list) and len(value) == 4:
        for each in value:
            number = finite(each)
            if number is not None:
                numbers.append(number)
    if len(numbers) != 4:
        raise EntryError(
            f"{where}: bbox is {shown(value, 80)}: must be four finite numbers:"
            " left, top, width, height"
        )
    return numbers


def _area(where: str, entry: dict[str, Any]) -> float:
    """The object's area, which is less than the box's; NaN where the file has none."""
    if "area" not in entry:
        return math.nan
    area = finite(entry["area"])
    if area is None or not 0 <= area <= MOST_AREA:
        raise EntryError(
            f"{where}: area is {shown(entry['area'], 60)}: must be a finite number, not below 0"
        )
    return area


def _is_crowd(where: str, entry: dict[str, Any]) -> bool:
    value = entry.get("iscrowd", 0)
    if value not in (0, 1):
        raise EntryError(f"{where}: iscrowd is {shown(value, 60)}: must be 0 or 1")
    return bool(value)
