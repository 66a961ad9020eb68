"""Mistakes, and a world that fails: one line, the right exit code, and no number lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from fap.cli import eval as cli
from fap.evaluate import evaluation
from fap.run import torch_setup
from tests.conftest import wait_until_it_listens
from tests.evaluate.world import CHECKPOINT, WNIDS, command, fresh, refused, run, write_checkpoint


@pytest.mark.parametrize(("arguments", "message"), [
    (["--data", "@/nowhere"], "nowhere"),
    (["--batch", "0"], "--batch 0"),
    (["--seed", "-1"], "--seed -1"),
    (["--device", "nothing"], "--device nothing"),
    (["--device", "meta"], "--device meta"),
    (["--imagenet-r", "@/c/fog"], "2 classes are none of the model's 6 classes"),
    (["--stylized", "@/nowhere"], "nowhere"),
    (["--out", f"@/{CHECKPOINT}"], "File exists"),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_1(
    world: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    words = [word.replace("@", str(world)) for word in arguments]
    line = refused(capsys, world, *words, out="mistakes")
    assert message in line
    assert not (world / "mistakes").exists()


def test_odd_checkpoints_are_one_line(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "text.safetensors").write_text("hello")
    fixed = ["--data", str(world / "val"), "--device", "cpu", "--out", str(tmp_path / "o")]
    for file in tmp_path.iterdir():
        assert cli.main([str(file), *fixed]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fap-eval: ")
        assert str(file) in line


def test_a_run_is_evaluated_by_its_folder(world: Path, tmp_path: Path) -> None:
    """The newest checkpoint, or the best one, which has other weights here."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("best", "step_00000003"):
        write_checkpoint(folder / f"{name}.safetensors", WNIDS, seed=7)
    shutil.copy(world / CHECKPOINT, folder)
    fixed = ["--data", str(world / "val"), "--device", "cpu", "--batch", "4"]
    found: dict[str, str] = {}
    for words in ((), ("--best",)):
        out = tmp_path / f"out{len(words)}"
        assert cli.main([str(tmp_path), *fixed, "--out", str(out), *words]) == 0
        (report,) = json.loads((out / "report.json").read_text())
        found[Path(report["checkpoint"]).name] = report["results"]["clean"]["loss"]
    assert set(found) == {CHECKPOINT, "best.safetensors"}
    assert len(set(found.values())) == 2


def test_the_home_folder_is_known(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(world))
    monkeypatch.chdir(world)
    cli.main([f"~/{CHECKPOINT}", "--data", "~/val", "--device", "cpu", "--out", "~/home"])
    assert (world / "home" / "report.md").exists()
    assert not (world / "~").exists()


def test_unknown_names_are_refused_before_anything_is_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["x.safetensors", "--data", "x"]
    for arguments, named in ((["rain"], "'rain'"), (["fog", "--severity", "6"], "6")):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*words, "--corrupt", *arguments])
        assert f"invalid choice: {named}" in capsys.readouterr().err
    for arguments in (["--keep", "x"], ["--severity", "3"]):  # they would be accepted and ignored
        with pytest.raises(SystemExit, match="2"):
            cli.main([*words, *arguments])
        assert "--corrupt, which is not given" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=["Python", "CPU", "CUDA"],
)
def test_lack_of_memory_is_said(
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def lacks(*arguments: Any, **options: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(evaluation, "evaluate", lacks)
    assert "out of memory; a smaller --batch" in refused(capsys, world, out="memory")


def test_a_full_disk_costs_no_number(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results that cannot be kept are said.

    A report that cannot be written is printed all the same, with exit code 1.
    """
    at = fresh(world, tmp_path, "val")

    def full(descriptor: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AssertionError):
        run(at)
    told = capsys.readouterr()
    assert "| top-1 accuracy |" in told.out
    assert "the result of tiny-clean cannot be kept for a later call" in told.err
    last = told.err.splitlines()[-1]
    assert last.startswith("fap-eval: [Errno 28] No space left on device")
    assert "report.md" in last
    assert os.listdir(at / "out") == ["results"]
    assert os.listdir(at / "out" / "results") == []


@pytest.mark.slow
def test_lost_output_loses_no_report(world: Path, tmp_path: Path) -> None:
    at = fresh(world, tmp_path, "val")
    words = [sys.executable, "-m", "fap.cli.eval", str(at / CHECKPOINT)]
    words += ["--data", str(at / "val"), "--device", "cpu", "--out", str(at / "out")]
    with open("/dev/full", "w") as full:
        process = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    by_class = ["confusion.csv", "confusion.png", "per_class.csv"]
    reports = ["report.csv", "report.json", "report.md", "report.png", "report.tex"]
    assert sorted(os.listdir(at / "out")) == [*by_class, *reports, "results"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["import", "workers", "work"])
def test_a_signal_ends_it_at_once_without_a_traceback(
    world: Path, tmp_path: Path, number: signal.Signals, code: int, moment: str
) -> None:
    """To the whole group, as a terminal's Ctrl-C is sent.

    What is finished stays, and is not computed again.
    """
    at = fresh(world, tmp_path, "val")
    process = command(at, "--corrupt", "all", start_new_session=True)
    told: list[str] = []
    match moment:
        case "import":
            wait_until_it_listens(process)
        case "workers":
            told = told_until("clean: top-1", process)
        case "work":
            told = told_until("computed/shot_noise/1: top-1", process)
    os.killpg(process.pid, number)
    rest = process.communicate(timeout=300)[1]
    assert process.returncode == code, rest
    assert "Traceback" not in rest, rest
    assert f"stopped by {signal.Signals(number).name}" in rest
    finished = [line for line in told if "top-1" in line]
    if finished:
        assert len(list((at / "out" / "results").iterdir())) >= len(finished)
    assert not list(at.rglob("*.tmp"))


def told_until(sign: str, process: subprocess.Popen[str]) -> list[str]:
    """The lines of its standard error, up to one with `sign`."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if sign in line:
            break
    return lines


def test_threads_follow_a_quota(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch_setup, "usable_cores", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    run(world, out="quota")
    assert used == [1]
