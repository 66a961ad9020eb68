"""What a result depends on besides its settings: versions, device, commit."""

import contextlib
import functools
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch

PACKAGES = (
    *("torch", "torchvision", "timm", "numpy", "numba"),
    *("opencv-python-headless", "simplejpeg", "ffcv"),
)
DALI = "nvidia-dali"  # its name goes on with the version of CUDA
GIT_SECONDS = 30  # for each question


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of what a result depends on, the device, and the commit.

    The commit is `...-dirty` where code differs from it. Without git it is what FAP_COMMIT says,
    which the kit for a GPU machine without a network sets (`bench/gpu`), or None.
    """
    installed = {str(d.name): d.version for d in distributions()}  # half a package has no name
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        found[name] = installed.get(name)
    for name, version in installed.items():
        if name.startswith(DALI):
            found[name] = version
    found["cuda"] = torch.version.cuda
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["cpu"] = processor()
    found["commit"] = commit(Path(__file__).parents[1]) or os.environ.get("FAP_COMMIT")
    return found


def processor(info: str | Path = "/proc/cpuinfo") -> str:
    """The processor's name, or its architecture where no name is told."""
    with contextlib.suppress(OSError):
        named = re.search(r"model name\s*:\s*(.+)", Path(info).read_text(errors="replace"))
        if named:
            return named[1]
    return platform.machine()


def commit(tree: Path) -> str | None:
    """The commit of our source tree, with `-dirty` where code differs from it.

    None without git, outside a checkout, and where git does not answer.
    """
    try:
        # A folder above may be a checkout, which does not know our files.
        if _git(tree, "ls-files", "--error-unmatch", "fap/versions.py").returncode:
            return None
        head = _git(tree, "rev-parse", "HEAD")
        if head.returncode:  # nothing is committed yet
            return None
        changes = _git(tree, "status", "-s", "fap", "pipelines", "bench/*.py")
    except (OSError, subprocess.SubprocessError):  # no git, a file system that hangs
        return None
    if changes.stdout or changes.returncode:
        return f"{head.stdout.strip()}-dirty"
    return head.stdout.strip()


def _git(tree: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    # A container often runs as another user than the one who owns the checkout, and git then
    # refuses. The tree's own code is running here, so its git folder is trusted too; one above it,
    # which is not ours, is not.
    git = ["git", "--no-optional-locks", "-c", f"safe.directory={tree}"]
    return subprocess.run(
        [*git, *words], cwd=tree, capture_output=True, errors="replace", timeout=GIT_SECONDS
    )
