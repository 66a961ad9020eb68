"""Limits of control groups as a slow twin sees them."""

from __future__ import annotations

import contextlib, errno, fcntl, hashlib, io, json, multiprocessing, os, pwd, random, re, resource, shutil, signal, stat, struct, subprocess, sys, tarfile, tempfile, threading, time, zlib
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.util import find_spec
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from fap.cli.convert import main
from pipelines import DamagedData, images, jpeg, machine, open_loader, open_store, sources
from pipelines import convert as convert_module
from pipelines.convert import BadImages, Encoding, check, convert_folder, encode
from pipelines.images import decode, open_image, plain_jpeg, reason, upright_jpeg, upright_sides
from pipelines.jpeg import check_jpeg, jpeg_header, jpeg_sides
from pipelines.machine import (
    memory_limit_bytes,
    settle_in,
    temporary_caches,
    thread_limit,
    usable_cores,
    writable,
)
from pipelines.sources import beton_writer, cifar10, sidecar
from pipelines.sources.beton import ALLOCATION, FIELD, HEADER, BetonStore
from pipelines.sources.beton_writer import BetonWriter, write_sidecar
from pipelines.sources.folder import FolderStore
from pipelines.sources.listing import LINKS, SUFFIXES, list_images
from pipelines.sources.sidecar import read_sidecar, sidecar_path
from pipelines.store import JPG, RAW, Store, check_class_names
from tests.conftest import as_jpeg, write_beton
from tests.pipelines import image_files, samples, trees


NAMES = ("docker", "kubepods.slice", "user 1000", "a:b", "job_7", "cpu,memory")


UNLIMITED_V1 = 9223372036854771712


@dataclass
class Group:
    """A control group as the kernel has it: its own limits, and the groups above it, nearest first."""

    path: str  # from the hierarchy's top
    memory: int | None = None
    quota: Fraction | None = None
    above: list["Group"] = field(default_factory=list)

    def tightest(self, limit: str, top: str) -> Any:
        """The twin: the least of a limit over this group and those above it, up to the one at
        `top`.
        """
        seen = [
            g
            for g in (self, *self.above)
            if g.path == top or g.path.startswith(top.rstrip("/") + "/")
        ]
        return min((getattr(g, limit) for g in seen if getattr(g, limit) is not None), default=None)


def draw_group(rng: np.random.Generator) -> Group:
    """A group up to four levels deep, with limits here and there."""
    groups: list[Group] = []
    path = ""
    for depth in range(rng.integers(0, 5)):
        group = Group(path or "/", above=groups[::-1])
        if rng.random() < 0.5:
            group.memory = int(rng.integers(1, 1 << 40))
        if rng.random() < 0.5:
            group.quota = Fraction(
                int(rng.integers(1000, 1_600_000)), int(rng.choice([50_000, 100_000]))
            )
        groups.append(group)
        path += f"/{NAMES[rng.integers(len(NAMES))]}{depth}"
    return Group(path or "/", above=groups[::-1])


def write_tree(root: Path, rng: np.random.Generator) -> tuple[Any, Any]:
    """/proc and /sys of a process, as version 1, 2 or both show it. Returns the limits that the
    twin sees.
    """
    own, mounts = [], []
    memory, quota = [], []
    kinds = [["memory"], ["cpu", "cpuacct"]] if rng.random() < 0.5 else []  # version 1
    if not kinds or rng.random() < 0.5:
        kinds.append([])  # version 2
    for number, controllers in enumerate(kinds):
        group = draw_group(rng)
        place = Path(
            "/sys/fs",
            ",".join(controllers) or "unified",
            "with space" if rng.random() < 0.2 else "",
        )
        # A container may see only the part below its own group, or below one above it.
        top = (
            [group, *group.above][rng.integers(len(group.above) + 1)].path
            if rng.random() < 0.5
            else "/"
        )
        lies_elsewhere = rng.random() < 0.1
        shown = top
        own.append(f"{number}:{','.join(controllers)}:{'/..' * lies_elsewhere}{group.path}")
        system, options = (
            ("cgroup", f"rw,{','.join(controllers)}")
            if controllers
            else ("cgroup2", "rw,nsdelegate")
        )
        escaped = str(place).replace(" ", r"\040")
        mounts.append(
            f"3{number} 2 0:3 {shown.replace(' ', chr(92) + '040')} {escaped} rw,x - {system} c"
            f" {options}"
        )
        for g in (group, *group.above):
            if g.path == top or g.path.startswith(top.rstrip("/") + "/"):
                folder = root / str(place).lstrip("/") / os.path.relpath(g.path, top)
                write_group(folder, g, controllers, rng)
        seen = next(g for g in (group, *group.above) if g.path == top) if lies_elsewhere else group
        memory += [seen.tightest("memory", top)] if "cpu" not in controllers else []
        quota += [seen.tightest("quota", top)] if "memory" not in controllers else []
    mounts.insert(0, "21 1 0:20 / /proc rw - proc proc rw")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("\n".join(own) + "\n")
    (root / "proc/self/mountinfo").write_text("\n".join(mounts) + "\nhalf a line -\n")
    return min(filter(None, memory), default=None), min(filter(None, quota), default=None)


def write_group(
    folder: Path, group: Group, controllers: list[str], rng: np.random.Generator
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    period = group.quota.denominator * 1000 if group.quota else 100_000
    amount = int(group.quota * period) if group.quota else None
    if not controllers:
        texts = {"memory.max": group.memory or "max", "cpu.max": f"{amount or 'max'} {period}"}
    elif "memory" in controllers:
        texts = {"memory.limit_in_bytes": group.memory or UNLIMITED_V1}
    else:
        texts = {"cpu.cfs_quota_us": amount or -1, "cpu.cfs_period_us": period}
    limited = group.memory or group.quota
    for name, text in texts.items():
        if limited or rng.random() < 0.7:  # the top group has no such files
            (folder / name).write_text(f"{text}\n")


@pytest.mark.parametrize("seed", range(60))
def test_the_tightest_limit_of_any_tree_of_control_groups(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    memory, quota = write_tree(tmp_path, rng)
    affinity = int(rng.integers(1, 20))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    assert memory_limit_bytes(tmp_path) == memory
    assert usable_cores(tmp_path) == (affinity if quota is None else min(affinity, ceil(quota)))


def test_the_generator_draws_what_it_should(tmp_path: Path) -> None:
    """Else the test above could compare nothing with nothing."""
    found = [write_tree(tmp_path / str(seed), np.random.default_rng(seed)) for seed in range(60)]
    assert 15 < sum(memory is not None for memory, _ in found) < 55
    assert 15 < sum(quota is not None and quota < 8 for _, quota in found) < 55


@pytest.mark.parametrize(
    "content", ["", "\0\xff", "max", "nonsense here", "0 0", "-1 -1", "5000 0"]
)
def test_odd_limits_are_none(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "proc/self/mountinfo").write_text("3 2 0:3 / /c rw - cgroup2 c rw\n")
    (tmp_path / "c").mkdir()
    for name in ("cpu.max", "memory.max"):
        (tmp_path / "c" / name).write_text(content, encoding="latin-1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert usable_cores(tmp_path) == 3
    assert memory_limit_bytes(tmp_path) is None


@pytest.mark.parametrize("quota", ["1000 100000", "0 100000"])
def test_less_than_a_core_is_one(quota: str, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "proc/self/mountinfo").write_text("3 2 0:3 / /c rw - cgroup2 c rw\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/cpu.max").write_text(f"{quota}\n")
    assert usable_cores(tmp_path) == 1


@pytest.mark.parametrize("own", ["0::/job", "7:pids:/job"])
def test_threads(own: str, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "c/job").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{own}\n")
    kind = "cgroup c rw,pids" if "pids" in own else "cgroup2 c rw"
    (tmp_path / "proc/self/mountinfo").write_text(f"3 2 0:3 / /c rw - {kind}\n")
    (tmp_path / "c/job/pids.max").write_text("max\n")
    assert thread_limit(tmp_path) is None
    (tmp_path / "c/pids.max").write_text("77\n")
    assert thread_limit(tmp_path) == 77


def test_without_proc(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    assert memory_limit_bytes(tmp_path) is None


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
    assert memory_limit_bytes() is None or memory_limit_bytes() > 1 << 20


def test_threads_follow_the_quota(
    jpeg_store: Any, jpeg_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import convert, open_loader
    from pipelines import corrupt_batches as corrupt
    from pipelines.loaders import base as batch
    from pipelines.sources import folder

    for module in (batch, convert, corrupt):
        monkeypatch.setattr(module, "usable_cores", lambda: 3)
    assert open_loader("reference", jpeg_store, size=32).threads == 3
    with corrupt.Workers() as pool:
        assert pool.n == 3
    asked = []
    run_ahead = folder.run_ahead
    monkeypatch.setattr(
        folder,
        "run_ahead",
        lambda calls, threads, ahead: asked.append(threads) or run_ahead(calls, 1, 1),
    )
    convert_folder(jpeg_folder, tmp_path / "x.beton")
    assert asked == [3]
