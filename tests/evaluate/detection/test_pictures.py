"""Pictures of what a detector found, as `fap-eval` draws them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from fap.evaluate.results import safe_name
from fap.tasks.draw_boxes import FOUND, TRUE
from pipelines import open_store
from pipelines.corrupt import corrupt
from tests.evaluate.detection.world import (
    CANVAS,
    CHECKPOINT,
    CLASSES,
    DATA,
    SIDES,
    WHERE,
    pictures,
    write_checkpoint,
    write_data,
)
from tests.evaluate.world import run, write_folder
from tests.evaluate.world import write_checkpoint as write_classifier


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(-1).any())


def test_pictures_show_the_first_images_with_boxes(world: Path) -> None:
    run(world, "--corrupt", "fog", **WHERE, out="drawn")
    files = pictures(world / "drawn")
    assert len(files) == 2
    for file, key in zip(files, ("clean", "computed-fog-3"), strict=True):
        assert file.name.startswith(f"detector-seed0-{key}-")
        assert safe_name(file.stem) == file.stem
        sheet = np.asarray(Image.open(file))
        assert sheet.shape == (CANVAS[0], 4 * CANVAS[1] + 3 * 4, 3)
        assert has(sheet, TRUE)
        assert has(sheet, FOUND) or key != "clean"
    clean, foggy = (np.asarray(Image.open(file)).astype(int) for file in files)
    assert np.abs(clean - foggy).mean() > 5
    # The first image is narrow: right of it the canvas is black.
    height, width = SIDES[1]
    second = clean[:, CANVAS[1] + 4 : 2 * CANVAS[1] + 4]
    assert (second[:, -20:] == 0).all()
    assert second[: CANVAS[0] // 2, : width * CANVAS[0] // height].mean() > 20


def test_only_the_drawn_images_are_corrupted_again(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(fresh, "--corrupt", "fog", **WHERE)
    shutil.rmtree(fresh / "out" / "pictures")
    seen: list[int] = []

    def noting(
        image: np.ndarray, name: str, severity: int, seed: int, index: int, *, as_coco_c: bool
    ) -> np.ndarray:
        seen.append(index)
        return corrupt(image, name, severity, seed, index, as_coco_c=as_coco_c)

    monkeypatch.setattr("pipelines.corrupt_store.corrupt", noting)
    run(fresh, "--corrupt", "fog", **WHERE)
    assert len(pictures(fresh / "out")) == 2
    assert sorted(seen) == [0, 1, 2, 3]


def test_names_out_of_a_checkpoint_are_drawn_safely(fresh: Path) -> None:
    names = ("犬\n../", "b" * 500, "\x1b[31m", "dog")
    write_checkpoint(fresh / CHECKPOINT, classes=names)
    store = open_store(fresh / DATA)
    for old in fresh.glob(f"{DATA}*"):
        old.unlink()
    write_data(fresh / DATA, store.annotations, classes=names)
    run(fresh, **WHERE)
    assert len(pictures(fresh / "out")) == 1


def test_a_picture_that_cannot_be_written_costs_a_warning(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fap.evaluate.pictures.write_whole", full)
        found, _ = run(fresh, "--corrupt", "fog", **WHERE)
    told = capsys.readouterr().err
    assert told.count("warning: no picture") == 1
    assert "No space left on device" in told
    assert len(found["results"]) == 2
    (fresh / "out" / "pictures").rmdir()
    (fresh / "out" / "pictures").write_text("no folder")
    run(fresh, **WHERE)
    assert "warning: no picture" in capsys.readouterr().err


def test_classifiers_have_no_pictures(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", CLASSES, 1, (40, 36))
    write_classifier(tmp_path / CHECKPOINT, CLASSES, len(CLASSES))
    run(tmp_path, model=CHECKPOINT)
    assert not (tmp_path / "out" / "pictures").exists()
