"""A kept result is found again by exactly what it was computed from, and damage is no result."""

import json
import math
import os
import threading
import time
from pathlib import Path

import pytest

from fap.evaluate.results import Results, safe_name
from fap.tasks import make_task
from fap.tasks.base import Result
from tests.evaluate.world import tiny_config

ORIGIN = {"set": "clean", "images": {"data": {"classes": ["b", "a"]}}}
RESULT = {"loss": 1.5, "top1": 0.25, "top5": 1.0, "ece": 0.1, "count": 40}
TASK = make_task(tiny_config())


def find(results: Results, origin: dict, name: str = "run-clean") -> Result | None:
    return results.find(name, origin, 40, TASK)


def test_a_result_belongs_to_its_origin(tmp_path: Path) -> None:
    results = Results(tmp_path / "results", pytest.fail)
    assert find(results, ORIGIN) is None
    results.keep("run-clean", ORIGIN, RESULT)
    found = find(results, ORIGIN)
    assert found == RESULT
    assert [*found] == [*RESULT]
    assert type(found["count"]) is int
    assert find(results, dict(reversed(ORIGIN.items()))) == RESULT
    assert find(results, ORIGIN | {"bn": "aux"}) is None
    assert len(list((tmp_path / "results").iterdir())) == 1
    diverged = {"loss": math.nan, "top1": 0.0, "top5": 0.0, "ece": math.nan, "count": 40}
    results.keep("run-clean", ORIGIN, diverged)
    assert math.isnan(find(results, ORIGIN)["loss"])


def result_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def spoilt(file: Path, how: str) -> None:
    tree = json.loads(file.read_text())
    match how:
        case "truncated":
            file.write_text(file.read_text()[:-9])
        case "empty":
            file.write_text("")
        case "binary":
            file.write_bytes(os.urandom(2000))
        case "huge":
            os.truncate(file, 1 << 40)
        case "deep":
            file.write_text("[" * 60_000)
        case "folder":
            file.unlink()
            file.mkdir()
        case "fifo":
            file.unlink()
            os.mkfifo(file)
        case "device":
            file.unlink()
            file.symlink_to("/dev/zero")
        case "list":
            file.write_text("[1]")
        case "null":
            file.write_text("null")
        case "another's":
            file.write_text(json.dumps(tree | {"of": "0" * 64}))
        case _:
            field, value = how.split("=")
            result = tree["result"] | {field: json.loads(value)}
            file.write_text(json.dumps(tree | {"result": result}))


@pytest.mark.parametrize("how", [
    "truncated", "empty", "binary", "huge", "deep", "folder", "fifo", "device", "list", "null",
    "another's", "top1=2", "top1=true", 'top1="0.5"', "top1=NaN", "top1=-1", "top5=0.1",
    "loss=null", "loss=-1", f"loss=1{'0' * 400}", "count=41", "count=40.0", "count=true", "extra=1",
])  # fmt: skip
def test_a_damaged_result_is_computed_again(tmp_path: Path, how: str) -> None:
    said: list[str] = []
    results = Results(tmp_path / "results", said.append)
    results.keep("run-clean", ORIGIN, RESULT)
    file = result_file(tmp_path / "results")
    spoilt(file, how)
    assert find(results, ORIGIN) is None
    assert len(said) == 1
    assert str(file) in said[0]
    assert len(said[0]) < 500
    results.keep("run-clean", ORIGIN, RESULT)
    if how == "folder":
        assert "cannot be kept" in said[-1]
    else:
        assert find(results, ORIGIN) == RESULT


def test_two_processes_may_keep_results_in_one_folder(tmp_path: Path) -> None:
    """Of many writers at once a reader sees one whole result."""
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            Results(tmp_path / "r", pytest.fail).keep("run-clean", ORIGIN, RESULT)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    try:
        reader = Results(tmp_path / "r", pytest.fail)
        while find(reader, ORIGIN) is None:
            time.sleep(0.01)
        found = [find(reader, ORIGIN) for _ in range(300)]
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert found == [RESULT] * 300
    assert [f.suffix for f in (tmp_path / "r").iterdir()] == [".json"]


@pytest.mark.parametrize("name", [
    "../../../x", "/etc/x", "..", ".", "", "a/b", "a\0b", "a\nb", "\ud800", "x" * 5000, "é",
    "-rf", "~",
])  # fmt: skip
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """A run's name comes out of a checkpoint, which may be a stranger's."""
    assert "/" not in safe_name(name)
    assert not safe_name(name).startswith(".")
    results = Results(tmp_path / "out" / "results", pytest.fail)
    results.keep(f"{name}-computed/fog/3", ORIGIN, RESULT)
    assert find(results, ORIGIN, f"{name}-computed/fog/3") == RESULT
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["results"]
    assert result_file(tmp_path / "out" / "results").suffix == ".json"
