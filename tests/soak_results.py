"""What `make soak` found, for `bench/results/soak.json`."""

import json
from typing import Any

from bench.common import ROOT, write_json
from fap.versions import versions


def record(section: str, figures: dict[str, Any]) -> None:
    """Replace one section of the file."""
    path = ROOT / "bench" / "results" / "soak.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    before.pop("environment", None)
    write_json(path, before | {section: {"commit": versions()["commit"], **figures}})
