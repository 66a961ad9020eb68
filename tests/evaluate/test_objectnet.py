"""ObjectNet's own files say what of ImageNet an object is; what they lack is said in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fap.evaluate.objectnet import FOLDERS, LINES, NAMES, NUMBERS, meanings_in, parts_of
from tests.evaluate.objectnet_files import MEANINGS, write_mappings


@pytest.fixture
def mappings(tmp_path: Path) -> Path:
    write_mappings(tmp_path / "mappings")
    return tmp_path / "mappings"


def test_each_folder_means_its_classes(mappings: Path) -> None:
    found = meanings_in(mappings)
    assert found == MEANINGS
    assert list(found) == sorted(found)


def test_where_the_parts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole archive, its folder of images, and a tar or a .beton of that beside it."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images.tar").touch()
    mappings = tmp_path / "mappings"
    assert parts_of(tmp_path) == (tmp_path / "images", mappings)
    assert parts_of(tmp_path / "images") == (tmp_path / "images", mappings)
    assert parts_of(tmp_path / "images.tar") == (tmp_path / "images.tar", mappings)
    monkeypatch.chdir(tmp_path / "images")
    assert parts_of(Path(".")) == (Path("."), mappings)
    assert parts_of(Path("../images")) == (Path("../images"), mappings)


@pytest.mark.parametrize("name", [FOLDERS, NAMES, LINES, NUMBERS])
def test_a_file_that_lacks(mappings: Path, name: str) -> None:
    (mappings / name).unlink()
    with pytest.raises(ValueError, match=rf"mappings: holds no {name}; ObjectNet's archive has"):
        meanings_in(mappings)


def test_no_mappings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"x: holds no {FOLDERS}, {NAMES}, {LINES}, {NUMBERS}; "):
        meanings_in(tmp_path / "x")


Change = Callable[[dict[str, Any]], Any]


def with_entry(key: str, value: Any) -> Change:
    return lambda content: content | {key: value}


def without(key: str) -> Change:
    return lambda content: {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(("name", "change", "says"), [
    (FOLDERS, lambda content: [*content], "must be a JSON object with entries"),
    (FOLDERS, lambda content: {}, "must be a JSON object with entries"),
    (FOLDERS, with_entry("vase", None), "'vase': None: must be a text"),
    (FOLDERS, with_entry("jar", "Vase"), "'Vase' is two folders' label"),
    (FOLDERS, without("vase"), "'Vase': no label of folder_to_objectnet_label.json"),
    (NAMES, with_entry("Vase", ["vase"]), r"'Vase': \['vase'\]: must be a text"),
    (NAMES, with_entry("Vase", "jar of jam"), "'Vase': 'jar of jam': not one line of imagenet_to"),
    (NAMES, with_entry("Vase", "vase;lemon"), "'Vase': 'vase;lemon': not one line of"),
    (NAMES, with_entry("Vase", "crane"), "'Vase': 'crane': not one line of"),  # it is two
    (NAMES, with_entry("Vase", ""), "'Vase': '': not one line of"),
    (NAMES, with_entry("Vase", "vase; lemon"), "means ImageNet's n07749582 twice"),
    (NAMES, with_entry("Vase", "vase; vase"), "means ImageNet's n04522168 twice"),
    (NUMBERS, without("999"), 'must give each of "0" to "999" a line of its own, 0 to 999'),
    (NUMBERS, with_entry("1000", 1000), "a line of its own"),
    (NUMBERS, with_entry("7", "7"), "a line of its own"),
    (NUMBERS, with_entry("7", [7]), "a line of its own"),
    (NUMBERS, with_entry("7", True), "a line of its own"),
    (NUMBERS, lambda content: content | {"7": content["8"]}, "a line of its own"),
    (NUMBERS, lambda content: {key: n + 1 for key, n in content.items()}, "a line of its own"),
])  # fmt: skip
def test_json_that_is_none_of_objectnets(
    mappings: Path, name: str, change: Change, says: str
) -> None:
    content = json.loads((mappings / name).read_text())
    (mappings / name).write_text(json.dumps(change(content)))
    with pytest.raises(ValueError, match=says) as caught:
        meanings_in(mappings)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", [FOLDERS, NAMES, NUMBERS])
@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "\udcff"], ids=["empty", "half", "deep", "bytes"]
)
def test_what_is_no_json(mappings: Path, name: str, text: str) -> None:
    (mappings / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"{name}: is no JSON: "):
        meanings_in(mappings)


def test_lines_that_are_none_of_objectnets(mappings: Path) -> None:
    lines = (mappings / LINES).read_bytes()
    (mappings / LINES).write_bytes(lines + b"one more\n")
    with pytest.raises(ValueError, match=f"{LINES}: has 1,001 lines, not 1,000"):
        meanings_in(mappings)
    (mappings / LINES).write_bytes(b"\xff" + lines)
    with pytest.raises(ValueError, match=f"{LINES}: is no text: "):
        meanings_in(mappings)
    (mappings / LINES).write_bytes(lines.replace(b"\n", b"\r\n"))
    assert meanings_in(mappings) == MEANINGS


@pytest.mark.parametrize("name", [FOLDERS, NAMES, LINES, NUMBERS])
def test_what_is_no_file_of_a_fitting_size(mappings: Path, name: str) -> None:
    (mappings / name).unlink()
    os.mkfifo(mappings / name)
    with pytest.raises(ValueError, match=f"{name}: is a named pipe, not a file"):
        meanings_in(mappings)
    (mappings / name).unlink()
    with open(mappings / name, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=f"{name}: has more than 1,048,576 bytes"):
        meanings_in(mappings)
