"""Limits of control groups as a slow twin sees them; users without account, home, caches,
semaphores or temporary files.
"""

import multiprocessing
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import machine, open_store
from pipelines.convert import convert_folder
from pipelines.machine import (
    memory_limit_bytes,
    settle_in,
    temporary_caches,
    thread_limit,
    usable_cores,
    writable,
)

HERE = Path(__file__).resolve().parents[2]
NAMES = ("docker", "kubepods.slice", "user 1000", "a:b", "job_7", "cpu,memory")
UNLIMITED_V1 = 9223372036854771712


# ------------------------------------------------------------------ limits


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
    from pipelines import convert, open_loader, workers
    from pipelines.loaders import base as batch
    from pipelines.sources import folder

    for module in (batch, convert, workers):
        monkeypatch.setattr(module, "usable_cores", lambda: 3)
    assert open_loader("ffcv", jpeg_store, size=32).threads == 3
    with workers.Workers() as pool:
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


# ------------------------------------------------------------------ no account, no home, no place for files


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment as a plain dict: a good home, temporary files in tmp_path/tmp, none of our
    variables.
    """
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    environ = {"HOME": str(tmp_path / "home"), "LOGNAME": "someone"}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return environ


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


def read_only(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Make files in these folders fail, for root too."""
    real = tempfile.TemporaryFile

    def temporary_file(*args: Any, dir: Any = None, **kwargs: Any) -> Any:
        if Path(dir) in folders:
            raise OSError(30, "Read-only file system")
        return real(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary_file)


def test_a_good_environment_is_left_alone(environment: dict[str, str], tmp_path: Path) -> None:
    before = dict(environment)
    settle_in()
    assert environment == before
    assert not [*(tmp_path / "tmp").iterdir(), *(tmp_path / "home").iterdir()]


def test_neither_account_nor_home(
    environment: dict[str, str], tmp_path: Path, no_account: None
) -> None:
    import getpass

    environment.clear()
    settle_in()
    ours = tmp_path / "tmp" / f"fap-{os.getuid()}"
    assert Path.home() == ours
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert os.path.expanduser("~/x") == f"{ours}/x"  # not a folder called "~"
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    assert {name: environment[name] for name in machine.CACHES} == {
        k: f"{ours}/{v}" for k, v in machine.CACHES.items()
    }
    before = dict(environment)
    settle_in()  # as a child of this process would
    assert environment == before


def test_a_home_that_cannot_be_written(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    read_only(monkeypatch, home)
    environment["MPLCONFIGDIR"] = "mine"
    settle_in()
    assert environment["HOME"] == str(home)  # data and settings there are still found
    assert environment["MPLCONFIGDIR"] == "mine"
    assert environment["NUMBA_CACHE_DIR"] == f"{tmp_path}/tmp/fap-{os.getuid()}/numba"
    assert environment["XDG_CACHE_HOME"] == f"{tmp_path}/tmp/fap-{os.getuid()}"


def test_downloads_in_a_cache_that_cannot_be_written_are_still_read(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "home" / ".cache"
    cache.mkdir()
    for unwritable in (cache, tmp_path / "home"):
        with monkeypatch.context() as patch:
            read_only(patch, unwritable)
            settle_in()
        assert "XDG_CACHE_HOME" not in environment
        assert environment.pop("NUMBA_CACHE_DIR")


def test_neither_home_nor_temporary_folder(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_account: None
) -> None:
    environment.clear()

    def none() -> str:
        if "TMPDIR" not in environment:
            raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")
        return environment["TMPDIR"]

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(machine, "SHARED_MEMORY", str(tmp_path / "gone"))
    settle_in()
    assert temporary_caches() is None
    assert environment == {
        "LOGNAME": f"uid{os.getuid()}",
        "TMPDIR": str(tmp_path / "gone"),
        "HOME": "/nonexistent",
    }
    assert not writable(Path.home()) or os.access("/", os.W_OK)


def test_a_folder_that_somebody_else_prepared_is_not_used(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """What lies in a cache is run: in /tmp anybody can be there first."""
    ours = tmp_path / "tmp" / f"fap-{os.getuid()}"
    ours.mkdir()
    ours.chmod(0o777)
    assert temporary_caches() is None
    ours.rmdir()
    (tmp_path / "elsewhere").mkdir()
    ours.symlink_to(tmp_path / "elsewhere")
    assert temporary_caches() is None
    ours.unlink()
    ours.write_text("a file")
    assert temporary_caches() is None
    ours.unlink()
    assert temporary_caches() == ours
    assert temporary_caches() == ours  # again: it is kept
    if os.getuid() == 0:
        os.chown(ours, 54321, 54321)
        assert temporary_caches() is None


def test_whoever_imports_the_pipelines_has_settled_in(tmp_path: Path) -> None:
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": "/proc/nowhere",
        "TMPDIR": str(tmp_path),
        "MPLCONFIGDIR": "mine",
    }
    code = (
        "import os, pipelines; print(*(os.environ[name] for name in ('NUMBA_CACHE_DIR', 'HOME',"
        " 'MPLCONFIGDIR')))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, env=environ, capture_output=True, text=True
    )
    assert told.stdout.split() == [f"{tmp_path}/fap-{os.getuid()}/numba", "/proc/nowhere", "mine"]


def test_writable(tmp_path: Path) -> None:
    assert writable(tmp_path)
    assert writable(tmp_path / "not" / "yet" / "there")
    (tmp_path / "file").touch()
    assert not writable(tmp_path / "file")
    assert not writable(tmp_path / "file" / "below")
    assert not writable("/proc")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def no_semaphores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container without /dev/shm."""
    import multiprocessing.synchronize as synchronize

    def missing(*_: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(synchronize._multiprocessing, "SemLock", missing)
    with pytest.raises(FileNotFoundError):
        multiprocessing.Lock()


def test_threads_need_no_semaphores(no_semaphores: None, jpeg_folder: Path, tmp_path: Path) -> None:
    from pipelines import eval_plan, open_loader

    folder = tmp_path / "folder"
    shutil.copytree(jpeg_folder, folder)  # not yet scanned
    (folder / ".fap-index.npz").unlink(missing_ok=True)
    store = open_store(folder)
    assert convert_folder(folder, tmp_path / "x.beton")["count"] == len(store) == 40
    plan = eval_plan(store.heights, store.widths, size=32, resize=36, batch=8)
    for back_end in ("ffcv", "reference"):
        assert len([*open_loader(back_end, store, size=32).load(plan)]) == 5


# ------------------------------------------------------------------ numba's cache


@pytest.mark.parametrize(
    "error", [RuntimeError("no locator available"), OSError(28, "No space left"), EOFError()]
)
def test_what_cannot_be_kept_is_compiled_all_the_same(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.loaders import area

    asked = []

    def njit(signature: Any, cache: bool = False, **options: Any) -> Any:
        asked.append((signature, options))
        if cache:
            raise error
        return lambda function: function

    monkeypatch.setattr(area, "njit", njit)
    assert area._compiled("signature")(abs)(-3) == 3
    assert asked == [("signature", {"nogil": True, "fastmath": True})] * 2


# ------------------------------------------------------------------ for real

INSIDE = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
SHARED_MEMORY = {
    "none": "mount -t tmpfs -o mode=0 none /dev/shm",
    "full": "mount -t tmpfs -o size=4k none /dev/shm && head -c 4096 /dev/zero > /dev/shm/full",
}


def cannot_unshare() -> str:
    """Why this machine lets us make no such container; or ""."""
    for command in (
        ["unshare", "--mount", *INSIDE, "true"],
        ["unshare", "--mount", "sh", "-c", SHARED_MEMORY["none"]],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
        if done.returncode:
            return done.stderr
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(("home", "shared_memory"), [("unset", "full"), ("read-only", "none")])
def test_a_user_without_account_in_a_read_only_tree(
    home: str, shared_memory: str, jpeg_folder: Path, tmp_path: Path
) -> None:
    """The default pipeline trains, and the doctor names what is missing."""
    if reason := cannot_unshare():
        pytest.skip(f"no containers here: {reason.strip()}")
    tree, run, temporary, read_only_home = (
        tmp_path / name for name in ("tree", "run", "tmp", "home")
    )
    for package in ("fap", "pipelines"):
        shutil.copytree(
            HERE / package, tree / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copytree(jpeg_folder, run / "data", ignore=shutil.ignore_patterns(".*"))
    temporary.mkdir()
    read_only_home.mkdir()
    for folder, _, files in os.walk(tree):
        for file in files:
            os.chmod(os.path.join(folder, file), 0o444)
        os.chmod(folder, 0o555)
    read_only_home.chmod(0o555)

    def inside(command: str, *words: str) -> "subprocess.CompletedProcess[str]":
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(tree),
            "TMPDIR": str(temporary),
            "OMP_NUM_THREADS": "1",
        }
        if home == "read-only":
            environ["HOME"] = str(read_only_home)
        python = [*INSIDE, sys.executable, "-m", f"fap.cli.{command}", *words]
        shell = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'{SHARED_MEMORY[shared_memory]}; exec "$@"',
            "sh",
            *python,
        ]
        return subprocess.run(shell, cwd=run, env=environ, capture_output=True, text=True)

    tiny = (
        "model.name=cifar_resnet8 model.num_classes=4 data.size=32 data.resize=36"
        " optim.clean_batch=8 method.group_rows=4 method.p_adv=1/3 run.device=cpu run.torch_threads=1"
        " budget.epochs=1 budget.milestones=[] data.train=data data.val=data name=x"
    )
    trained = inside("train", *tiny.split(), "--pipeline", "ffcv")
    assert trained.returncode == 0, trained.stderr
    assert "done: top-1" in trained.stdout
    assert trained.stderr == ""
    assert sorted(path.name for path in run.iterdir()) == [
        "data",
        "runs",
    ]  # and no folder called "~"
    kept = [*(temporary / "fap-54321").rglob("*.nbc")]
    assert len(kept) == 1

    told = inside("doctor", ".").stdout
    lines = {line[6:19].strip(): line for line in told.splitlines()}
    assert lines["user"].startswith("warn  user          54321 has no account")
    assert f"caches go to {temporary}/fap-54321" in lines["user"]
    assert lines["shared memory"].startswith("warn")
    assert "semaphore" in lines["shared memory"]
    assert lines["FFCV"].startswith("ok")
    assert lines["torch"].startswith("ok")
