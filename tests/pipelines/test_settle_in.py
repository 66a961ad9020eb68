"""Users without account, home, caches, semaphores or temporary files."""

from __future__ import annotations

import getpass
import multiprocessing
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import synchronize
from pathlib import Path
from typing import Any

import pytest

from pipelines import eval_plan, machine, open_loader, open_store
from pipelines.convert_images import convert_images
from pipelines.machine import settle_in, temporary_caches, writable

HERE = Path(__file__).resolve().parents[2]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment as a plain dict: a good home, temporary files in tmp_path/tmp, no more."""
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
    environment.clear()
    settle_in()
    ours = tmp_path / "tmp" / f"fap-{os.getuid()}"
    assert Path.home() == ours
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert os.path.expanduser("~/x") == f"{ours}/x"  # not a folder called "~"
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    for variable, name in machine.CACHES.items():
        assert environment[variable] == f"{ours}/{name}"
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


@pytest.mark.slow
def test_whoever_imports_the_pipelines_has_settled_in(tmp_path: Path) -> None:
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": "/proc/nowhere",
        "TMPDIR": str(tmp_path),
        "MPLCONFIGDIR": "mine",
    }
    code = (
        "import os, pipelines\n"
        "print(*(os.environ[name] for name in ('NUMBA_CACHE_DIR', 'HOME', 'MPLCONFIGDIR')))"
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

    def missing(*_: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(synchronize._multiprocessing, "SemLock", missing)
    with pytest.raises(FileNotFoundError):
        multiprocessing.Lock()


def test_threads_need_no_semaphores(no_semaphores: None, jpeg_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(jpeg_folder, folder)  # not yet scanned
    (folder / ".fap-index.npz").unlink(missing_ok=True)
    store = open_store(folder)
    assert convert_images(folder, tmp_path / "x.beton")["count"] == len(store) == 40
    plan = eval_plan(store.heights, store.widths, size=32, resize=36, batch=8)
    for back_end in ("ffcv", "reference"):
        assert len([*open_loader(back_end, store, size=32).load(plan)]) == 5


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
    assert area.compiled("signature", fastmath=True)(abs)(-3) == 3
    assert asked == [("signature", {"nogil": True, "fastmath": True})] * 2


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


def container(tmp_path: Path, home: str, shared_memory: str) -> Callable[..., Any]:
    """A read-only copy of the packages, and what runs a command of them there.

    Its user has no account; `home` is "unset" or "read-only", `shared_memory` a key of
    SHARED_MEMORY.
    """
    tree = tmp_path / "tree"
    for package in ("fap", "pipelines"):
        without_caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(HERE / package, tree / package, ignore=without_caches)
    for folder, _, files in os.walk(tree):
        for file in files:
            os.chmod(os.path.join(folder, file), 0o444)
        os.chmod(folder, 0o555)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o555)
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(tree),
        "TMPDIR": str(tmp_path / "tmp"),
        "OMP_NUM_THREADS": "1",
    }
    if home == "read-only":
        environ["HOME"] = str(tmp_path / "home")

    def inside(command: str, *words: str) -> subprocess.CompletedProcess[str]:
        shell = f'{SHARED_MEMORY[shared_memory]}; exec "$@"'
        python = [*INSIDE, sys.executable, "-m", f"fap.cli.{command}", *words]
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", shell, "sh", *python],
            cwd=tmp_path / "run",
            env=environ,
            capture_output=True,
            text=True,
        )

    return inside


TINY = (
    "model.name=cifar_resnet8 model.num_classes=4 data.size=32 data.resize=36"
    " optim.clean_batch=8 method.group_rows=4 method.p_adv=1/3"
    " run.device=cpu run.torch_threads=1 budget.epochs=1 budget.milestones=[]"
    " data.train=data data.val=data name=x"
)


@pytest.mark.slow
@pytest.mark.parametrize(("home", "shared_memory"), [("unset", "full"), ("read-only", "none")])
def test_a_user_without_account_in_a_read_only_tree(
    home: str, shared_memory: str, jpeg_folder: Path, tmp_path: Path
) -> None:
    """The default pipeline trains, and the doctor names what is missing."""
    reason = cannot_unshare()
    if reason:
        pytest.skip(f"no containers here: {reason.strip()}")
    run = tmp_path / "run"
    shutil.copytree(jpeg_folder, run / "data", ignore=shutil.ignore_patterns(".*"))
    inside = container(tmp_path, home, shared_memory)

    trained = inside("train", *TINY.split(), "--pipeline", "ffcv")
    assert trained.returncode == 0, trained.stderr
    assert "done: top-1" in trained.stdout
    assert trained.stderr == ""
    # And no folder called "~".
    assert sorted(path.name for path in run.iterdir()) == ["data", "runs"]
    caches = tmp_path / "tmp" / "fap-54321"
    kernels = [path.name.partition(".")[0] for path in caches.rglob("*.nbc")]
    assert {"area", "antialiased"} <= set(kernels)
    assert len(kernels) == len(set(kernels)), "each is compiled once"

    told = inside("doctor", ".").stdout
    lines = {line[6:19].strip(): line for line in told.splitlines()}
    assert lines["user"].startswith("warn  user          54321 has no account")
    assert f"caches go to {caches}" in lines["user"]
    assert lines["shared memory"].startswith("warn")
    assert "semaphore" in lines["shared memory"]
    assert lines["FFCV"].startswith("ok")
    assert lines["torch"].startswith("ok")
