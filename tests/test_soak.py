"""Long runs: what a process holds does not grow.

SOAK_EPOCHS=20 tries it on a small scale, without a record.
"""

import gc
import json
import os
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fap.config import load_config
from fap.run.train import Run
from tests.run.runs import STEPS, kill_and_resume, words
from tests.soak_results import record

ALL_EPOCHS = 200
EPOCHS = int(os.environ.get("SOAK_EPOCHS", ALL_EPOCHS))
GROWTH_MB = 4  # between the second and the last quarter of the epochs
PACKAGES = {"ffcv": "ffcv", "dali": "nvidia.dali"}


class Held(NamedTuple):
    """What a process holds."""

    memory_mb: float  # resident
    open_files: int
    threads: int


def held_now() -> Held:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


class Watched(Run):
    """Notes after every epoch what the process holds."""

    held: list[Held]

    def _close_epoch(self, *args: Any) -> None:
        super()._close_epoch(*args)
        self.held.append(held_now())


@pytest.mark.soak
@pytest.mark.parametrize("pipeline", ["ffcv", "dali"])
def test_memory_files_and_threads_stay_flat(
    pipeline: str, tiny_beton: Path, tmp_path: Path
) -> None:
    if find_spec(PACKAGES[pipeline]) is None:
        pytest.skip(f"needs {pipeline}")
    budget = EPOCHS * 6 // 5  # of vanilla training
    more = [
        f"data.pipeline={pipeline}",
        f"budget.epochs={budget}",
        f"budget.milestones=[{budget // 2}]",
        "run.torch_threads=1",
    ]
    run = Watched(load_config(None, words(tiny_beton, tmp_path, *more)))
    run.held = []
    result = run.train()
    assert len(run.held) == result["epochs"] == EPOCHS

    memory, files, threads = zip(*run.held, strict=True)
    borders = [len(memory) * quarter // 4 for quarter in range(5)]
    quarters = [statistics.median(memory[borders[q] : borders[q + 1]]) for q in range(4)]
    figures = {
        "epochs": EPOCHS,
        "steps": result["steps"],
        "memory_mb": {"first": memory[0], "median_of_quarters": quarters, "most": max(memory)},
        "open_files": sorted(set(files[1:])),
        "threads": sorted(set(threads[1:])),
    }
    print(json.dumps({pipeline: figures}))
    if EPOCHS == ALL_EPOCHS:
        record(pipeline, figures)
    assert quarters[3] - quarters[1] < GROWTH_MB, quarters
    # The first epoch opens what stays open.
    assert len(set(files[1:])) == 1, files
    assert len(set(threads[1:])) == 1, threads


@pytest.mark.soak
def test_kill_9_fifty_times(
    tiny_beton: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    for attempt in range(10):
        kill_and_resume(tiny_beton, tmp_path / str(attempt), 5, uninterrupted, attempt)
    figures = {"kills": 50, "steps_per_run": STEPS, "runs_with_bit_equal_weights": "10 of 10"}
    record("kill_9", figures)
