"""The folder of a run: nothing before the run can start, one process at a time."""

import os
import shutil
from pathlib import Path
from typing import IO

import pytest
import torch

from fap.config import load_config
from fap.run import folder as run_folder
from fap.run.train import Run
from tests.run.runs import (
    RUN,
    fail_in_the_first_step,
    fail_on_a_full_disk,
    fail_without_the_package,
    run,
    words,
)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file's content, None for a folder."""
    found: dict[str, bytes | None] = {}
    for path in folder.rglob("*"):
        found[str(path.relative_to(folder))] = None
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "config.yaml"])
def test_what_is_no_file_in_a_run_folder_is_an_error_at_once(
    tiny_beton: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / RUN
    folder.mkdir(parents=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name}: is not a file"):
        Run(load_config(None, words(tiny_beton, tmp_path, "resume=auto")))
    assert [p.name for p in folder.iterdir()] == [name]


STARTS_THAT_FAIL = {
    "data": (["data.val=/nowhere.beton"], None, ValueError),
    "model": (["model.name=inception_v3"], None, ValueError),
    "batch": (["optim.clean_batch=512"], None, ValueError),
    "package": ([], fail_without_the_package, ImportError),
    "memory": ([], fail_in_the_first_step, torch.cuda.OutOfMemoryError),
    "disk": ([], fail_on_a_full_disk, OSError),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STARTS_THAT_FAIL)
def test_a_start_that_fails_leaves_nothing_behind(
    tiny_beton: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a new place nor in a folder with a checkpoint.

    The next attempt's config.yaml is its own.
    """
    overrides, breaks, error = STARTS_THAT_FAIL[case]
    run(tiny_beton, tmp_path / "old", "run.max_steps=2")
    before = tree(tmp_path)
    more = ["resume=auto", "run.log_every=2", "run.max_steps=3", *overrides]
    with monkeypatch.context() as patch:
        if breaks is not None:
            breaks(patch)
        for runs in (tmp_path / "new" / "place", tmp_path / "old"):
            with pytest.raises(error):
                run(tiny_beton, runs, *more)
    assert tree(tmp_path) == before
    folder, _ = run(tiny_beton, tmp_path / "new" / "place", "optim.lr=0.7", "run.max_steps=1")
    assert load_config(folder / "config.yaml").optim.lr == 0.7
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize("place", ["/proc/runs", "a file"])
def test_a_folder_that_cannot_be_made_names_the_field(
    tiny_beton: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(OSError, match=r"run\.dir: the folder of the run cannot be made: N"):
        run(tiny_beton, tmp_path / place, "run.max_steps=1")


def test_config_yaml_says_how_the_run_runs_now(tiny_beton: Path, tmp_path: Path) -> None:
    folder, _ = run(tiny_beton, tmp_path, "run.max_steps=2")
    run(tiny_beton, tmp_path, "run.max_steps=3", "run.log_every=2", "resume=auto")
    now = load_config(folder / "config.yaml")
    before = load_config(folder / "config-until-step-2.yaml")
    assert (now.run.max_steps, now.run.log_every) == (3, 2)
    assert (before.run.max_steps, before.run.log_every) == (2, 1)
    assert not (folder / "versions-until-step-2.json").exists()  # nothing changed
    # As if the first save had not come about: the run starts over.
    shutil.rmtree(folder / "checkpoints")
    run(tiny_beton, tmp_path, "run.max_steps=1", "optim.lr=0.7", "resume=auto")
    assert load_config(folder / "config.yaml").optim.lr == 0.7


def test_one_run_per_folder(tiny_beton: Path, tmp_path: Path) -> None:
    config = load_config(None, words(tiny_beton, tmp_path, "run.max_steps=1", "resume=auto"))
    first = Run(config)
    says = r"another process trains in .*seed0: wait for it, or use another name or seed"
    with pytest.raises(ValueError, match=says):
        Run(config)
    Run(config.model_copy(update={"seed": 1})).train()
    assert first.train()["steps"] == 1
    assert Run(config).train()["steps"] == 1


def test_a_lock_file_that_its_last_holder_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our opening and locking it, the other process ends and a third one starts."""
    at = tmp_path / ".lock"
    lock = run_folder.lock
    holders: list[IO[bytes]] = []

    def overtaken(file: IO[bytes]) -> bool:
        if not holders:
            at.unlink()
            holders.append(at.open("ab"))
            assert lock(holders[0])
        return lock(file)

    monkeypatch.setattr(run_folder, "lock", overtaken)
    folder = run_folder.RunFolder(tmp_path, print)
    with pytest.raises(ValueError, match="another process trains in"):
        folder.take(may_go_on=True)
    folder.release()
    holders[0].close()
    folder.take(may_go_on=True)
    folder.release()


def test_without_locks_a_run_goes_on_with_a_warning(
    tiny_beton: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_folder, "lock", lambda file: False)
    _, result = run(tiny_beton, tmp_path, "run.max_steps=1")
    assert result["steps"] == 1
    assert "has no locks: never start two runs in this folder" in capsys.readouterr().out
