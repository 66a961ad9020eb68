"""How far work is: a bar on a terminal, lines in a log file."""

import itertools

import pytest

from pipelines import progress
from pipelines.progress import tracked


def test_a_log_has_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count(0, 25)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    assert list(tracked(range(6), "reading", "batch")) == [0, 1, 2, 3, 4, 5]
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert [line.split(",")[:2] for line in lines] == [
        ["reading: 50%", " 3 of 6"],
        ["reading: 100%", " 6 of 6"],
    ]
    assert "left" in lines[0]
    assert "\r" not in told.err


def test_an_item_counts_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Items without a length need a total; whoever stops early leaves nothing behind."""
    seconds = itertools.count(0, 100)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    items = tracked(iter("abc"), "x", "set", 3)
    assert next(items) == "a"
    assert capsys.readouterr().err == ""
    assert next(items) == "b"
    assert "x: 33%, 1 of 3" in capsys.readouterr().err
    items.close()  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        next(tracked(iter("abc"), "x", "set"))
