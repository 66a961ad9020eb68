"""What every benchmark shares: the environment record, median and spread, the JSON writer."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, Any]:
    """Cores this process may use, memory in GB, versions, device, processor and commit."""
    from fap.log import versions

    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"cores": len(os.sched_getaffinity(0)), "memory_gb": round(gigabytes, 1), **versions()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """n, median, smallest and largest of repeated measurements."""
    array = np.asarray(values, dtype=float)
    median, low, high = (float(f(array)) for f in (np.median, np.min, np.max))
    return {"n": len(array), "median": median, "min": low, "max": high}


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write `{"environment": ..., **results}`; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n")
