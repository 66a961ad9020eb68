"""Pascal VOC's XML: what is read of it, and a message for each way in which it can be wrong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pipelines.sources import voc
from pipelines.sources.voc import read_voc, read_xml
from tests.pipelines.annotated_trees import voc_object, voc_tree, voc_xml, write_image


def test_pixels_from_one_become_edges_from_zero(tmp_path: Path) -> None:
    images, labels = voc_tree(tmp_path)
    found = read_voc(labels, images)
    assert found.classes == ("ant", "cat", "dog")
    assert [entry.name for entry in found.images] == ["1.jpg", "2.png", "3.jpg"]
    assert [entry.sides for entry in found.images] == [(60, 80), (30, 40), None]
    assert [entry.fault for entry in found.images] == [""] * 3
    assert found.boxes[:3] == [(0, 0, 80, 60), (10, 20, 20, 40), (4, 5, 7, 8)]
    assert found.boxes[3] == (-1, -1, 10, 10)
    assert found.image == [0, 0, 0, 1, 1, 1]
    assert found.labels == [2, 1, 2, 0, 0, 0]
    assert found.crowd == [False, True, False, False, False, False]
    assert np.isnan(found.area).all()  # that of the box
    assert found.notes == {voc.DIFFICULT: 1}


def test_the_image_of_a_file(tmp_path: Path) -> None:
    """What `filename` names, else the one of that stem, else the one of the XML file's stem."""
    for name in ("1.jpg", "2.PNG", "x.png", "deep/5.jpg", "6.jpg", "6.png", "7.jpg", "7.tif"):
        write_image(tmp_path / name, 1, 20, 20)
    thing = voc_object("thing", (1, 1, 9, 9))
    for stem, filename in {
        "1": "1.jpg",
        "2": None,
        "3": "x.jpg",
        "4": "gone.jpg",
        "5": "deep/5.jpg",
        "6": "6.png",
        "7": "gone.jpg",
    }.items():
        (tmp_path / f"{stem}.xml").write_text(voc_xml(filename, None, thing))
    (tmp_path / ".hidden.xml").write_text("no XML")
    found = read_voc(tmp_path, tmp_path).images
    names = ["1.jpg", "2.PNG", "x.png", "gone.jpg", "deep/5.jpg", "6.png", "gone.jpg"]
    assert [entry.name for entry in found] == names
    assert [bool(entry.fault) for entry in found] == [False] * 3 + [True] + [False] * 2 + [True]
    assert found[3].fault == f"there is no such file; {tmp_path}/4.xml names it"
    assert found[6].fault.endswith("7.xml may mean any of 7.jpg, 7.tif")


def test_one_image_of_two_files_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "1.jpg", 1, 20, 20)
    for stem in "ab":
        (tmp_path / f"{stem}.xml").write_text(voc_xml("1.jpg", None, voc_object("x", (1, 1, 2, 2))))
    with pytest.raises(ValueError, match=r"the image '1\.jpg' stands 2 times"):
        read_voc(tmp_path, tmp_path)


@pytest.mark.parametrize("filename", ["../1.jpg", "/etc/passwd", "a/../../1.jpg"])
def test_a_filename_that_leads_out_of_the_folder_is_refused(filename: str, tmp_path: Path) -> None:
    thing = voc_object("thing", (1, 1, 9, 9))
    (tmp_path / "1.xml").write_text(voc_xml(filename, None, thing))
    with pytest.raises(ValueError, match=r"1\.xml: filename '.*' must be a path that stays inside"):
        read_voc(tmp_path, tmp_path)


def test_folders_without_annotations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no XML files"):
        read_voc(tmp_path, tmp_path)
    (tmp_path / "1.xml").write_text(voc_xml("1.jpg", (1, 1)))
    with pytest.raises(ValueError, match="no object in any of 1 XML files"):
        read_voc(tmp_path, tmp_path)


# ------------------------------------------------------------------ what is wrong

GOOD = voc_object("cat", (1, 2, 3, 4))


def with_box(*box: object) -> str:
    return voc_xml("1.jpg", (9, 9), GOOD, voc_object("dog", box))


FINITE = "must be a finite number"
WRONG = {
    "empty": ("", "is no XML"),
    "text": ("hello", "is no XML"),
    "cut": (voc_xml("1.jpg", (9, 9), GOOD)[:-20], "is no XML"),
    "two roots": ("<annotation/><annotation/>", "is no XML"),
    "unknown encoding": ('<?xml version="1.0" encoding="foo"?><annotation/>', "is no XML"),
    "html": ("<html><body/></html>", "begins with <html>, not with <annotation>"),
    "entities": (
        '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>',
        "has a DOCTYPE",
    ),
    "a file as an entity": (
        '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation>&a;</annotation>',
        "has a DOCTYPE",
    ),
    "a plain document type": ('<!DOCTYPE annotation SYSTEM "x.dtd"><annotation/>', "has a DOCTYPE"),
    "an unknown entity": ("<annotation>&a;</annotation>", "is no XML"),
    "no name": (
        voc_xml("1.jpg", None, GOOD, GOOD.replace("<name>cat</name>", "")),
        "object 1: a class name is ''",
    ),
    "long name": (
        voc_xml("1.jpg", None, voc_object("x" * 1001, (1, 1, 2, 2))),
        "object 0: a class name is .*1,003 characters",
    ),
    "no bndbox": (
        voc_xml("1.jpg", None, GOOD.replace("bndbox", "polygon")),
        "object 0: has no bndbox",
    ),
    "no xmax": (
        voc_xml("1.jpg", None, GOOD.replace("xmax", "xmid")),
        f"object 0: xmax is '': {FINITE}",
    ),
    "NaN": (with_box("nan", 1, 2, 3), f"object 1: xmin is 'nan': {FINITE}"),
    "infinite": (with_box(1, 1, "inf", 3), f"object 1: xmax is 'inf': {FINITE}"),
    "1e999": (with_box(1, 1, 2, "1e999"), f"object 1: ymax is '1e999': {FINITE}"),
    "underscores": (with_box(1, 1, 2, "1_0"), f"object 1: ymax is '1_0': {FINITE}"),
    "text as a number": (with_box(1, "one", 2, 3), f"object 1: ymin is 'one': {FINITE}"),
    "long number": (with_box(1, "1" * 5000, 2, 3), rf"object 1: ymin is .*{FINITE}"),
    "difficult 2": (
        voc_xml("1.jpg", None, voc_object("x", (1, 1, 2, 2), 2)),
        "object 0: difficult is '2': must be 0 or 1",
    ),
    "width of text": (
        voc_xml("1.jpg", (1, 1), GOOD).replace("<width>1", "<width>x"),
        f"size: width is 'x': {FINITE}",
    ),
    "no height": (
        voc_xml("1.jpg", (1, 1), GOOD).replace("height", "tallness"),
        f"size: height is '': {FINITE}",
    ),
    "half a pixel": (
        voc_xml("1.jpg", (1, 1), GOOD).replace("<width>1", "<width>1.5"),
        "size: 1.5 x 1.0: must be whole numbers",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_named(what: str, tmp_path: Path) -> None:
    text, message = WRONG[what]
    (tmp_path / "good.xml").write_text(voc_xml("1.jpg", (9, 9), GOOD))
    (tmp_path / "wrong.xml").write_text(text)
    with pytest.raises(ValueError, match=rf"wrong\.xml: {message}") as caught:
        read_voc(tmp_path, tmp_path)
    assert len(str(caught.value)) < 1000


def test_numbers_as_programs_write_them(tmp_path: Path) -> None:
    path = tmp_path / "1.xml"
    path.write_text(with_box(" 1.5\n", "+2", "3e1", "-.5"))
    assert read_xml(path).objects[1].box == (0.5, 1, 30, -0.5)


def test_a_file_is_bounded_and_regular(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "1.xml"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"1\.xml: is a named pipe"):
        read_xml(path)
    path.unlink()
    path.write_text(voc_xml("1.jpg", (9, 9), GOOD))
    monkeypatch.setattr(voc, "MOST_BYTES", 50)
    with pytest.raises(ValueError, match=r"1\.xml: has more than 50 bytes"):
        read_xml(path)


def test_deep_nesting_does_not_end_the_process(tmp_path: Path) -> None:
    n = voc.MOST_BYTES // 8
    path = tmp_path / "deep.xml"
    path.write_text("<annotation>" + "<a>" * n + "</a>" * n + "</annotation>")
    assert read_xml(path).objects == []
