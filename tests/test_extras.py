"""Packages that only one feature needs: all else works without them, and the feature says so.

In processes of their own, where importing these packages fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fap.cli.checks import EXTRAS
from tests.conftest import noise_beton
from tests.run import runs
from tests.run.detections import DETECTION, write_boxes
from tests.run.wiring import BASE

ROOT = Path(__file__).parents[1]
MODULES = sorted({module for modules in EXTRAS.values() for module in modules})
BLOCKED = f"""
import sys
for name in {MODULES} + ["ffcv", "nvidia.dali", "imagecorruptions", "skimage"]:
    sys.modules[name] = None
"""


def without_extras(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code where no extra is installed."""
    command = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def refused(code: str, *arguments: object) -> str:
    """What the code says when it ends with exit code 1, and no traceback."""
    done = without_extras(code, *arguments)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


TRAIN = "from fap.cli.train import main; sys.exit(main(sys.argv[1:]))"
EVALUATE = "from fap.cli.eval import main; sys.exit(main(sys.argv[1:]))"
CONVERT = "from fap.cli.convert import main; sys.exit(main(sys.argv[1:]))"


def test_the_table_of_extras_is_that_of_pyproject() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = found["optional-dependencies"]
    assert EXTRAS.keys() == extras.keys() - {"all", "dali", "dali12", "dev"}
    (everything,) = extras["all"]
    assert everything == f"fap[{','.join(sorted(EXTRAS))}]"
    packages = {"cv2": "opencv-python-headless", "faster_coco_eval": "faster-coco-eval"}
    for extra, modules in EXTRAS.items():
        names = {re.split("[><=]", requirement)[0] for requirement in extras[extra]}
        assert names == {packages.get(module, module) for module in modules}
        needed = {re.split("[><=]", requirement)[0] for requirement in found["dependencies"]}
        assert not names & needed


@pytest.mark.slow
def test_a_run_and_its_evaluation_need_no_extra(tmp_path: Path) -> None:
    beton = noise_beton(tmp_path / "train.beton", seed=1, count=64)
    short = ["budget.epochs=2", "budget.milestones=[1]"]
    words = runs.words(beton, tmp_path, "data.pipeline=auto", *short)
    done = without_extras(TRAIN, *words)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "loader     turbojpeg (data.pipeline = auto), decoding on CPU cores" in said
    assert "no TensorBoard: it needs a package that is missing" in said
    assert "pip install 'fap[tensorboard]'" in said
    assert len(runs.steps_recorded(tmp_path / runs.RUN)) > 0
    (checkpoint, *_) = sorted((tmp_path / runs.RUN / "checkpoints").glob("*.safetensors"))
    arguments = [checkpoint, "--data", beton, "--device", "cpu"]
    out = tmp_path / "eval"
    done = without_extras(EVALUATE, *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "report.png: the plot of a report needs a package that is missing" in done.stderr
    assert "pip install 'fap[plots]'" in done.stderr
    assert (out / "report.md").exists()
    assert not (out / "report.png").exists()
    # What is missing is noticed before anything is computed.
    more = ["--corrupt", "fog", "--out", tmp_path / "other"]
    told = refused(EVALUATE, *arguments, *more)
    assert "computing corruptions needs a package that is missing" in told
    assert "pip install 'fap[corruptions]'" in told
    told = refused(EVALUATE, *arguments, "--attack", "autoattack", "--out", tmp_path / "other")
    assert "AutoAttack needs a package that is missing" in told
    assert "pip install 'fap[attacks]'" in told
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_training_a_detector_names_its_extra_before_the_first_epoch(tmp_path: Path) -> None:
    beton = write_boxes(tmp_path / "boxes.beton", seed=0)
    data = [f"data.train={beton}", f"data.val={beton}", f"run.dir={tmp_path / 'runs'}"]
    told = refused(TRAIN, *BASE, *DETECTION, *data)
    assert "the score of a detector needs a package that is missing" in told
    assert "pip install 'fap[detection]'" in told


@pytest.mark.slow
def test_converting_names_its_extra(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1" + bytes(100))
    told = refused(CONVERT, tmp_path / "data", tmp_path / "out.beton")
    assert "reading parquet files needs a package that is missing" in told
    assert "pip install 'fap[parquet]'" in told


@pytest.mark.slow
def test_stores_and_loaders_need_no_extra(jpeg_beton: Path, jpeg_folder: Path) -> None:
    code = """
import pipelines, fap.cli.train_command, fap.cli.eval_command, fap.cli.convert
for path in sys.argv[1:]:
    store = pipelines.open_store(path)
    plan = pipelines.eval_plan(store.heights, store.widths, size=32, resize=32, batch=4)
    for name in ("reference",):
        loader = pipelines.open_loader(name, store, size=32)
        print(sum(int(batch.images.sum()) for batch in loader.load(plan)))
"""
    done = without_extras(code, jpeg_beton, jpeg_folder)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert int(first) == int(second) > 0


def test_the_doctor_names_what_is_missing() -> None:
    code = """
from fap.cli import checks
try:
    checks.check_extras(None)
except checks.Finding as finding:
    print(finding, finding.mend)
"""
    done = without_extras(code)
    assert done.stdout.startswith(f"not installed: {', '.join(EXTRAS)}; ")
    assert done.stdout.endswith(f"pip install -e '.[{','.join(EXTRAS)}]'\n")
    assert np.all([extra in done.stdout for extra in EXTRAS])
