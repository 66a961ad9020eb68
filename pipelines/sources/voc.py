"""Pascal VOC's annotations: a folder of XML files, one per image.

    annotation   filename, size (width, height), objects
    object       name, bndbox (xmin, ymin, xmax, ymax), and perhaps difficult

Pixels are numbered from 1, and a box holds the last one too. Here a box of the pixels 1 to 4 is
from 0 to 4. An object marked difficult is a crowd: VOC's own scoring leaves it out.
"""

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from pipelines.archives.listing import SUFFIXES
from pipelines.files import listed, read_regular, readable, shown
from pipelines.names import checked_names
from pipelines.progress import in_order
from pipelines.sources.annotated import Annotated, ImageEntry, inside_folder, refuse_doubles

MOST_BYTES = 4 << 20  # of a file: 10,000 objects
THREADS = 4  # that wait for the disk
CHUNK = 32  # files of one task
NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?\s*")
LONGEST_NUMBER = 40  # characters

DIFFICULT = "objects marked difficult: taken as crowd boxes"


class VocObject(NamedTuple):
    name: str
    box: tuple[float, ...]  # left, top, right, bottom
    difficult: bool


class VocImage(NamedTuple):
    """What one XML file says."""

    filename: str | None
    sides: tuple[int, int] | None  # height, width
    objects: list[VocObject]


def read_voc(folder: str | Path, images: str | Path) -> Annotated:
    """What the XML files of a folder say, in the order of their names; classes by their names.

    Raises:
        ValueError: no such files, or one of them is not of this form.
        OSError: one cannot be read.
    """
    folder = Path(folder)
    paths = [folder / name for name in sorted(os.listdir(folder)) if _is_annotation(name)]
    if not paths:
        raise ValueError(f"{readable(folder)}: no XML files, which hold Pascal VOC's annotations")
    said = list(in_order(read_xml, paths, THREADS, CHUNK, "annotations", "file"))

    names = sorted({each.name for image in said for each in image.objects})
    if not names:
        raise ValueError(f"{readable(folder)}: no object in any of {len(paths):,} XML files")
    classes = checked_names(names)
    assert classes is not None
    label_of = {name: label for label, name in enumerate(classes)}
    stems = _names_by_stem(images)
    entries = [
        _entry(path, image, Path(images), stems) for path, image in zip(paths, said, strict=True)
    ]
    refuse_doubles(folder, (entry.name for entry in entries if not entry.fault))

    annotated = Annotated(classes, entries)
    for place, image in enumerate(said):
        for each in image.objects:
            annotated.add(place, each.box, label_of[each.name], crowd=each.difficult)
    annotated.notes = {DIFFICULT: sum(annotated.crowd)}
    return annotated


def _is_annotation(name: str) -> bool:
    return name.lower().endswith(".xml") and not name.startswith(".")


# ------------------------------------------------------------------ the image of a file


def _names_by_stem(images: str | Path) -> dict[str, list[str]]:
    """The image files in the folder by their names without suffix."""
    found = defaultdict(list)
    for name in sorted(os.listdir(images)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in SUFFIXES:
            found[stem].append(name)
    return found


def _entry(path: Path, said: VocImage, images: Path, stems: dict[str, list[str]]) -> ImageEntry:
    """The image of an XML file: what `filename` names.

    Where there is no such file it is the only one of that stem, or of the XML file's.
    """
    filename = said.filename or path.stem
    try:
        name = inside_folder(filename)
    except ValueError as error:
        raise ValueError(f"{readable(path)}: filename {error}") from None
    if said.filename is not None and os.path.lexists(images / name):
        return ImageEntry(name, said.sides)
    fault = f"there is no such file; {readable(path)} names it"
    for stem in (os.path.splitext(filename)[0], path.stem):
        candidates = stems.get(stem, [])
        if len(candidates) == 1:
            return ImageEntry(candidates[0], said.sides)
        if candidates:
            fault = f"there is no such file; {readable(path)} may mean any of {listed(candidates)}"
    return ImageEntry(filename, said.sides, fault)


# ------------------------------------------------------------------ one file


def read_xml(path: Path) -> VocImage:
    """What one XML file says. ValueError names the file and the object."""
    try:
        return _parse(_tree(read_regular(path, MOST_BYTES)))
    except (expat.ExpatError, LookupError) as error:  # LookupError: an unknown encoding
        raise ValueError(f"{readable(path)}: is no XML: {error}") from None
    except ValueError as error:
        why = str(error).removeprefix(f"{readable(path)}: ")
        raise ValueError(f"{readable(path)}: {why}") from None


def _tree(data: bytes) -> ElementTree.Element:
    """The elements of an XML file.

    One with a document type is refused: it may define entities, which grow to any size or read
    other files.
    """
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise ValueError("has a DOCTYPE, which no annotation needs: remove it")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(data, True)
    return builder.close()


def _parse(root: ElementTree.Element) -> VocImage:
    if root.tag != "annotation":
        raise ValueError(f"begins with <{readable(root.tag, 60)}>, not with <annotation>")
    filename = (root.findtext("filename") or "").strip() or None
    objects = []
    for i, element in enumerate(root.findall("object")):
        objects.append(_object(element, f"object {i}"))
    return VocImage(filename, _sides(root.find("size")), objects)


def _object(element: ElementTree.Element, where: str) -> VocObject:
    name = (element.findtext("name") or "").strip()
    try:
        checked_names([name])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    bndbox = element.find("bndbox")  # of the object: its parts have others
    if bndbox is None:
        raise ValueError(f"{where}: has no bndbox")
    xmin, ymin, xmax, ymax = _numbers(bndbox, ("xmin", "ymin", "xmax", "ymax"), where)
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"{where}: difficult is {shown(difficult, 40)}: must be 0 or 1")
    return VocObject(name, (xmin - 1, ymin - 1, xmax, ymax), difficult == "1")


def _sides(size: ElementTree.Element | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = _numbers(size, ("height", "width"), "size")
    if not (height.is_integer() and width.is_integer()):
        raise ValueError(f"size: {width} x {height}: must be whole numbers")
    return int(height), int(width)


def _numbers(element: ElementTree.Element, names: Iterable[str], where: str) -> list[float]:
    found = []
    for name in names:
        text = element.findtext(name) or ""
        number = math.nan
        if len(text) <= LONGEST_NUMBER and NUMBER.fullmatch(text):
            number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{where}: {name} is {shown(text, 60)}: must be a finite number")
        found.append(number)
    return found
