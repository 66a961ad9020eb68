"""Test names are the same in every process: pytest-xdist runs nothing when its workers disagree.

Names are made of parameters. A set's order, an object's address or the second in which a gzip
header was written differ between processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
COLLECT = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
COLLECT += ["-q", "--collect-only", "tests"]


@pytest.mark.slow
def test_names_of_tests_do_not_change_between_processes(request: pytest.FixtureRequest) -> None:
    here = [item.nodeid for item in request.session.items]  # all of them, or those asked for
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["PYTHONHASHSEED"] = "1"
    done = subprocess.run(COLLECT, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    there = [line for line in done.stdout.splitlines() if "::" in line]
    assert set(here) - set(there) == set()
    asked = set(here)
    for file in {name.partition("::")[0] for name in here}:
        of_file = f"{file}::"
        ours = [name for name in here if name.startswith(of_file)]
        assert ours == [name for name in there if name in asked and name.startswith(of_file)]
