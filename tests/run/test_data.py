"""The data of a run: how many classes, whose names, and which of them data.val may lack."""

import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fap.checkpoint import Checkpoints
from fap.config import Config, load_config
from fap.run.data import open_data
from pipelines.sources.beton import BetonStore
from tests.conftest import noise_beton, photo, write_beton
from tests.run.runs import assert_same, final_state, run, without_metrics


def image_folder(root: Path, classes: list[str], each: int = 8) -> Path:
    rng = np.random.default_rng(len(classes))
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(photo(rng, 40, 36)).save(root / name / f"{i}.jpg")
    return root


def config(train: Path, val: Path, n: int | None, *more: str) -> Config:
    c = load_config(None, [f"data.train={train}", f"data.val={val}", *more])
    return c.model_copy(update={"model": c.model.model_copy(update={"num_classes": n})})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    classes = {
        "train": ["ant", "bee", "cat", "dog"],
        "rare": ["bee", "dog"],
        "other": ["bee", "eel"],
        "single": ["ant"],
    }
    return {name: image_folder(root / name, names) for name, names in classes.items()}


@pytest.fixture(scope="module")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels 0 to 3 and no sidecar."""
    return noise_beton(tmp_path_factory.mktemp("nameless") / "a.beton", seed=1, count=16, classes=4)


@pytest.mark.parametrize("wanted", [None, 4])
def test_the_class_count_is_that_of_the_named_classes(
    folders: dict[str, Path], wanted: int | None
) -> None:
    data = open_data(config(folders["train"], folders["train"], wanted))
    assert data.n_classes == 4
    assert data.matching.label_map is None
    assert data.lines[2].startswith("warning: data.val is data.train: ")
    assert data.lines[:2] == [
        f"{field:10} 32 images, 4 class(es) ant to dog, 8 images per class"
        for field in ("train", "val")
    ]
    assert data.train_identity["classes"] == ("ant", "bee", "cat", "dog")


@pytest.mark.parametrize("wanted", [3, 5, 1000])
def test_another_class_count_is_an_error_that_says_what_to_write(
    folders: dict[str, Path], wanted: int
) -> None:
    with pytest.raises(
        ValueError,
        match=f"model.num_classes = {wanted}, .* names 4 classes .*: write model.num_classes=4",
    ):
        open_data(config(folders["train"], folders["train"], wanted))


def test_without_names_the_labels_count(nameless: Path) -> None:
    data = open_data(config(nameless, nameless, None))
    assert data.n_classes == 4
    assert (
        data.lines[0]
        == "train      16 images, labels 0 to 3 without class names, 4 images per class"
    )
    assert data.lines[2].startswith("warning: data.val is data.train")
    assert data.lines[3] == "classes    4: data.train has no class names, its largest label is 3"
    assert (
        open_data(config(nameless, nameless, 6)).n_classes == 6
    )  # said, so meant: two classes have no images
    with pytest.raises(ValueError, match=r"model\.num_classes = 3, but .* holds labels 0 to 3"):
        open_data(config(nameless, nameless, 3))


def test_data_val_may_lack_classes_where_names_map(
    folders: dict[str, Path], nameless: Path
) -> None:
    data = open_data(config(folders["train"], folders["rare"], None))
    assert data.matching.label_map is not None
    assert data.matching.label_map.tolist() == [1, 3]
    assert data.lines[1] == "val        16 images, 2 class(es) bee to dog, 8 images per class"
    with pytest.raises(ValueError, match=r"data\.val = .*other does not fit data\.train = .*'eel'"):
        open_data(config(folders["train"], folders["other"], None))


def test_names_on_one_side_only_are_refused(folders: dict[str, Path], nameless: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.train has class names and data\.val has none"):
        open_data(config(folders["train"], nameless, None))
    with pytest.raises(ValueError, match=r"data\.val has class names and data\.train has none"):
        open_data(config(nameless, folders["train"], None))


def test_without_names_data_val_may_hold_no_larger_labels(nameless: Path, tmp_path: Path) -> None:
    few = noise_beton(tmp_path / "few.beton", seed=1, count=16, classes=2)
    assert open_data(config(nameless, few, None)).matching.label_map is None
    with pytest.raises(
        ValueError, match=r"data\.val = .* holds labels up to 3, but the model has 2 classes"
    ):
        open_data(config(few, nameless, None))


def test_a_single_class_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="the only class is 'ant'"):
        open_data(config(folders["single"], folders["single"], None))


def test_many_names_are_cut_in_the_middle(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, [f"c{i}" for i in range(9)], each=1)
    with pytest.raises(ValueError, match=r"\('c0', 'c1', 'c2' ... 'c6', 'c7', 'c8'\)"):
        open_data(config(folder, folder, 3))


def test_what_a_source_passed_over_is_told(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, ["ant", "bee"], each=2)
    (folder / "ant" / "notes.txt").write_text("no image")
    assert open_data(config(folder, folder, None)).lines[1] == f"{'':10} ignored: 1 .txt"


# ------------------------------------------------------------------ several files as one data set


def divide(path: Path, folder: Path, parts: list[int]) -> Path:
    """The samples of a `.beton` in shards that begin at `parts`; their pattern."""
    whole = BetonStore(path)
    folder.mkdir()
    for i, (start, end) in enumerate(pairwise([*parts, len(whole)])):
        shape = [(whole.heights[k], whole.widths[k], 3) for k in range(start, end)]
        images = [whole.read(start + k).reshape(shape[k]) for k in range(end - start)]
        write_beton(folder / f"{i}.beton", images, whole.labels[start:end].tolist())
    whole.close()
    return folder / "*.beton"


@pytest.mark.slow
def test_a_run_of_shards_is_that_of_the_one_file(
    tiny_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = divide(tiny_beton, tmp_path / "shards", [0, 20, 21, 70])
    expected, _ = run(tiny_beton, tmp_path / "whole")
    capsys.readouterr()
    folder, _ = run(pattern, tmp_path / "runs")
    assert_same(final_state(folder), final_state(expected))
    assert "4 file(s), 0.beton to 3.beton" in capsys.readouterr().out
    # The data may move, but not change.
    elsewhere = divide(tiny_beton, tmp_path / "elsewhere", [0, 20, 21, 70])
    run(elsewhere, tmp_path / "runs", "resume=auto")
    other = divide(tiny_beton, tmp_path / "other", [0, 20, 22, 70])
    with pytest.raises(ValueError, match="but another content"):
        run(other, tmp_path / "runs", "resume=auto")


def test_a_run_of_a_tar_is_that_of_its_class_folders(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """In place: neither is converted. The same data, so the same identity too."""
    tar = tmp_path / "train.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(folders["train"], "train")
    states = []
    for name, data in (("folder", folders["train"]), ("tar", tar)):
        words = ["model.num_classes=4", "optim.clean_batch=8", "method.group_rows=8"]
        folder, _ = run(data, tmp_path / name, *words, "budget.epochs=3", "budget.milestones=[2]")
        newest = Checkpoints(folder / "checkpoints").newest()
        assert newest is not None
        states.append((newest[1], newest[2]["train"]))
    (of_folder, folder_identity), (of_tar, tar_identity) = states
    assert_same(without_metrics(of_folder), without_metrics(of_tar))
    assert folder_identity == tar_identity


def test_data_train_names_a_pattern_without_files(tiny_beton: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none/\*\.beton: no file matches this pattern"):
        open_data(config(tmp_path / "none" / "*.beton", tiny_beton, None))
