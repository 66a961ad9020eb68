"""fap-doctor finds what is missing, names the command that mends it, and never crashes."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fap.cli import doctor


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


def test_everything_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> ModuleType:
        raise ImportError(f"lib{name}.so.1: cannot open\nshared object file")

    monkeypatch.setattr(importlib, "import_module", nothing)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: 1 / 0)
    assert doctor.main([str(tmp_path / "no" / "where")]) == 1
    found = lines(capsys)
    for name, needed, _, mend in doctor.CHECKS:
        if name == "memory":
            continue
        status, text = found[name]
        assert status == ("fail" if needed else "warn"), name
        assert text.endswith(f"->  {mend}")
    assert "libnumpy.so.1: cannot open shared object file  ->" in found["packages"][1]


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["ffcv", "nvidia", "timm"])
def test_one_package_missing(missing: str, tmp_path: Path) -> None:
    """For real: a fresh interpreter in which one package does not import."""
    block = f"import sys; sys.modules[{missing!r}] = None; from fap.cli.doctor import main; sys.exit(main())"
    run = [sys.executable, "-c", block]
    env = os.environ | {"PYTHONPATH": str(Path(doctor.__file__).parents[2])}
    result = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    name, needed = {"ffcv": ("FFCV", False), "nvidia": ("DALI", False), "timm": ("packages", True)}[missing]
    assert result.returncode == needed
    line = next(x for x in result.stdout.splitlines() if name in x)
    assert line.startswith("fail" if needed else "warn")
    assert "->  pip install" in line or "->  bash setup.sh" in line


def test_what_is_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = np.broadcast_to(np.array(doctor.COLOUR, np.uint8), (64, 64, 3))
    assert "numpy" in doctor.judged(good, "numpy")
    with pytest.raises(RuntimeError, match="falsely decodes"):
        doctor.judged(good[..., ::-1], "numpy")
    with pytest.raises(RuntimeError, match="falsely decodes"):
        doctor.judged(good[:32], "numpy")
    (tmp_path / "big.beton").touch()
    os.truncate(tmp_path / "big.beton", 1 << 43)  # sparse: more than any memory
    with pytest.raises(RuntimeError, match=r"big\.beton: 8,796\.1 GB"):
        doctor.check_memory(tmp_path / "big.beton")
    usage = doctor.shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RuntimeError, match="1 GB free"):
        doctor.check_disk(tmp_path / "big.beton")
