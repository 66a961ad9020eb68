"""Signals to a run as schedulers and users send them, and a reader that leaves."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from fap.checkpoint import Checkpoints
from fap.config import load_config
from fap.run.session import Interrupted
from fap.run.train import Run
from tests.conftest import wait_until_it_listens
from tests.run.runs import (
    RUN,
    assert_same,
    command,
    environment,
    final_state,
    records,
    run,
    wait_for_a_record,
    words,
)

pytestmark = pytest.mark.slow


def start(
    data: Path,
    runs: Path,
    *more: str,
    limit: tuple[str, ...] = (),  # a command before ours, such as prlimit
    **options: Any,  # of Popen
) -> tuple[subprocess.Popen[str], Path]:
    """A long run that has written its first record, and its folder."""
    argv = [*limit, *command(*words(data, runs, "budget.epochs=600", *more))]
    process: subprocess.Popen[str] = subprocess.Popen(argv, env=environment(), text=True, **options)
    wait_for_a_record(runs / RUN, process)
    return process, runs / RUN


def assert_saved_to_the_last_record(folder: Path) -> None:
    last = records(folder)[-1]["step"]
    newest = Checkpoints(folder / "checkpoints").newest()
    assert newest is not None
    assert newest[2]["step"] >= last


@pytest.mark.parametrize(
    "numbers", [[signal.SIGINT], [signal.SIGHUP], [signal.SIGUSR1], [signal.SIGTERM] * 500]
)
def test_signals_save_and_leave(
    tiny_beton: Path, tmp_path: Path, numbers: list[signal.Signals]
) -> None:
    """A scheduler's SIGTERM comes more than once; here until the process has ended."""
    process, folder = start(tiny_beton, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for number in numbers:
        if process.poll() is None:
            process.send_signal(number)
            time.sleep(0.02)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + numbers[0], output
    assert "continue with resume=auto" in output
    assert f"fap-train: stopped by {numbers[0].name}\n" in output
    assert "Traceback" not in output
    assert_saved_to_the_last_record(folder)
    assert not (folder / ".lock").exists()


def test_a_signal_without_room_for_the_checkpoint_is_no_success(
    tiny_beton: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the full disk: no checkpoint fits in 100 kB."""
    process, _ = start(
        tiny_beton,
        tmp_path,
        "run.eval_every=600",
        limit=("prlimit", "--fsize=100000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    assert "stopped by SIGTERM, and step" in said
    assert "could not be saved; no step of it has been saved" in said
    assert "Traceback" not in said


def test_the_reader_of_the_output_may_leave(tiny_beton: Path, tmp_path: Path) -> None:
    process, folder = start(
        tiny_beton, tmp_path, "run.max_steps=40", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    assert json.loads((folder / "result.json").read_text())["steps"] == 40
    assert_saved_to_the_last_record(folder)


@pytest.mark.parametrize("after", [0.0, 0.5, 1.0])
def test_ctrl_c_before_training_is_one_line(tiny_beton: Path, tmp_path: Path, after: float) -> None:
    process = subprocess.Popen(
        command(*words(tiny_beton, tmp_path, "model.name=resnet152")),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until_it_listens(process)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert said == "fap-train: stopped by SIGINT\n"
    assert list(tmp_path.iterdir()) == []


def stopped_at_beat(number: int, *settings: str) -> None:
    """A run that a SIGTERM reaches just before its beat of that number, counted from 1.

    It beats once after each of the four steps of an epoch, and before each batch of an evaluation,
    of which there is one.
    """
    training = Run(load_config(None, settings))
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if beats == number:
            training.stop.number = signal.SIGTERM

    training.stop.beat = beat  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        training.train()
    assert beats == number


AVERAGE = ("optim.ema=0.9",)  # which is evaluated after the raw weights
SIZES = ("data.sizes=[[0,16],[3,24],[5,32]]", "method.schedule=pipelined")  # new in epochs 2 and 4


@pytest.mark.parametrize(
    ("more", "beats"),
    [(AVERAGE, (6, 2, 7, 8)), (AVERAGE, (5, 1, 6)), (SIZES, (10, 1, 11))],
    ids=["in the average", "in the raw weights", "before another size"],
)
def test_a_signal_in_an_evaluation_loses_nothing(
    tiny_beton: Path, tmp_path: Path, more: tuple[str, ...], beats: tuple[int, ...]
) -> None:
    """What is saved is what the next step begins with, whatever is being evaluated."""
    whole, _ = run(tiny_beton, tmp_path / "whole", *more)
    for number in beats:
        stopped_at_beat(number, *words(tiny_beton, tmp_path / "parts", *more, "resume=auto"))
    parts, _ = run(tiny_beton, tmp_path / "parts", *more, "resume=auto")
    assert_same(final_state(whole), final_state(parts))
