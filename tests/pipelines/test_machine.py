"""Limits of control groups as a slow twin sees them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.convert_images import convert_images
from pipelines.machine import memory_limit_bytes, thread_limit, usable_cores

NAMES = ("docker", "kubepods.slice", "user 1000", "a:b", "job_7", "cpu,memory")
UNLIMITED_V1 = 9223372036854771712


@dataclass
class Group:
    """A control group as the kernel has it: its own limits, and the groups above it."""

    path: str  # from the hierarchy's top
    memory: int | None = None
    quota: Fraction | None = None
    above: list[Group] = field(default_factory=list)  # nearest first

    def up_to(self, top: str) -> list[Group]:
        """This group and those above it, up to the one at `top`."""
        below_top = top.rstrip("/") + "/"
        groups = [self, *self.above]
        return [group for group in groups if f"{group.path}/".startswith(below_top)]

    def tightest(self, limit: str, top: str) -> Any:
        """The twin: the least of a limit over the groups up to the one at `top`."""
        return least(getattr(group, limit) for group in self.up_to(top))


def least(limits: Iterable[Any]) -> Any:
    return min((limit for limit in limits if limit is not None), default=None)


def draw_group(rng: np.random.Generator) -> Group:
    """A group up to four levels deep, with limits here and there."""
    groups: list[Group] = []
    path = ""
    for depth in range(rng.integers(0, 5)):
        group = Group(path or "/", above=groups[::-1])
        if rng.random() < 0.5:
            group.memory = int(rng.integers(1, 1 << 40))
        if rng.random() < 0.5:
            amount = int(rng.integers(1000, 1_600_000))
            group.quota = Fraction(amount, int(rng.choice([50_000, 100_000])))
        groups.append(group)
        path += f"/{NAMES[rng.integers(len(NAMES))]}{depth}"
    return Group(path or "/", above=groups[::-1])


def draw_hierarchies(rng: np.random.Generator) -> list[list[str]]:
    """The controllers of each: version 1 has one hierarchy for each set, version 2 names none."""
    hierarchies: list[list[str]] = []
    if rng.random() < 0.5:
        hierarchies += [["memory"], ["cpu", "cpuacct"]]
    if not hierarchies or rng.random() < 0.5:
        hierarchies.append([])
    return hierarchies


def write_tree(root: Path, rng: np.random.Generator) -> tuple[Any, Any]:
    """/proc and /sys of a process, as version 1, 2 or both show it.

    Returns the limits that the twin sees: memory, quota.
    """
    own = []
    mounts = ["21 1 0:20 / /proc rw - proc proc rw"]
    memory = []
    quota = []
    for number, controllers in enumerate(draw_hierarchies(rng)):
        names = ",".join(controllers)
        group = draw_group(rng)
        place = f"/sys/fs/{names or 'unified'}"
        if rng.random() < 0.2:
            place += "/with space"
        # A container may see only the part below its own group, or below one above it.
        top = "/"
        if rng.random() < 0.5:
            top = [group, *group.above][rng.integers(len(group.above) + 1)].path
        file_system = "cgroup2 c rw,nsdelegate"
        if controllers:
            file_system = f"cgroup c rw,{names}"
        mounts.append(f"3{number} 2 0:3 {escaped(top)} {escaped(place)} rw,x - {file_system}")
        # Where its own group lies elsewhere, a process sees the limits of the top only.
        seen = group
        own_path = group.path
        if rng.random() < 0.1:
            own_path = f"/..{group.path}"
            seen = group.up_to(top)[-1]
        own.append(f"{number}:{names}:{own_path}")
        for each in group.up_to(top):
            folder = root / place.lstrip("/") / os.path.relpath(each.path, top)
            write_group(folder, each, controllers, rng)
        if "cpu" not in controllers:
            memory.append(seen.tightest("memory", top))
        if "memory" not in controllers:
            quota.append(seen.tightest("quota", top))
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("\n".join(own) + "\n")
    (root / "proc/self/mountinfo").write_text("\n".join(mounts) + "\nhalf a line -\n")
    return least(memory), least(quota)


def escaped(path: str) -> str:
    """As mountinfo shows it."""
    return path.replace(" ", r"\040")


def write_group(
    folder: Path, group: Group, controllers: list[str], rng: np.random.Generator
) -> None:
    """The files of one group; `controllers` as in `draw_hierarchies`."""
    folder.mkdir(parents=True, exist_ok=True)
    period = 100_000
    amount = None
    if group.quota:
        period = group.quota.denominator * 1000
        amount = int(group.quota * period)
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
    cores = affinity
    if quota is not None:
        cores = min(affinity, ceil(quota))
    assert usable_cores(tmp_path) == cores


def test_the_generator_draws_what_it_should(tmp_path: Path) -> None:
    """Else the test above could compare nothing with nothing."""
    found = [write_tree(tmp_path / str(seed), np.random.default_rng(seed)) for seed in range(60)]
    assert 15 < sum(memory is not None for memory, _ in found) < 55
    assert 15 < sum(quota is not None and quota < 8 for _, quota in found) < 55


def one_group(root: Path, own: str, file_system: str) -> None:
    """A hierarchy mounted at `root`/c, and this process's group in it."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"{own}\n")
    (root / "proc/self/mountinfo").write_text(f"3 2 0:3 / /c rw - {file_system}\n")
    (root / "c").mkdir()


@pytest.mark.parametrize(
    "content", ["", "\0\xff", "max", "nonsense here", "0 0", "-1 -1", "5000 0"]
)
def test_odd_limits_are_none(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_group(tmp_path, "0::/", "cgroup2 c rw")
    for name in ("cpu.max", "memory.max"):
        (tmp_path / "c" / name).write_text(content, encoding="latin-1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert usable_cores(tmp_path) == 3
    assert memory_limit_bytes(tmp_path) is None


@pytest.mark.parametrize("quota", ["1000 100000", "0 100000"])
def test_less_than_a_core_is_one(quota: str, tmp_path: Path) -> None:
    one_group(tmp_path, "0::/", "cgroup2 c rw")
    (tmp_path / "c/cpu.max").write_text(f"{quota}\n")
    assert usable_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("own", "file_system"), [("0::/job", "cgroup2 c rw"), ("7:pids:/job", "cgroup c rw,pids")]
)
def test_threads(own: str, file_system: str, tmp_path: Path) -> None:
    one_group(tmp_path, own, file_system)
    (tmp_path / "c/job").mkdir()
    (tmp_path / "c/job/pids.max").write_text("max\n")
    assert thread_limit(tmp_path) is None
    (tmp_path / "c/pids.max").write_text("77\n")
    assert thread_limit(tmp_path) == 77


def test_without_proc(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    assert memory_limit_bytes(tmp_path) is None


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
    limit = memory_limit_bytes()
    assert limit is None or limit > 1 << 20


def test_threads_follow_the_quota(
    jpeg_store: Any, jpeg_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import convert, open_loader, progress, workers
    from pipelines.loaders import base

    for module in (base, convert, workers):
        monkeypatch.setattr(module, "usable_cores", lambda: 3)
    assert open_loader("ffcv", jpeg_store, size=32).threads == 3
    with workers.Workers() as pool:
        assert pool.n == 3
    asked = []
    run_ahead = progress.run_ahead

    def watched(calls: Iterable[Callable[[], Any]], threads: int, ahead: int) -> Any:
        asked.append(threads)
        return run_ahead(calls, 1, 1)

    monkeypatch.setattr(progress, "run_ahead", watched)
    convert_images(jpeg_folder, tmp_path / "x.beton")
    assert asked == [3]
