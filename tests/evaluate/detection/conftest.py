"""A detector, photos and boxes that `fap-eval` is tried on; see world.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fap.cli import eval_command
from tests.evaluate.detection import world as detection_world
from tests.evaluate.detection.world import CANVAS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return detection_world.write_world(tmp_path_factory.mktemp("detection"))


@pytest.fixture
def fresh(world: Path, tmp_path: Path) -> Path:
    """A copy of the world, to be changed."""
    for file in world.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """None, unless all corruptions are asked for: starting them takes most of the time."""
    monkeypatch.setattr(eval_command, "SMALL", max(CANVAS))
