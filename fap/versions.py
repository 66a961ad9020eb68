"""What a result depends on besides its settings: versions, device, commit."""

import contextlib
import functools
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch

GIT_SECONDS = 30


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of what a result depends on, the device, and the commit.

    The commit is `...-dirty` where code differs from it. Without git it is what FAP_COMMIT says,
    which the kit for a GPU machine without a network sets (`bench/gpu`), or None.
    """
    found = {str(d.name): d.version for d in distributions()}  # half a package has no name
    names = ["torch", "torchvision", "timm", "numpy", "numba", "opencv-python-headless", "ffcv"]
    return {
        "python": sys.version.split()[0],
        **{
            name: found.get(name)
            for name in [*names, *(n for n in found if n.startswith("nvidia-dali"))]
        },
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": processor(),
        "commit": commit(Path(__file__).parents[1]) or os.environ.get("FAP_COMMIT"),
    }


def processor(info: str | Path = "/proc/cpuinfo") -> str:
    """The processor's name, or its architecture where no name is told."""
    with contextlib.suppress(OSError):
        for name in re.findall(r"model name\s*:\s*(.+)", Path(info).read_text(errors="replace")):
            return str(name)
    return platform.machine()


def commit(tree: Path) -> str | None:
    """The commit of our source tree, with `-dirty` where code differs from it; None without git or
    outside a checkout.
    """
    # A container often runs as another user than the one who owns the checkout, and git then
    # refuses. The tree's own code is running here, so its git folder is trusted too; one above it,
    # which is not ours, is not.
    git = f"git --no-optional-locks -c safe.directory={shlex.quote(str(tree))}"
    ask = (
        f"{git} ls-files --error-unmatch fap/versions.py >&2 && {git} rev-parse HEAD && {git} status -s"
        " fap pipelines 'bench/*.py'"
    )
    try:
        told = subprocess.run(
            ask, shell=True, cwd=tree, capture_output=True, errors="replace", timeout=GIT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):  # no shell, a file system that hangs
        return None
    head, *changes = told.stdout.splitlines() or [""]
    if not head:
        return None
    if changes or told.returncode:
        return f"{head}-dirty"
    return head
