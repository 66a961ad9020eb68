"""Long runs: what a process holds does not grow. SOAK_EPOCHS=20 tries it on a small scale, without
a record.
"""

import gc
import json
import os
import statistics
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.common import ROOT, write_json
from fap.config import load_config
from fap.run.train import Run
from fap.versions import versions
from tests.run.runs import STEPS, command, environment, final_state, kill_and_resume, words

EPOCHS = int(os.environ.get("SOAK_EPOCHS", 200))
GROWTH_MB = 4  # between the second and the last quarter of the epochs


def record(section: str, figures: dict[str, Any]) -> None:
    """Replace one section of `bench/results/soak.json`."""
    path = ROOT / "bench" / "results" / "soak.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    before.pop("environment", None)
    write_json(path, before | {section: {"commit": versions()["commit"], **figures}})


class Watched(Run):
    """Notes after every epoch what the process holds: (resident MB, open files, threads)."""

    held: list[tuple[float, int, int]]

    def _close_epoch(self, *args: Any) -> None:
        super()._close_epoch(*args)
        gc.collect()
        memory = (
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        )
        self.held.append(
            (memory, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))
        )


@pytest.mark.soak
@pytest.mark.parametrize("pipeline", ["ffcv", "dali"])
def test_memory_files_and_threads_stay_flat(
    pipeline: str, tiny_beton: Path, tmp_path: Path
) -> None:
    if find_spec({"ffcv": "ffcv", "dali": "nvidia.dali"}[pipeline]) is None:
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
    quarters = [
        statistics.median(memory[len(memory) * q // 4 : len(memory) * (q + 1) // 4])
        for q in range(4)
    ]
    figures = {
        "epochs": EPOCHS,
        "steps": result["steps"],
        "memory_mb": {"first": memory[0], "median_of_quarters": quarters, "most": max(memory)},
        "open_files": sorted(set(files[1:])),
        "threads": sorted(set(threads[1:])),
    }
    print(json.dumps({pipeline: figures}))
    if EPOCHS == 200:
        record(pipeline, figures)
    assert quarters[3] - quarters[1] < GROWTH_MB, quarters
    assert len(set(files[1:])) == 1, files
    assert len(set(threads[1:])) == 1, threads


@pytest.mark.soak
def test_kill_9_fifty_times(tiny_beton: Path, tmp_path: Path) -> None:
    subprocess.run(
        command(*words(tiny_beton, tmp_path / "whole")),
        env=environment(),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    expected = final_state(tmp_path / "whole" / "fast_advprop" / "seed0")
    for attempt in range(10):
        kill_and_resume(tiny_beton, tmp_path / str(attempt), 5, expected, attempt)
    record(
        "kill_9", {"kills": 50, "steps_per_run": STEPS, "runs_with_bit_equal_weights": "10 of 10"}
    )
