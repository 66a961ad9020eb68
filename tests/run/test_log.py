"""The log: one record per line, exact after a resume, readable without a terminal, alive on a full
disk.
"""

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fap.run.log import Log, progress, trim
from tests.run.runs import records

VALUES = {"epoch": 1.5, "lr": 0.1, "image_passes_per_second": 1234.4}
VALUES |= {f"{what}_{kind}": 0.25 for what in ("loss", "acc") for kind in ("clean", "noise", "adv")}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_records_and_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((1000.0, 1007.0))  # when it begins, and at step 50
    monkeypatch.setattr("fap.run.log.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    out = io.StringIO()
    log = Log(tmp_path, 0, 100, out=out)
    log.step(50, VALUES)
    assert records(tmp_path) == [{"step": 50} | VALUES]  # on the disk at once
    log.record(50, {"val_top1": 0.5, "val_loss": float("nan"), "worst": float("-inf")})
    log.say("hello")
    log.close()
    assert records(tmp_path)[1] == {"step": 50, "val_top1": 0.5, "val_loss": None, "worst": None}
    line, hello = out.getvalue().splitlines()
    groups = "clean 0.250 25.0%  noise 0.250 25.0%  adv 0.250 25.0%"
    assert line.startswith(f"step 50/100  epoch 1.50  {groups}  1,234 image passes/s  ETA 00:07")
    assert hello == "hello"
    assert progress({"loss_clean": 1.0, "acc_clean": 0.5}) == "clean 1.000 50.0%"


def test_a_terminal_gets_one_bar(tmp_path: Path) -> None:
    out = Terminal()
    log = Log(tmp_path, 40, 100, out=out)
    log.advance(45)
    log.step(50, VALUES)
    log.say("a message")
    log.close()
    shown = out.getvalue()
    assert "50/100" in shown
    assert "adv 0.250 25.0%" in shown
    assert "a message\n" in shown
    assert (
        shown.count("\n") == 2
    )  # the message's and the end of the bar's: all else overwrites the bar


def test_standard_output_is_looked_up_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(tmp_path, 0, 100)
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    log.say("hello")
    log.step(50, VALUES)
    log.close()
    hello, line = out.getvalue().splitlines()
    assert hello == "hello"
    assert line.startswith("step 50/100")


def test_what_tensorboard_cannot_do_costs_tensorboard_only(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()  # where its folder should be
    out = io.StringIO()
    log = Log(tmp_path, 0, 100, out=out)
    log.record(1, {"a": 1.0})
    log.close()
    assert records(tmp_path) == [{"step": 1, "a": 1.0}]
    assert out.getvalue().count("warning: no TensorBoard: ") == 1


def test_closing_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk quota exceeded")

    out = io.StringIO()
    log = Log(tmp_path, 0, 100, out=out)
    monkeypatch.setattr(log.bar, "close", broken)
    log.close()
    assert log.file.closed
    assert "warning: the log was not closed properly: disk quota exceeded" in out.getvalue()


def test_quiet_ranks_leave_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path / "none", 0, 100, quiet=True)
    log.step(50, VALUES)
    log.record(50, VALUES)
    log.say("hello")
    log.advance(51)
    log.close()
    assert not (tmp_path / "none").exists()
    assert capsys.readouterr() == ("", "")


def test_resume_leaves_no_duplicates(tmp_path: Path) -> None:
    """Steps 60 and 80 were logged after the checkpoint of step 50 and are trained anew; the last
    line is torn.
    """
    log = Log(tmp_path, 0, 100, out=io.StringIO())
    for step in (20, 40, 60, 80):
        log.step(step, {"loss_clean": float(step), "acc_clean": 0.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 100, "lo')
    log = Log(tmp_path, 50, 100, out=io.StringIO())
    assert [r["step"] for r in records(tmp_path)] == [20, 40]
    for step in (60, 80, 100):
        log.step(step, {"loss_clean": 1.0, "acc_clean": 0.0})
    log.close()
    assert [(r["step"], r["loss_clean"]) for r in records(tmp_path)] == [
        (20, 20),
        (40, 40),
        (60, 1),
        (80, 1),
        (100, 1),
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("steps/loss_clean")] == [
        (20, 20),
        (40, 40),
        (60, 1),
        (80, 1),
        (100, 1),
    ]


@pytest.mark.parametrize(
    "tail", [b"", b"\n", b"[1]\n", b"3\n", b'{"a": 1}\n', b"\0\0\0\0", b"\xff\n", b'{"step": 2}']
)
def test_trim_stops_at_the_first_line_that_is_no_record(tmp_path: Path, tail: bytes) -> None:
    good = b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / "m").write_bytes(good + tail)
    trim(tmp_path / "m", 2)
    assert (tmp_path / "m").read_bytes() == good
    trim(tmp_path / "m", 0)
    assert (tmp_path / "m").read_bytes() == b""


@pytest.mark.slow
def test_a_full_disk_costs_records_not_the_run(tmp_path: Path) -> None:
    child = """
import resource, sys
from pathlib import Path
from fap.run.log import Log
log = Log(sys.argv[1], 0, 3000)
log.step(1, {"a": 1.0})
size = Path(log.file.name).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(2, 400):
    log.step(step, {"a": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.step(400, {"a": 1.0})
log.close()
print("alive")
"""
    run = [sys.executable, "-c", child, str(tmp_path)]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    steps = [r["step"] for r in records(tmp_path)]
    assert steps == [
        *range(1, len(steps)),
        400,
    ]  # whole lines only, and recording goes on once there is room
    assert 20 < len(steps) < 100
    assert "warning: no record of step 300" in out
    assert out.count("TensorBoard is off") == 1
    assert out.endswith("alive\n")
