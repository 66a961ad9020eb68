"""Checkpoints of a run: what a full disk or damage costs, and which runs may be resumed."""

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import field as made_by
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fap import checkpoint
from fap.checkpoint import Checkpoints, DamagedCheckpoint, checkpoint_at
from fap.config import load_config
from fap.distributed import Ranks
from fap.run import result, train
from fap.run.saving import NotSaved
from fap.run.train import Run
from fap.run_meta import run_meta
from tests.conftest import write_beton
from tests.run.runs import (
    RUN,
    STEPS,
    assert_same,
    final_state,
    kill_and_resume,
    no_room,
    run,
    started,
    without_metrics,
    words,
)


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_beton: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole")
    done = started(*words(tiny_beton, folder))
    assert done.returncode == 0, done.stderr
    return final_state(folder / RUN)


@pytest.mark.slow
def test_kill_9_and_resume(
    tiny_beton: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    kill_and_resume(tiny_beton, tmp_path, 3, uninterrupted, random.randrange(1 << 30))


# ---------------------------------------------------------------------- damage and full disks


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_noticed(
    tiny_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run(tiny_beton, tmp_path)
    whole = final_state(folder)
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    capsys.readouterr()
    run(tiny_beton, tmp_path, "resume=auto")
    said = capsys.readouterr().out
    assert newest.name in said
    assert "at step 16" in said
    assert_same(final_state(folder), whole)


def one_after_the_other(*saves: Callable[..., None]) -> Callable[..., None]:
    """A `save` that is each of these once."""
    left = iter(saves)

    def save(*args: Any) -> None:
        next(left)(*args)

    return save


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_not_the_run(
    tiny_beton: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of five saves the second and third find no room."""
    works = checkpoint.save
    saves = one_after_the_other(works, no_room, no_room, works, works)
    monkeypatch.setattr(checkpoint, "save", saves)
    folder, result = run(tiny_beton, tmp_path)
    assert result["steps"] == STEPS
    said = capsys.readouterr().out
    assert (
        "could not save step 8 ([Errno 28] No space left on device); "
        "the last good checkpoint is that of step 4"
    ) in said
    kept = [path.name for path in Checkpoints(folder / "checkpoints").paths()]
    assert kept == ["step_00000016.safetensors", "step_00000020.safetensors"]


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_is_not_there_is_not_done(
    tiny_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops with an error, says where the last good one is, and can be finished later.

    Until then there is no result.
    """
    whole, _ = run(tiny_beton, tmp_path / "whole", "run.max_steps=8")
    monkeypatch.setattr(checkpoint, "save", one_after_the_other(checkpoint.save, no_room))
    folder = tmp_path / "full" / RUN
    says = r"training is done, but its last checkpoint could not be saved; .* that of step 4 in "
    with pytest.raises(NotSaved, match=says):
        run(tiny_beton, tmp_path / "full", "run.max_steps=8")
    assert not (folder / "result.json").exists()
    monkeypatch.undo()
    run(tiny_beton, tmp_path / "full", "run.max_steps=8", "resume=auto")
    last = Path("checkpoints") / "step_00000008.safetensors"
    a, b = (checkpoint.load(each / last)[0] for each in (whole, folder))
    assert_same(without_metrics(a), without_metrics(b))


def test_a_result_that_cannot_be_written_is_an_error(
    tiny_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result, "write_whole", no_room)
    says = r"result\.json could not be written .*No space left.*that of step 2 in "
    with pytest.raises(NotSaved, match=says):
        run(tiny_beton, tmp_path, "run.max_steps=2")
    assert not (tmp_path / RUN / "result.json").exists()


# ---------------------------------------------------------------------- the best one


def scored(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Let the evaluations after 4, 8, ... steps come to these top-1 accuracies, others to 0."""
    of_step = dict(zip(range(4, 24, 4), scores, strict=True))
    add = train.Progress.add
    latest = 0

    def counted(progress: train.Progress, metrics: dict[str, float]) -> None:
        nonlocal latest
        latest = progress.step
        add(progress, metrics)

    def evaluated(*_: Any) -> dict[str, float]:
        return {"top1": of_step.get(latest, 0.0), "top5": 1.0, "loss": 1.0}

    monkeypatch.setattr(train.Progress, "add", counted)
    monkeypatch.setattr(train.Validation, "__call__", evaluated)


@pytest.mark.parametrize("stop", [None, 6, 8, 17])
def test_the_best_epoch_is_kept_through_a_resume(
    tiny_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int | None
) -> None:
    """That of step 8 here, long after its checkpoint has gone under its first name."""
    scored(monkeypatch, 0.1, 0.5, 0.3, 0.5, 0.2)
    if stop is not None:
        run(tiny_beton, tmp_path, "run.keep=1", f"run.max_steps={stop}")
    folder, result = run(tiny_beton, tmp_path, "run.keep=1", "resume=auto")
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert sorted(names) == ["best.safetensors", "step_00000020.safetensors"]
    best = checkpoint_at(folder, best=True)
    meta = run_meta(best, checkpoint.load(best)[1])
    assert (meta.step, meta.best_step, meta.best) == (8, 8, {"top1": 0.5, "epoch": 2})
    assert checkpoint_at(folder).name == "step_00000020.safetensors"
    assert result["best"] == {"top1": 0.5, "epoch": 2}
    assert result["checkpoints"] == {
        "last": "checkpoints/step_00000020.safetensors",
        "best": "checkpoints/best.safetensors",
    }


def test_a_best_epoch_at_the_end_is_linked_by_the_next_process(
    tiny_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the one that saved it was killed before it could."""
    scored(monkeypatch, 0.1, 0.5, 0.3, 0.5, 0.2)
    folder, _ = run(tiny_beton, tmp_path, "run.max_steps=8")
    checkpoint_at(folder, best=True).unlink()
    _, result = run(tiny_beton, tmp_path, "run.max_steps=8", "resume=auto")
    best = checkpoint_at(folder, best=True)
    assert best.samefile(checkpoint_at(folder))
    assert result["checkpoints"]["best"] == "checkpoints/best.safetensors"


@pytest.mark.parametrize(("fourth", "best"), [(0.5, (0.5, 2)), (0.6, (0.6, 4))])
def test_a_best_epoch_that_found_no_room_leaves_the_former_one(
    tiny_beton: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fourth: float,
    best: tuple[float, int],
) -> None:
    """Number and checkpoint are those of one epoch: the best of those that were saved."""
    scored(monkeypatch, 0.1, 0.5, 0.7, fourth, 0.2)
    works = checkpoint.save
    saves = one_after_the_other(works, works, no_room, works)
    monkeypatch.setattr(checkpoint, "save", saves)
    folder, result = run(tiny_beton, tmp_path, "run.max_steps=16")
    top1, epoch = best
    assert result["best"] == {"top1": top1, "epoch": epoch}
    saved = checkpoint.load(checkpoint_at(folder, best=True))[1]
    assert (saved["step"], saved["best"]) == (4 * epoch, result["best"])


def test_a_best_epoch_that_nobody_wants_is_not_kept(
    tiny_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, 0.1, 0.5, 0.3, 0.5, 0.2)
    folder, _ = run(tiny_beton, tmp_path, "run.max_steps=8")
    assert checkpoint_at(folder, best=True).is_file()
    more = ("run.max_steps=12", "run.keep_best=false", "resume=auto")
    folder, result = run(tiny_beton, tmp_path, *more)
    with pytest.raises(ValueError, match=r"has no best\.safetensors.*run\.keep_best = false"):
        checkpoint_at(folder, best=True)
    assert list(result["checkpoints"]) == ["last"]


# ---------------------------------------------------------------------- several ranks


class Disk:
    """Stands for a run's StopSignal: is the run inside a save?"""

    busy = False

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        self.busy = True
        yield
        self.busy = False


@dataclass(frozen=True)
class OneOfTwo(Ranks):
    """A rank whose other one says what it says, and whether it may wait long for that."""

    world: int = 2
    disk: Disk = made_by(default_factory=Disk)
    may_wait_long: list[bool] = made_by(default_factory=list)

    def sum_(self, flat: Tensor) -> None:
        pass

    def gather_rows(self, rows: Tensor) -> Tensor:
        return rows.repeat(2, *[1] * (rows.ndim - 1))

    def any(self, flag: bool) -> bool:
        self.may_wait_long.append(self.disk.busy)
        return flag


@pytest.mark.parametrize("rank", [0, 1])
def test_only_ranks_that_wait_for_the_disk_wait_long(
    tiny_beton: Path, tmp_path: Path, rank: int
) -> None:
    """If another rank hangs, the first one, which has written, must not wait as for a slow disk."""
    training = Run(load_config(None, words(tiny_beton, tmp_path, "method.schedule=pipelined")))
    ranks = OneOfTwo(rank)
    saving = training.saving
    saving.ranks = ranks
    saving.stop = ranks.disk
    assert saving.save(training.progress)
    assert ranks.may_wait_long == [rank == 1]
    assert not ranks.disk.busy
    assert len(saving.checkpoints.paths()) == (rank == 0)


# ---------------------------------------------------------------------- what is resumed


def test_only_the_same_run_is_resumed(tiny_beton: Path, tmp_path: Path) -> None:
    run(tiny_beton, tmp_path, "run.max_steps=2")
    refused = {
        "optim.lr=0.3": r"other settings.*\n  optim\.lr: 0\.1, now 0\.3$",
        "method.eps_255=2": r"method\.eps_255: 1\.0, now 2\.0",
        # a loss scale of one is none of the other
        "run.amp=bf16": r"run\.amp: 'off', now 'bf16'",
        "run.max_steps=1": r"max_steps = 1, but .* is already at step 2",
    }
    for word, says in refused.items():
        with pytest.raises(ValueError, match=says):
            run(tiny_beton, tmp_path, "resume=auto", word)
    changes = ["run.max_steps=3", "data.threads=2", "run.keep=1", "data.mix_alpha=3"]
    run(tiny_beton, tmp_path, "resume=auto", *changes)


def test_data_are_the_same_by_content_not_by_path(tiny_beton: Path, tmp_path: Path) -> None:
    """Moved: goes on. Others under the same path: refused, for data.train and data.val alike."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(tiny_beton, data / "a.beton")
    run(data / "a.beton", tmp_path, "run.max_steps=2")
    moved = shutil.move(data / "a.beton", data / "b.beton")
    run(moved, tmp_path, "run.max_steps=3", "resume=auto")

    rng = np.random.default_rng(5)
    others = {
        "another content": list(rng.integers(0, 256, (96, 32, 32, 3), dtype=np.uint8)),
        "96 images, now 64": list(rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)),
    }
    for says, images in others.items():
        other = write_beton(data / "a.beton", images, [i % 10 for i in range(len(images))])
        for field in ("train", "val"):
            refusal = rf"other data than data\.{field} is now: .*{says}"
            with pytest.raises(ValueError, match=refusal):
                run(moved, tmp_path, "run.max_steps=4", "resume=auto", f"data.{field}={other}")


def rewritten(
    folder: Path, tensors: Callable[[dict[str, Tensor]], None], meta: Callable[[dict], None]
) -> None:
    """Change what the newest checkpoint of a run holds."""
    found = Checkpoints(folder / "checkpoints").newest()
    assert found is not None
    path, held, written = found
    tensors(held)
    meta(written)
    checkpoint.save(path, held, written)


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_goes_on(tiny_beton: Path, tmp_path: Path) -> None:
    """It has fields and tensors by their former names."""
    method = "method.schedule=pipelined"
    whole, _ = run(tiny_beton, tmp_path / "whole", method)
    folder, _ = run(tiny_beton, tmp_path / "old", method, "run.max_steps=7")

    def former_tensors(held: dict[str, Tensor]) -> None:
        held["carry.labels"] = held.pop("carry.targets")

    def former_names(written: dict[str, Any]) -> None:
        fields = written["config"]["method"]
        fields["group"] = fields.pop("group_rows")
        del written["config"]["task"]

    rewritten(folder, former_tensors, former_names)
    run(tiny_beton, tmp_path / "old", method, "resume=auto")
    assert_same(final_state(folder), final_state(whole))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("totals", {"loss": 1.0}, "totals has other names than this version's metrics"),
        ("best", {"map": 0.5, "epoch": 1.0}, "best must hold top1 and epoch"),
    ],
)
def test_a_checkpoint_with_other_metrics_is_refused(
    tiny_beton: Path, tmp_path: Path, field: str, value: dict[str, float], says: str
) -> None:
    folder, _ = run(tiny_beton, tmp_path, "run.max_steps=2")
    rewritten(folder, lambda held: None, lambda written: written.update({field: value}))
    with pytest.raises(DamagedCheckpoint, match=f"step_00000002.safetensors: metadata: {says}"):
        run(tiny_beton, tmp_path, "run.max_steps=4", "resume=auto")
