"""Checkpoints survive crashes and full disks, and damage never goes unnoticed."""

import errno
import os
import random
import stat
import subprocess
import sys
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fap import checkpoint
from fap.checkpoint import Checkpoints, DamagedCheckpoint, checkpoint_at, load, save
from pipelines import files

META = {
    "config": {"model": "tiny", "lr": 1e-4},
    "epoch": 3,
    "step": 77,
    "note": '"crc32":"deadbeef"',
}


def awkward() -> dict[str, Tensor]:
    """Everything a trainer may hand over.

    Views of one storage, layouts, dtypes, empty and 0-dim tensors.
    """
    flat = torch.randn(24)
    return {
        "flat.a": flat[:12].view(3, 4),
        "flat.b": flat[12:],
        "transposed": flat[:12].view(3, 4).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(4),
        "lr": torch.tensor(0.1),
        "count": torch.tensor(2**40),
        "rng": torch.get_rng_state(),
        "bf16": torch.randn(5).bfloat16(),
        "fp16": torch.randn(5).half(),
        "fp64": torch.randn(5, dtype=torch.float64),
        "nan": torch.tensor([float("nan"), float("inf")]),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "leaf": torch.randn(3, requires_grad=True),
    }


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    tensors = awkward()
    save(tmp_path / "a.safetensors", tensors, META)
    again, meta = load(tmp_path / "a.safetensors")
    assert meta == META
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].is_contiguous()
        assert torch.allclose(again[name], tensor, rtol=0, atol=0, equal_nan=True), name
    assert os.listdir(tmp_path) == ["a.safetensors"]
    # Any safetensors reader opens it, and what is loaded may be written to.
    assert safetensors.torch.load_file(tmp_path / "a.safetensors").keys() == tensors.keys()
    again["flat.a"].add_(1)


def test_every_truncation_and_extension_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, {"w": torch.randn(7), "b": torch.randn(3)}, META)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors: truncated"):
            load(path)
    for tail in (b"\0", whole):
        path.write_bytes(whole + tail)
        with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors: wrong checksum"):
            load(path)


def test_every_bit_flip_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, {"w": torch.randn(5), "v": torch.randn(5)}, {"step": 7})
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        bad = bytearray(whole)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors"):
            load(path)


def test_foreign_and_garbled_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.ones(3)}, path)
    with pytest.raises(DamagedCheckpoint, match="no checkpoint of this program"):
        load(path)
    safetensors.torch.save_file({"w": torch.ones(3)}, path, {"crc32": "0"})
    with pytest.raises(DamagedCheckpoint):
        load(path)
    torch.save({"w": torch.ones(3)}, path)
    with pytest.raises(DamagedCheckpoint):
        load(path)
    rng = random.Random(0)
    nested = b'"crc32":"00000000"' + b"[" * 100_000  # JSON that overflows a naive parser
    for content in (
        b"",
        b"\0" * 100,
        len(nested).to_bytes(8, "little") + nested,
        rng.randbytes(5_000),
    ):
        path.write_bytes(content)
        with pytest.raises(DamagedCheckpoint):
            load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


def test_a_false_header_with_a_right_checksum_is_damage(tmp_path: Path) -> None:
    """The checksum is no signature: what an attacker lets pass it must still not crash."""
    for text in (
        b"{%s}",
        b'{"__metadata__":{%s}}',
        b'{"w":1,%s}',
        b"[{%s}]",
        b'{"__metadata__":{"meta":"{",%s}}',
    ):
        header = text % b'"crc32":"00000000"'
        blob = len(header).to_bytes(8, "little") + header
        (tmp_path / "a").write_bytes(blob.replace(b"00000000", b"%08x" % zlib.crc32(blob), 1))
        with pytest.raises(DamagedCheckpoint):
            load(tmp_path / "a")


def test_keeps_the_last_k_and_cleans_up(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "run", keep=2)
    assert kept.newest() is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".step_00000009.safetensors.tmp").write_bytes(b"stale")
    (tmp_path / "run" / "step_of_mine.safetensors").write_bytes(b"not ours")
    for step in (1, 2, 10, 9_999_999_999):
        assert kept.save(step, {"w": torch.full((3,), float(step))}, {"step": step}).exists()
    assert [p.name for p in kept.paths()] == [
        "step_00000010.safetensors",
        "step_9999999999.safetensors",
    ]
    assert sorted(os.listdir(tmp_path / "run"))[-1] == "step_of_mine.safetensors"
    assert len(os.listdir(tmp_path / "run")) == 3
    path, tensors, meta = kept.newest() or pytest.fail("no checkpoint")
    assert path == kept.paths()[-1]
    assert meta == {"step": 9_999_999_999}
    assert tensors["w"].tolist() == [1e10] * 3
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_damaged_newest_falls_back_saying_so(tmp_path: Path) -> None:
    said: list[str] = []
    kept = Checkpoints(tmp_path, keep=3, say=said.append)
    for step in (1, 2, 3):
        kept.save(step, {"w": torch.randn(50)}, {"step": step})
    first, second, third = kept.paths()
    os.truncate(third, third.stat().st_size - 10)
    second.write_bytes(second.read_bytes().replace(b'step\\": 2', b'step\\": 5'))
    path, _, meta = kept.newest() or pytest.fail("no checkpoint")
    assert (path, meta) == (first, {"step": 1})
    assert len(said) == 2
    assert f"{third}: truncated" in said[0]
    assert f"{second}: wrong checksum" in said[1]
    # The run goes on from step 1. Saving must neither count the damaged files as kept nor leave
    # them behind.
    Checkpoints(tmp_path, keep=1).save(2, {"w": torch.zeros(1)}, {"step": 2})
    assert kept.paths() == [second]
    assert load(second)[1] == {"step": 2}
    second.write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match="all 1 are damaged"):
        kept.newest()


def in_new_process(script: str, folder: Path) -> str:
    run = [sys.executable, "-c", script, folder]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes a write fail part-way, as ENOSPC does, without filling a disk."""
    child = """
import os, resource, sys, torch
from fap.checkpoint import Checkpoints
kept = Checkpoints(sys.argv[1], keep=1)
kept.save(1, {"w": torch.ones(1000)}, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for step in (1, 2):  # over the old file as well as beside it
    try:
        kept.save(step, {"w": torch.zeros(1_000_000)}, {"step": step})
    except OSError as error:
        print("told:", error)
    assert os.listdir(sys.argv[1]) == ["step_00000001.safetensors"]
    _, tensors, meta = kept.newest()
    assert meta == {"step": 1} and tensors["w"].sum() == 1000
kept.save(3, {"w": torch.zeros(10)}, {"step": 3})
"""
    assert in_new_process(child, tmp_path).count("told: [Errno 27]") == 2
    assert os.listdir(tmp_path) == ["step_00000003.safetensors"]


@pytest.mark.slow
def test_kill_9_while_saving(tmp_path: Path) -> None:
    """At random moments of a loop of nothing but saves, the newest file is whole.

    And the loop carries on.
    """
    child = """
import os, random, signal, sys, time, torch
from fap.checkpoint import Checkpoints
torch.set_num_threads(1)
rng, last, cut_off = random.Random(0), 0, 0
def names():
    return {name for name in os.listdir(sys.argv[1]) if name.endswith(".safetensors")}
for kill in range(200):
    before = names()
    pid = os.fork()
    if pid == 0:
        step = last
        while True:
            step += 1
            tensors = {f"w{i}": torch.full((50_000,), float(step)) for i in range(20)}
            Checkpoints(sys.argv[1]).save(step, tensors, {"step": step})
    # Every other time after a whole save, however slow the disk is.
    while kill % 2 and not names() - before:
        time.sleep(0.005)
    time.sleep(rng.uniform(0.01, 0.3))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kept = Checkpoints(sys.argv[1], say=sys.exit)  # sys.exit: a damaged file under the final name
    cut_off += any(name.endswith(".tmp") for name in os.listdir(sys.argv[1]))
    found = kept.newest()
    if found:
        _, tensors, meta = found
        assert meta["step"] >= last and all((t == meta["step"]).all() for t in tensors.values())
        assert len(kept.paths()) <= 3  # the two kept, and one whose removal was cut off
        last = meta["step"]
    # 20 times; on, in the rare case that none of them met a save half-way.
    if kill >= 19 and last > 0 and cut_off > 0:
        break
assert last > 0 and cut_off > 0, (last, cut_off)
Checkpoints(sys.argv[1]).save(last + 1, {}, {})
"""
    in_new_process(child, tmp_path)
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize(
    "kind", ["folder", "fifo", "link to /dev/zero", "dangling link", "circular link"]
)
def test_what_only_has_the_name_of_a_checkpoint_is_skipped(kind: str, tmp_path: Path) -> None:
    said: list[str] = []
    kept = Checkpoints(tmp_path, keep=1, say=said.append)
    odd = tmp_path / "step_00000009.safetensors"
    match kind:
        case "folder":
            odd.mkdir()
        case "fifo":
            os.mkfifo(odd)
        case "link to /dev/zero":
            odd.symlink_to("/dev/zero")
        case "dangling link":
            odd.symlink_to(tmp_path / "scratch" / "gone")
        case _:
            odd.symlink_to(odd)
    # It may be the run's: not started over unasked.
    with pytest.raises(DamagedCheckpoint, match="all 1 are damaged"):
        kept.newest()
    assert kept.paths() == []
    saved = kept.save(3, {"w": torch.ones(1)}, {"step": 3})
    said.clear()
    path, _, meta = kept.newest() or pytest.fail("no checkpoint")
    assert (path, meta) == (saved, {"step": 3})
    assert len(said) == 1
    assert str(odd) in said[0]
    assert kept.save(4, {"w": torch.ones(1)}, {"step": 4}).exists()
    if kind == "folder":
        with pytest.raises(OSError, match="a folder has the name of the checkpoint"):
            kept.save(9, {"w": torch.ones(1)}, {"step": 9})
        assert [p.name for p in kept.paths()] == ["step_00000004.safetensors"]
    else:  # the odd thing is replaced, not what it points to
        kept.save(9, {"w": torch.ones(1)}, {"step": 9})
        assert stat.S_ISREG(odd.lstat().st_mode)
        assert [p.name for p in kept.paths()] == [odd.name]


def test_an_unreadable_newest_is_no_reason_to_fall_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path, keep=2, say=pytest.fail)
    for step in (1, 2):
        kept.save(step, {"w": torch.ones(1)}, {"step": step})
    refusal = PermissionError(errno.EACCES, "Permission denied")

    def refused(path: Path, most: int) -> bytes:
        raise refusal

    monkeypatch.setattr(checkpoint, "read_regular", refused)
    with pytest.raises(PermissionError):
        kept.newest()


def test_a_checkpoint_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.safetensors", {"w": torch.ones(100)}, {})
    monkeypatch.setattr(checkpoint, "MOST_BYTES", 300)
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors: has more than 300 bytes"):
        load(tmp_path / "a.safetensors")
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "MOST_META", 1)
    with pytest.raises(DamagedCheckpoint, match="characters of metadata"):
        load(tmp_path / "a.safetensors")


def test_a_save_that_has_happened_is_never_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename is the save, whatever comes after.

    Neither a folder that cannot be flushed nor an old file that stays undoes it.
    """
    said: list[str] = []
    kept = Checkpoints(tmp_path, keep=1, say=said.append)
    fsync = os.fsync
    number = errno.EINVAL

    def no_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept.save(1, {"w": torch.ones(1)}, {"step": 1})  # a file system that flushes no folders
    number = errno.EIO  # a disk that fails
    with pytest.warns(UserWarning, match="step_00000002.safetensors is written, but"):
        kept.save(2, {"w": torch.ones(1)}, {"step": 2})
    number = errno.EINVAL
    assert [p.name for p in kept.paths()] == ["step_00000002.safetensors"]

    def stays(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", stays)
    assert kept.save(3, {"w": torch.ones(1)}, {"step": 3}).exists()
    assert len(said) == 1
    assert "step_00000002.safetensors is no longer needed, but cannot be removed" in said[0]


def test_no_file_is_overwritten_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="a"):
        files.write_whole(path, [b"new"], overwrite=False)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        files.write_whole(tmp_path / "link", [b"new"], overwrite=False)

    def no_links(old: Path, new: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(FileExistsError):
        files.write_whole(path, [b"new"], overwrite=False)
    files.write_whole(tmp_path / "b", [b"n", b"ew"], overwrite=False)
    assert path.read_bytes() == b"old"
    assert (tmp_path / "b").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "link"]
    with pytest.raises(FileNotFoundError) as caught:
        files.write_whole(tmp_path / "nowhere" / "a", [b"new"])
    assert caught.value.filename == str(tmp_path / "nowhere" / "a")  # and not the temporary one's


def test_a_huge_file_without_our_header_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros that take no room on the disk would take it in memory."""
    monkeypatch.setattr(checkpoint, "read_regular", None)  # nobody may call it
    for begin in (b"", b"\x40\0\0\0\0\0\0\0{}", b"\xff" * 8):
        with open(tmp_path / "c", "wb") as file:
            file.write(begin)
            file.truncate(60 << 30)
        says = r"no checksum in its header|truncated inside its header"
        with pytest.raises(DamagedCheckpoint, match=says):
            load(tmp_path / "c")


# ---------------------------------------------------------------------- the best one

SCORES = (0.1, 0.5, 0.3, 0.5, 0.7, 0.2, 0.1)  # after steps 1, 2, ...


def best_steps(scores: Sequence[float]) -> list[int]:
    """After every step the step of the best score so far, of equal ones the first."""
    return [1 + scores.index(max(scores[:n])) for n in range(1, len(scores) + 1)]


def save_on(folder: Path, keep: int, scores: Sequence[float] = SCORES) -> None:
    """A run that saves after every step, from where the newest checkpoint is."""
    kept = Checkpoints(folder, keep, say=lambda _: None)
    newest = kept.newest()
    done = 0 if newest is None else newest[2]["step"]
    for step in range(done + 1, len(scores) + 1):
        tensors = {"w": torch.full((9,), float(step))}
        kept.save(step, tensors, {"step": step}, best_steps(scores)[step - 1])
    kept.keep_best(best_steps(scores)[-1])


@pytest.mark.parametrize("keep", [1, 3])
def test_the_best_one_is_kept_beside_the_newest(tmp_path: Path, keep: int) -> None:
    kept = Checkpoints(tmp_path, keep)
    for step, best in enumerate(best_steps(SCORES), 1):
        kept.save(step, {"w": torch.full((9,), float(step))}, {"step": step}, best)
        tensors, meta = load(tmp_path / "best.safetensors")
        assert meta == {"step": best}
        assert tensors["w"].tolist() == [best] * 9
        first = tmp_path / f"step_{best:08d}.safetensors"
        assert first.exists() == (best > step - keep)
        if first.exists():
            assert first.samefile(tmp_path / "best.safetensors"), "a link takes no room"
        assert len(kept.paths()) == min(step, keep)
    assert len(os.listdir(tmp_path)) == keep + 1
    kept.save(8, {"w": torch.ones(1)}, {"step": 8})  # without a best one
    assert not (tmp_path / "best.safetensors").exists()


class Killed(BaseException):
    """Stands for kill -9: nothing of the killed process catches it or runs after it."""


def killed_at(
    call: int, folder: Path, keep: int, scores: Sequence[float], patch: pytest.MonkeyPatch
) -> bool:
    """Save until the `call`-th call of the system that changes the folder; True if there is one."""
    left = call

    def counting(function: Any) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:  # what `finally` still tries does nothing
                raise Killed
            return function(*args, **options)

        return called

    for name in ("link", "replace", "fsync"):
        patch.setattr(os, name, counting(getattr(os, name)))
    patch.setattr(Path, "unlink", counting(Path.unlink))
    try:
        save_on(folder, keep, scores)
    except Killed:
        return True
    finally:
        patch.undo()
    return False


@pytest.mark.parametrize(("keep", "scores"), [(1, SCORES), (2, SCORES), (1, (0.1, 0.3, 0.2, 0.4))])
def test_a_run_that_is_killed_anywhere_has_the_right_best_one_in_the_end(
    tmp_path: Path, keep: int, scores: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_calls = 0
    for call in range(1, 1000):
        folder = tmp_path / str(call)
        folder.mkdir()
        if not killed_at(call, folder, keep, scores, monkeypatch):
            break
        n_calls += 1
        for file in folder.glob("*.safetensors"):
            load(file)  # whole, the best one too
        save_on(folder, keep, scores)
        assert load(folder / "best.safetensors")[1] == {"step": best_steps(scores)[-1]}
        newest = f"step_{len(scores):08d}.safetensors"
        assert sorted(os.listdir(folder))[-1] == newest
        # What the last save could not remove any more, the next one would.
        assert len(os.listdir(folder)) <= keep + 3
    assert n_calls > 3 * len(scores)


def test_where_there_are_no_links_the_best_one_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(old: Path, new: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(checkpoint, "COPY_BYTES", 100)
    save_on(tmp_path, keep=3)
    best = tmp_path / "best.safetensors"
    first = tmp_path / "step_00000005.safetensors"
    assert best.read_bytes() == first.read_bytes()
    assert not best.samefile(first)
    assert len(os.listdir(tmp_path)) == 4


def test_a_best_one_that_cannot_be_written_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and tried again."""
    said: list[str] = []
    kept = Checkpoints(tmp_path, 2, say=said.append)

    def full(old: Path, new: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        kept.save(1, {"w": torch.ones(1)}, {"step": 1}, 1)
    assert [p.name for p in kept.paths()] == ["step_00000001.safetensors"]
    assert len(said) == 1
    assert "best.safetensors could not be written: [Errno 28]" in said[0]
    kept.save(2, {"w": torch.ones(1)}, {"step": 2}, 1)
    assert load(tmp_path / "best.safetensors")[1] == {"step": 1}


@pytest.mark.parametrize("what", ["later", "damaged", "pipe", "nothing"])
def test_a_best_one_of_steps_that_were_lost_goes(tmp_path: Path, what: str) -> None:
    """The newest checkpoint was damaged, and the best one was its second name."""
    said: list[str] = []
    best = tmp_path / "best.safetensors"
    match what:
        case "later":
            save(best, {"w": torch.ones(1)}, {"step": 9})
        case "damaged":
            best.write_bytes(b"x" * 1000)
        case "pipe":
            os.mkfifo(best)
    kept = Checkpoints(tmp_path, 2, say=said.append)
    kept.save(7, {"w": torch.ones(1)}, {"step": 7}, best=3)
    assert not best.exists()
    assert len(said) == 1
    assert "the checkpoint of the best epoch, step 3, is not there any more" in said[0]
    kept.save(8, {"w": torch.ones(1)}, {"step": 8}, best=3)
    assert len(said) == 1
    kept.save(9, {"w": torch.ones(1)}, {"step": 9}, best=9)
    assert load(best)[1] == {"step": 9}


# ---------------------------------------------------------------------- a run by its folder


def test_a_run_is_accepted_wherever_a_checkpoint_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its folder or by the checkpoints' own; a file is that file, whatever it is."""
    run = tmp_path / "mine" / "seed0"
    kept = Checkpoints(run / "checkpoints", keep=2)
    for step in (9, 10):
        kept.save(step, {"w": torch.ones(1)}, {"step": step})
    newest = run / "checkpoints" / "step_00000010.safetensors"
    (run / "checkpoints" / "step_00000099.safetensors").symlink_to("nowhere")
    best = newest.with_name("best.safetensors")
    best.write_bytes(b"")
    for folder in (run, run / "checkpoints", str(run)):
        assert checkpoint_at(folder) == newest
        assert checkpoint_at(folder, best=True) == best
    monkeypatch.chdir(run / "checkpoints")
    assert checkpoint_at(".").resolve() == newest
    assert checkpoint_at(newest) == newest
    assert checkpoint_at("nowhere") == Path("nowhere")


def test_a_folder_without_the_wanted_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / "mine" / f"seed{seed}" / "checkpoints").mkdir(parents=True)
    run = tmp_path / "mine" / "seed0"
    file = tmp_path / "c.safetensors"
    file.write_bytes(b"")
    for path, best, says in (
        (tmp_path / "mine", False, "mine: holds the runs seed0, seed1: give one of them"),
        (tmp_path, False, "is no folder of a run (it has no folder 'checkpoints' in it)"),
        (run, False, "checkpoints: has no checkpoint yet"),
        (run, True, "checkpoints: has no best.safetensors: no epoch of the run has been evaluated"),
        (file, True, "c.safetensors: is no folder; the best checkpoint is that of a run's folder"),
    ):
        with pytest.raises(ValueError) as error:
            checkpoint_at(path, best=best)
        assert says in str(error.value)
        assert "\n" not in str(error.value)
