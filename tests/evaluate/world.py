"""A run's checkpoint, small folders of each benchmark's layout, and `fap-eval` on them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fap import checkpoint
from fap.cli import eval as cli
from fap.config import Config, make_config
from fap.evaluate import evaluation, report
from fap.evaluate.exact import evaluate
from fap.nets.build import build
from tests.hostile_meta import valid_meta

WNIDS = ["n01", "n02", "n03", "n04", "n05", "n06"]
CHECKPOINT = "step_00000005.safetensors"


def tiny_config(n_classes: int = 6) -> Config:
    return make_config({
        "name": "tiny",
        "paper": {"top1": 76.5, "imagenet_r": 38.2},
        "model": {"name": "cifar_resnet8", "num_classes": n_classes},
        "data": {"size": 32, "resize": 36},
    })  # fmt: skip


def write_checkpoint(
    path: Path, classes: Sequence[str] | None, n_classes: int = 6, seed: int = 0
) -> Path:
    torch.manual_seed(seed)
    model = build("cifar_resnet8", n_classes, aux=True, size=32)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint.save(path, state, valid_meta(tiny_config(n_classes), classes))
    return path


def unchanged(image: np.ndarray) -> np.ndarray:
    return image


def write_folder(
    path: Path,
    names: Sequence[str],
    per_class: int,
    sides: tuple[int, int],  # width, height
    change: Callable[[np.ndarray], np.ndarray] = unchanged,
    seed: int = 0,
) -> None:
    """A folder of smooth images for each of the named classes."""
    rng = np.random.default_rng(seed)
    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            image = np.asarray(small.resize(sides, Image.Resampling.BICUBIC))
            Image.fromarray(change(image)).save(path / name / f"{i}.JPEG", quality=95)


def run(
    world: Path,
    *arguments: str,
    out: str = "out",
    model: str = CHECKPOINT,
    data: str = "val",
    plot: bool = False,  # it takes most of the time
) -> tuple[dict[str, Any], str]:
    """The one checkpoint's report, and the table."""
    fixed = ["--data", str(world / data), "--device", "cpu", "--batch", "4"]
    with pytest.MonkeyPatch.context() as patch:
        if not plot:
            patch.setattr(report, "_plot", no_plot)
            patch.setattr(report, "_confusion_plot", no_plot)
        code = cli.main([str(world / model), *fixed, "--out", str(world / out), *arguments])
        assert code == 0
    (found,) = json.loads((world / out / "report.json").read_text())
    return found, (world / out / "report.md").read_text()


def no_plot(*_: object) -> bytes:
    return b""


def refused(capsys: pytest.CaptureFixture[str], world: Path, *arguments: str, **where: str) -> str:
    """The one line of a command that ends with exit code 1."""
    with pytest.raises(AssertionError):
        run(world, *arguments, **where)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("fap-eval: ")
    return lines[-1]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of `evaluate` from here on."""
    calls: list[dict[str, Any]] = []

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(evaluation, "evaluate", counting)
    return calls


def fresh(world: Path, tmp_path: Path, *names: str) -> Path:
    """A copy of some of the world's folders and its checkpoint, to be changed."""
    for name in names:
        shutil.copytree(world / name, tmp_path / name)
    shutil.copy(world / CHECKPOINT, tmp_path)
    return tmp_path


def dated(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_atime_ns, stat.st_mtime_ns


def command(world: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """`fap-eval` in a process of its own."""
    words = [
        *(sys.executable, "-m", "fap.cli.eval", str(world / CHECKPOINT)),
        *("--data", str(world / "val"), "--device", "cpu", "--batch", "4"),
        *("--out", str(world / "out")),
        *arguments,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, **(pipes | options))
