"""What every benchmark shares: the environment record, median and spread, the JSON writer."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = re.compile("torch|torchvision|timm|numpy|numba|ffcv|opencv-python-headless|nvidia-dali-cuda.*")


def commit() -> str:
    """The commit measured; `-dirty` when code under fap, pipelines or bench differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changed = [*git, "status", "--porcelain", "--", "fap", "pipelines", "bench/*.py"]
    return head.stdout.strip() + ("-dirty" if subprocess.check_output(changed) else "")


def environment() -> dict[str, Any]:
    """Device, processor, cores this process may use, memory in GB, versions and commit."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", info)
    found = {d.name: d.version for d in distributions() if PACKAGES.fullmatch(d.name)}
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "versions": {"python": platform.python_version(), **dict(sorted(found.items()))},
        "commit": commit(),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """n, median, smallest and largest of repeated measurements."""
    array = np.asarray(values, dtype=float)
    median, low, high = (float(f(array)) for f in (np.median, np.min, np.max))
    return {"n": len(array), "median": median, "min": low, "max": high}


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write `{"environment": ..., **results}`; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n")
