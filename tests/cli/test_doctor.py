"""fap-doctor finds what is missing, names the command that mends it, and never crashes."""

import contextlib
import importlib
import os
import resource
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fap.cli import checks, doctor

ROOT = Path(__file__).parents[2]
HERE = Path()


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    """Status and text by the name of the check."""
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(doctor.CHECKS)
    return {line[6:19].strip(): (line[:4].strip(), line[20:]) for line in out}


def test_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([str(tmp_path)]) == 0
    found = lines(capsys)
    assert [found[name][0] for name in ("Python", "torch", "packages")] == ["ok"] * 3
    assert str(tmp_path) in found["disk"][1]
    assert "GB" in found["memory"][1]
    assert not list(tmp_path.iterdir())


def test_everything_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> ModuleType:
        raise ImportError(f"lib{name}.so.1: cannot open\nshared object file")

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("broken")

    monkeypatch.setattr(importlib, "import_module", nothing)
    monkeypatch.setattr(checks.machine, "usable_cores", broken)
    monkeypatch.setattr(checks.machine, "home_folder", broken)
    monkeypatch.setattr(checks.machine, "settle_in", lambda: None)
    monkeypatch.setattr(checks.multiprocessing, "get_context", broken)
    monkeypatch.setattr(checks.resource, "getrlimit", broken)
    monkeypatch.setattr(checks.locale, "getpreferredencoding", broken)
    monkeypatch.setattr(tempfile, "gettempdir", broken)
    monkeypatch.setattr(checks.shutil, "disk_usage", broken)
    assert doctor.main([str(tmp_path / "no" / "where")]) == 1
    found = lines(capsys)
    as_they_are = {"Python", "memory"}
    # These name their own remedy, or have another cause.
    elsewhere = {"disk", "file system", "clock", "shared memory", "extras"}
    for name, needed, _, mend in doctor.CHECKS:
        if name in as_they_are:
            continue
        status, text = found[name]
        assert status == ("fail" if needed else "warn"), name
        assert text.endswith(f"->  {mend}") or name in elsewhere
    assert "libnumpy.so.1: cannot open shared object file  ->" in found["packages"][1]
    assert "no such folder  ->  fap-doctor A_FOLDER_THAT_EXISTS" in found["disk"][1]


def test_it_may_lose_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    survived = []
    monkeypatch.setattr(doctor, "survive", lambda: survived.append(True))
    monkeypatch.setattr(doctor, "CHECKS", ())
    assert doctor.main([]) == 0
    assert survived


def test_a_current_folder_that_was_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    checks = [check for check in doctor.CHECKS if check[0] in ("folders", "disk", "file system")]
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.count("warn") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "name", "needed"),
    [("ffcv", "FFCV", False), ("nvidia", "DALI", False), ("timm", "packages", True)],
)
def test_one_package_missing(missing: str, name: str, needed: bool, tmp_path: Path) -> None:
    """For real: a fresh interpreter in which one package does not import."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
from fap.cli.doctor import main
sys.exit(main())
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", code]
    result = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == needed
    line = next(x for x in result.stdout.splitlines() if name in x)
    assert line.startswith("fail" if needed else "warn")
    assert "->  pip install" in line or "->  bash setup.sh" in line


@pytest.mark.slow
def test_without_torch_everything_else_is_still_examined(tmp_path: Path) -> None:
    """It is what a machine without torch is examined with, so it cannot import it at the start."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so: cannot open')")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    env = os.environ | {"PYTHONPATH": paths}
    argv = [sys.executable, "-m", "fap.cli.doctor"]
    result = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    found = result.stdout.splitlines()
    assert len(found) == len(doctor.CHECKS)
    (torch,) = [line for line in found if "libcudart.so" in line and line[6:].startswith("torch ")]
    assert torch.startswith("fail")
    assert sum(line.startswith("ok") for line in found) >= 3


def test_what_is_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = np.broadcast_to(np.array(checks.COLOUR, np.uint8), (64, 64, 3))
    assert "numpy" in checks.judged(good, "numpy")
    with pytest.raises(checks.Finding, match="falsely decodes"):
        checks.judged(good[..., ::-1], "numpy")
    with pytest.raises(checks.Finding, match="falsely decodes"):
        checks.judged(good[:32], "numpy")
    (tmp_path / "big.beton").touch()
    os.truncate(tmp_path / "big.beton", 1 << 43)  # sparse: more than any memory
    with pytest.raises(checks.Finding, match=r"big\.beton: 8,796\.1 GB"):
        checks.check_memory(tmp_path / "big.beton")
    usage = checks.shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(checks.Finding, match="1 GB free"):
        checks.check_disk(tmp_path / "big.beton")


# ------------------------------------------------------------------ containers and batch systems


def finding(name: str, path: Path = HERE) -> tuple[str, str]:
    """What a check finds amiss, and what mends it."""
    (check,) = [check for check in doctor.CHECKS if check.name == name]
    with pytest.raises(checks.Finding) as found:
        check.look(path)
    return str(found.value), found.value.mend or check.mend


def test_cores_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(checks.machine, "usable_cores", lambda: 8)
    assert (
        checks.check_cores(HERE) == "8 usable of 64, by the CPU affinity (taskset, cpuset, Slurm)"
    )
    monkeypatch.setattr(checks.machine, "usable_cores", lambda: 2)
    assert "2 usable of 64, by a CPU quota" in checks.check_cores(HERE)
    monkeypatch.setenv("OMP_NUM_THREADS", "64,1")
    text, mend = finding("cores")
    assert "OMP_NUM_THREADS=64 asks for more" in text
    assert mend == "unset OMP_NUM_THREADS"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "asks" not in checks.check_cores(HERE)


def test_a_memory_limit_below_what_a_run_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.machine, "memory_limit_bytes", lambda: 2 * 10**9)
    text, mend = finding("memory")
    assert "2.0 GB" in text
    assert "killed (exit code 137)" in text
    assert mend.startswith("docker run --memory=")
    monkeypatch.setattr(checks, "LEAST_MEMORY_GB", 0)  # other processes may hold the most of it
    monkeypatch.setattr(checks.machine, "memory_limit_bytes", lambda: 1 << 50)
    assert "limit" not in checks.check_memory(HERE)


def test_a_user_without_account_or_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "keeps caches in" in checks.check_user(HERE)
    monkeypatch.setattr(checks.machine, "temporary_caches", lambda: Path("/tmp/ours"))
    monkeypatch.setattr(checks.machine, "writable", lambda folder: folder != Path("/root-only"))
    monkeypatch.setattr(checks.machine, "cache_folder", lambda: Path("/root-only"))
    assert "cannot write in the cache /root-only; caches go to /tmp/ours" in finding("user")[0]
    monkeypatch.setattr(checks.machine, "home_folder", lambda: Path("/root-only"))
    assert "cannot write in the home /root-only" in finding("user")[0]
    monkeypatch.setattr(checks.machine, "home_folder", lambda: None)
    monkeypatch.setattr(checks.machine, "temporary_caches", lambda: None)
    monkeypatch.setattr(checks.pwd, "getpwuid", lambda uid: {}[uid])
    text, mend = finding("user")
    assert (
        "has no account and has no home: HOME is not set; nothing that is compiled can be kept"
        in text
    )
    assert mend.startswith("export HOME=")


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path) in checks.check_folders(HERE)
    monkeypatch.setattr(checks.machine, "writable", lambda folder: False)
    text, mend = finding("folders")
    assert f"{tmp_path} cannot be written" in text
    assert "run.dir=" in mend
    for name in ("disk", "file system", "clock"):
        assert finding(name, tmp_path)[0] == f"{tmp_path}: no file can be made there"
    usage = checks.shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    text, mend = finding("folders")
    assert "has 1 MB left" in text
    assert "TMPDIR" in mend


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ImportError("lacks semaphores")]
)
def test_shared_memory(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing.synchronize as synchronize

    usage = checks.shutil.disk_usage("/")._replace(free=10**6)
    with monkeypatch.context() as patch:
        patch.setattr(checks.shutil, "disk_usage", lambda path: usage)
        text, mend = finding("shared memory")
        assert "1 MB free" in text
        assert "--shm-size" in mend

    def missing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(synchronize._multiprocessing, "SemLock", missing)
    text, mend = finding("shared memory")
    assert f"no semaphore can be made ({error})" in text
    assert "--shm-size" in mend


@pytest.mark.parametrize("which", range(len(checks.LIMITS)))
def test_limits_of_a_process(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = checks.LIMITS[which]
    real = resource.getrlimit

    def set_to(value: int) -> None:
        def fake(asked: int) -> tuple[int, int]:
            return (value, -1) if asked == limit.number else real(asked)

        monkeypatch.setattr(resource, "getrlimit", fake)

    for enough in (limit.least, resource.RLIM_INFINITY):
        set_to(enough)
        assert "open files" in checks.check_limits(HERE)
    set_to(limit.least - 1)
    text, mend = finding("limits")
    assert f"at most {limit.least - 1:,} {limit.what}" in text
    assert mend == limit.mend


def test_a_container_with_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.machine, "thread_limit", lambda: 100)
    text, mend = finding("limits")
    assert "at most 100 threads" in text
    assert mend.startswith("docker run --pids-limit")
    monkeypatch.setattr(checks.machine, "thread_limit", lambda: checks.LEAST_THREADS)
    assert "open files" in checks.check_limits(HERE)


def test_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_text(HERE) == "UTF-8"
    monkeypatch.setattr(checks.locale, "getpreferredencoding", lambda *_: "ANSI_X3.4-1968")
    text, mend = finding("text")
    assert text == "files are ANSI_X3.4-1968"
    assert "PYTHONUTF8=1" in mend


def test_few_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def inodes(total: int) -> Any:
        return lambda path: SimpleNamespace(**known | {"f_files": total, "f_favail": 12})

    real = os.statvfs(tmp_path)
    known = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}

    monkeypatch.setattr(os, "statvfs", inodes(0))  # btrfs counts none
    try:
        text = checks.check_disk(tmp_path)
    except checks.Finding as slow:
        text = str(slow)
    assert "MB/s" in text
    assert "more files" not in text
    monkeypatch.setattr(os, "statvfs", inodes(1000))
    text, mend = finding("disk", tmp_path)
    assert "room for only 12 more files" in text
    assert mend.startswith(f"df -i {tmp_path}")


@pytest.mark.parametrize("folders_only", [False, True])
def test_a_file_system_without_locks_or_fsync(
    folders_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checks.check_file_system(tmp_path / "x.beton") == f"{tmp_path}: locks, fsync"
    with monkeypatch.context() as patch:
        patch.setattr(checks.files, "lock", lambda file: False)
        text, _ = finding("file system", tmp_path)
        assert "no locks" in text
        assert "power cut" not in text
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if folders_only and not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return real(descriptor)
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    text, _ = finding("file system", tmp_path)
    assert "no fsync of folders (a power cut" in text
    assert ("no fsync of files" in text) is not folders_only
    with contextlib.suppress(checks.Finding):
        checks.check_disk(tmp_path)  # is not the one to tell


def test_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_clock(tmp_path).endswith("UTC")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert (
        "1970-01-01 00:00:00 UTC is before this program was written"
        in finding("clock", tmp_path)[0]
    )
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    text, mend = finding("clock", tmp_path)
    assert f"the clock of {tmp_path} differs by -3,600 s" in text
    assert mend.startswith("timedatectl")
