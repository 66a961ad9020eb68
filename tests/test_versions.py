"""What a result says of where it comes from: versions, processor, commit."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fap.versions import commit, processor, versions


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The file by which our source tree is known."""
    (tmp_path / "fap").mkdir()
    (tmp_path / "fap" / "versions.py").touch()
    return tmp_path


def git(folder: Path, *words: str) -> str:
    author = ("-c", "user.name=x", "-c", "user.email=x")
    done = subprocess.run(
        ["git", *author, *words], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_versions() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["python"] == sys.version.split()[0]
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40
    assert {"ffcv", "numpy", "cuda", "device"} <= found.keys()
    json.dumps(found)


def test_without_git_the_kit_says_which_commit_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("FAP_COMMIT", raising=False)
    assert versions.__wrapped__()["commit"] is None
    monkeypatch.setenv("FAP_COMMIT", "abc-dirty")
    assert versions.__wrapped__()["commit"] == "abc-dirty"


def test_the_commit_of_a_checkout(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No checkout, or one of a folder above that does not know our file.
    assert commit(tree) is None
    git(tree, "init")
    assert commit(tree) is None
    git(tree, "add", ".")
    assert commit(tree) is None  # nothing is committed
    git(tree, "commit", "-m", "x")
    head = git(tree, "rev-parse", "HEAD")
    assert commit(tree) == head
    (tree / "fap" / "new.py").touch()
    assert commit(tree) == f"{head}-dirty"
    monkeypatch.setenv("PATH", str(tree))
    assert commit(tree) is None  # no git
    assert commit(tree / "gone") is None


def test_only_code_makes_a_checkout_dirty(tree: Path) -> None:
    git(tree, "init")
    git(tree, "add", ".")
    git(tree, "commit", "-m", "x")
    head = git(tree, "rev-parse", "HEAD")
    (tree / "notes.txt").touch()
    (tree / "bench").mkdir()
    (tree / "bench" / "results.json").touch()
    assert commit(tree) == head
    (tree / "bench" / "study.py").touch()
    assert commit(tree) == f"{head}-dirty"


def test_a_git_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file server that does not answer."""
    says_it_late = f"import time; time.sleep(60); print('{'0' * 40}')"
    (tmp_path / "git").write_text(f"#!{sys.executable}\n{says_it_late}\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("fap.versions.GIT_SECONDS", 0.2)
    assert commit(tmp_path) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_the_commit_of_a_checkout_of_somebody_else(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git calls it dubious ownership."""
    # This machine's settings may trust every folder.
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    git(tree, "init")
    git(tree, "add", ".")
    git(tree, "commit", "-m", "x")
    for folder, folders, files in os.walk(tree):
        for name in (".", *folders, *files):
            os.chown(os.path.join(folder, name), 54321, 54321)
    assert subprocess.run(["git", "status"], cwd=tree, capture_output=True).returncode != 0
    assert len(commit(tree) or "") == 40


def test_the_processor(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    assert processor(info) == platform.machine()
    info.write_text("processor\t: 0\nBogoMIPS\t: 243\n")  # as on Arm
    assert processor(info) == platform.machine()
    info.write_text("processor\t: 0\nmodel name\t: Fast One @ 3 GHz\nmodel name\t: Fast Two\n")
    assert processor(info) == "Fast One @ 3 GHz"
