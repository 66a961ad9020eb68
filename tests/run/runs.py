"""A run that takes seconds: its settings, its command, and what it leaves."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

from fap import checkpoint

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


def wait_for_a_record(folder: Path, *processes: subprocess.Popen) -> None:
    """Until the run in `folder` has written its first record. None of the processes may end."""
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        for process in processes:
            assert process.poll() is None, "ended before its first record"
        time.sleep(0.05)


def records(folder: Path) -> list[dict]:
    """What the run has logged, which is JSON in the strict sense: NaN is none."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's tensors, but for the metrics' counters."""
    newest = checkpoint.Checkpoints(folder / "checkpoints").newest()
    assert newest is not None
    path, tensors, meta = newest
    assert meta["step"] == STEPS, path
    return {name: value for name, value in tensors.items() if name != "metrics"}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def kill_and_resume(
    data: Path, runs: Path, kills: int, expected: dict[str, torch.Tensor], seed: int
) -> None:
    """Kill a run soon after it has logged something, often; then it ends with the same weights."""
    rng = random.Random(seed)
    argv = command(*words(data, runs, "resume=auto", "run.checkpoint_every=1"))
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
    return file.stat().st_size if file.exists() else 0
