"""Test names are the same in every process: pytest-xdist runs nothing when its workers disagree.

Names are made of parameters. A set's order, an object's address or the second in which a gzip
header was written differ between processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
COLLECT = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
COLLECT += ["-q", "--collect-only", "tests"]


def collecting(hash_seed: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST")}
    return subprocess.Popen(
        COLLECT,
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_names_of_tests_do_not_change_between_processes() -> None:
    first = collecting(hash_seed=1)
    time.sleep(1.5)  # so that clocks of whole seconds differ
    second = collecting(hash_seed=2)
    names = []
    for process in (first, second):
        output, _ = process.communicate()
        assert process.returncode == 0, output[-2000:]
        names.append([line for line in output.splitlines() if "::" in line])
    assert len(names[0]) > 1000
    assert names[0] == names[1]
