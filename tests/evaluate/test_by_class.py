"""Accuracy class by class and the confusion matrix: what is written, kept and told."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fap.evaluate import by_class, report
from fap.evaluate.results import Results
from fap.tasks.class_counts import ClassCounts
from tests.evaluate.reports import report_of, result
from tests.evaluate.test_results import ORIGIN, TASK, result_file
from tests.evaluate.world import counted, fresh, run

NAMES = ("ant", "bee, wild", "cat", 'd"og')
CONFUSION = np.array([[3, 1, 0, 0], [0, 0, 0, 0], [5, 0, 4, 1], [0, 0, 0, 6]])
COUNTS = ClassCounts.of(CONFUSION)


def rows_of(file: Path) -> list[list[str]]:
    with open(file, newline="") as text:
        return list(csv.reader(text))


def test_the_tables_are_what_a_spreadsheet_reads(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(by_class.per_class_csv(COUNTS, NAMES))
    assert rows_of(tmp_path / "a.csv") == [
        ["class", "images", "right", "accuracy_percent", "most_often_taken_for", "times"],
        ["ant", "4", "3", "75.00", "bee, wild", "1"],
        ["bee, wild", "0", "0", "", "", "0"],
        ["cat", "10", "4", "40.00", "ant", "5"],
        ['d"og', "6", "6", "100.00", "", "0"],
    ]
    (tmp_path / "b.csv").write_bytes(by_class.confusion_csv(CONFUSION, NAMES))
    assert rows_of(tmp_path / "b.csv") == [
        ["class / taken for", *NAMES],
        *([name, *map(str, row)] for name, row in zip(NAMES, CONFUSION.tolist(), strict=True)),
    ]
    (tmp_path / "c.csv").write_bytes(by_class.per_class_csv(COUNTS, None))
    assert [row[0] for row in rows_of(tmp_path / "c.csv")[1:]] == ["0", "1", "2", "3"]
    odd = by_class.per_class_csv(COUNTS, ("\ud800", "\n", "c", "d")).decode()
    assert "\\ud800,4,3" in odd


def test_the_hardest_classes_are_told() -> None:
    assert by_class.hardest(COUNTS, NAMES) == [
        ("worst classes (per_class.csv)", "cat 40.0% of 10, ant 75.0% of 4"),
        (
            "most often mixed up (confusion.csv)",
            'cat taken for ant 5 of 10, ant taken for bee, wild 1 of 4, cat taken for d"og 1 of 10',
        ),
    ]
    assert by_class.hardest(ClassCounts.of(np.diag([3, 0, 2])), None) == []
    without = replace(COUNTS, confusion=None)
    assert [title for title, _ in by_class.hardest(without, NAMES)] == [
        "worst classes (per_class.csv)"
    ]


@pytest.mark.slow
def test_each_checkpoint_of_a_report_has_its_own(tmp_path: Path) -> None:
    one = replace(report_of({"clean": result()}), names=NAMES, counts=COUNTS)
    other = replace(one, name="other", counts=ClassCounts.of(CONFUSION.T))
    report.write_report([one], tmp_path / ".")
    written = {"per_class.csv", "confusion.csv", "confusion.png"}
    assert written <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "two").mkdir()
    report.write_report([one, replace(one, counts=None), other], tmp_path / "two")
    assert rows_of(tmp_path / "two" / "confusion_1.csv") == rows_of(tmp_path / "confusion.csv")
    assert rows_of(tmp_path / "two" / "confusion_3.csv")[3] == ["cat", "0", "0", "4", "0"]
    assert not (tmp_path / "two" / "confusion_2.csv").exists()
    text = report.markdown([one, other])
    assert "- worst classes (per_class_1.csv) of tiny, seed 0, step 5: cat 40.0% of 10" in text
    tree = json.loads((tmp_path / "report.json").read_text())[0]
    assert "counts" not in tree


# ------------------------------------------------------------------ through fap-eval


def test_the_command_writes_them_and_they_are_kept(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = fresh(world, tmp_path, "val")
    found, text = run(at)
    rows = rows_of(at / "out" / "per_class.csv")[1:]
    assert [row[0] for row in rows] == ["n01", "n02", "n03", "n04", "n05", "n06"]
    assert [row[1] for row in rows] == ["3"] * 6
    n_right = sum(int(row[2]) for row in rows)
    assert found["results"]["clean"]["top1"] == n_right / 18
    table = np.array([row[1:] for row in rows_of(at / "out" / "confusion.csv")[1:]], int)
    assert table.sum() == 18
    assert table.trace() == n_right
    assert "worst classes (per_class.csv): " in text
    # Found again: nothing is evaluated, and the same is written.
    before = (at / "out" / "confusion.csv").read_bytes()
    (at / "out" / "confusion.csv").unlink()
    calls = counted(monkeypatch)
    run(at)
    assert calls == []
    assert (at / "out" / "confusion.csv").read_bytes() == before
    # Kept by a version without counts: evaluated again.
    file = result_file(at / "out" / "results")
    tree = json.loads(file.read_text())
    del tree["counts"]
    file.write_text(json.dumps(tree))
    run(at)
    assert len(calls) == 1
    assert (at / "out" / "confusion.csv").read_bytes() == before


def test_labels_by_name_are_counted_as_the_models(world: Path, tmp_path: Path) -> None:
    """Data with other folders than the model's: their rows stand at the model's classes."""
    run(world, data="r", out="of_r")
    rows = rows_of(world / "of_r" / "per_class.csv")[1:]
    assert [(row[0], row[1]) for row in rows if row[1] != "0"] == [("n02", "4"), ("n05", "4")]


# ------------------------------------------------------------------ kept counts

KEPT = result(top1=0.65, count=20)


def keep(tmp_path: Path, said: list[str]) -> Results:
    results = Results(tmp_path / "results", said.append)
    results.keep("run-clean", ORIGIN, KEPT, COUNTS)
    return results


def found_counts(results: Results, n_classes: int = 4) -> ClassCounts | None:
    return results.find_counts("run-clean", ORIGIN, KEPT, n_classes)


def test_kept_counts_are_found_again(tmp_path: Path) -> None:
    said: list[str] = []
    found = found_counts(keep(tmp_path, said))
    assert found is not None
    np.testing.assert_array_equal(found.confusion, CONFUSION)
    assert found.n_right.tolist() == [3, 0, 4, 6]
    assert results_agree(keep(tmp_path, said))
    assert said == []


def results_agree(results: Results) -> bool:
    return results.find("run-clean", ORIGIN, 20, TASK) == KEPT


@pytest.mark.parametrize(
    "damage", ["text", "null", "other classes", "bomb", "truncated", "negative", "one more"]
)
def test_damaged_counts_are_counted_again(tmp_path: Path, damage: str) -> None:
    said: list[str] = []
    results = keep(tmp_path, said)
    file = result_file(tmp_path / "results")
    tree = json.loads(file.read_text())
    tree["counts"] = damaged(damage, tree["counts"])
    file.write_text(json.dumps(tree))
    n_classes = 5 if damage == "other classes" else 4
    assert found_counts(results, n_classes) is None
    assert len(said) == 1
    assert "has no counts" in said[0]


def damaged(how: str, counts: str) -> Any:
    from fap.evaluate.results import _packed

    table = CONFUSION.copy()
    match how:
        case "text":
            return "no counts"
        case "null":
            return None
        case "truncated":
            return counts[:-8]
        case "bomb":
            return _packed(ClassCounts.of(np.zeros((1000, 1000), np.int64)))
        case "negative":
            table[1, 1] -= 1
            table[0, 0] += 1
        case "one more":
            table[0, 0] += 1
        case _:
            return counts
    return _packed(ClassCounts(table.sum(1), table.diagonal(), table))


def test_a_report_leaves_no_file_of_a_former_one(tmp_path: Path) -> None:
    """Three checkpoints, then one, in one folder."""
    one = replace(report_of({"clean": result()}), counts=COUNTS, names=NAMES)
    others = [replace(one, seed=seed, content=str(seed)) for seed in (1, 2)]
    report.write_report([one, *others], tmp_path)
    assert (tmp_path / "per_class_3.csv").exists()
    report.write_report([one], tmp_path)
    assert {path.name for path in tmp_path.glob("*class*.csv")} == {"per_class.csv"}
    assert {path.name for path in tmp_path.glob("confusion*.csv")} == {"confusion.csv"}
