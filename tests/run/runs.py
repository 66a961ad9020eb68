"""A run that takes seconds: its settings, its command, what it leaves, and what may go wrong."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fap.checkpoint import Checkpoints
from fap.config import load_config
from fap.run.train import Run
from fap.step.step import Step

STEPS = 20  # five epochs of four steps
RUN = Path("fast_advprop") / "seed0"  # of the run, in the folder of runs


def words(data: Path, runs: Path, *more: str) -> list[str]:
    """Settings for `tiny_beton`, as on a command line; later words win."""
    return [
        f"data.train={data}",
        f"data.val={data}",
        "data.size=32",
        "data.resize=32",
        "data.crop=pad",
        "data.pipeline=reference",
        "data.threads=1",
        "model.name=cifar_resnet8",
        "model.num_classes=10",
        "optim.clean_batch=16",
        "method.group_rows=8",
        "budget.epochs=6",
        "budget.milestones=[3,5]",
        "run.device=cpu",
        "run.log_every=1",
        f"run.dir={runs}",
        *more,
    ]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fap.cli.train", *words]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with one thread for each of ours."""
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def run(data: Path, runs: Path, *more: str) -> tuple[Path, dict[str, Any]]:
    """A run in this process: its folder and its result."""
    training = Run(load_config(None, words(data, runs, *more)))
    return training.folder, training.train()


def started(*words: str) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own, to its end."""
    return subprocess.run(command(*words), env=environment(), capture_output=True, text=True)


def wait_for_a_record(folder: Path, *processes: subprocess.Popen[str]) -> None:
    """Until the run in `folder` has written its first record. None of the processes may end."""
    while not _size(folder / "metrics.jsonl"):
        for process in processes:
            assert process.poll() is None, "ended before its first record"
        time.sleep(0.05)


def records(folder: Path) -> list[dict[str, Any]]:
    """What the run has logged, which is JSON in the strict sense: NaN is none."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def steps_recorded(folder: Path) -> list[dict[str, Any]]:
    """The records of steps, without those of epochs."""
    return [record for record in records(folder) if "lr" in record]


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's tensors, but for the metrics' counters."""
    newest = Checkpoints(folder / "checkpoints").newest()
    assert newest is not None
    path, tensors, meta = newest
    assert meta["step"] == STEPS, path
    return without_metrics(tensors)


def without_metrics(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The counters start anew with every record, and a stop may move a record."""
    return {name: value for name, value in tensors.items() if name != "metrics"}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def kill_and_resume(
    data: Path,
    runs: Path,
    kills: int,
    expected: dict[str, torch.Tensor],
    seed: int,
    *more: str,  # settings
) -> None:
    """Kill a run soon after it has logged something, often; then it ends with the same weights."""
    rng = random.Random(seed)
    argv = command(*words(data, runs, "resume=auto", "run.checkpoint_every=1", *more))
    metrics = runs / RUN / "metrics.jsonl"
    for _ in range(kills):
        before = _size(metrics)
        process = subprocess.Popen(
            argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and _size(metrics) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.wait()
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert_same(final_state(runs / RUN), expected)


def _size(file: Path) -> int:
    """In bytes; 0 where there is no file."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


# ---------------------------------------------------------------------- what may go wrong


def no_room(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def fail_in_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(step: Step) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "__call__", out_of_memory)


def fail_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipelines.loaders.reference", None)


def fail_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fap.run.train.Log", no_room)
