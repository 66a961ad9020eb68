"""Who may import whom: the directions of the design, read from the source of every file.

`pipelines` knows nothing of `fap`. Inside `fap` each room (a folder, or a module beside the
folders) names in MAY_IMPORT the rooms that it builds on; a room that is missing there fails.
`bench` may import both.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Plain file handling, limits of a machine, class names, sizes: standard library only, for anyone.
LEAVES = {
    "pipelines.files",
    "pipelines.machine",
    "pipelines.names",
    "pipelines.sizes",
    "pipelines.back_ends",
}

# The settings of a run as data: they know no room.
SETTINGS = {
    "strict_yaml",
    "methods",
    "fields",
    "sections",
    "renamed",
    "overrides",
    "config_errors",
    "config",
    "rates",
    "budget",
}
BELOW_STEP = {
    *SETTINGS,
    "checkpoint",
    "class_maps",
    "distributed",
    "draws",
    "nets",
    "run_meta",
    "run_settings",
    "tasks",
}
MAY_IMPORT = {
    "__init__": set[str](),
    "signals": set[str](),
    "versions": set[str](),
    "recipes": set[str](),
    **dict.fromkeys(SETTINGS, SETTINGS),
    "draws": set[str](),
    "layout": set[str](),
    "class_maps": set[str](),
    "distributed": {"layout"},
    "checkpoint": set[str](),
    "run_meta": {"config", "renamed", "checkpoint"},
    "run_settings": {"config", "nets", "sections"},
    "nets": {"config", "sections", "checkpoint", "run_meta", "class_maps"},
    "tasks": {"config", "nets", "draws"},
    "step": {"config", "layout", "sections", "methods", "nets", "tasks", "distributed", "draws"},
    "evaluate": {*BELOW_STEP, "step", "versions"},
    "export": {*BELOW_STEP, "evaluate"},
    "run": {*BELOW_STEP, "step", "versions", "signals", "evaluate"},
    "cli": {*BELOW_STEP, "step", "versions", "signals", "evaluate", "export", "run", "recipes"},
}
JOIN_PIPELINES = {"tasks", "evaluate", "export", "run", "cli"}
BACK_ENDS = ("pipelines", "ffcv", "nvidia")

# What the table forbids and the tree does, and why. An exception that no file needs fails.
EXCEPTIONS = {
    ("fap.config", "fap.tasks"): "the names of the tasks, a registry that imports nothing"
}


def module_of(path: Path) -> str:
    """`fap/run/train.py` is `fap.run.train`; an `__init__.py` keeps its own name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    """Modules that a file imports anywhere, functions included; `from fap import x` is `fap.x`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import: write the whole name"
            assert node.module is not None
            if node.module == "fap":
                for alias in node.names:
                    yield f"fap.{alias.name}"
            else:
                yield node.module


def faults(module: str, source: str) -> list[str]:
    """The imports of a file that the directions forbid, as `module -> imported`."""
    return [
        f"{module} -> {other}"
        for other in imported(source)
        if not allowed(module, other) and (module, other) not in EXCEPTIONS
    ]


def allowed(module: str, other: str) -> bool:
    package, _, below = module.partition(".")
    other_package, _, other_below = other.partition(".")
    if other_package == "tests":
        return False
    match package:
        case "bench":
            return True
        case "pipelines":
            return other_package not in ("fap", "bench")
        case "fap":
            room = below.partition(".")[0]
            if other_package == "fap":
                other_room = other_below.partition(".")[0]
                return other_room == room or other_room in MAY_IMPORT[room]
            if other_package in BACK_ENDS:
                return other in LEAVES or room in JOIN_PIPELINES
            return other_package != "bench"
    raise AssertionError(f"{module} belongs to no package")


@pytest.mark.parametrize(
    "path",
    [path for package in ("pipelines", "fap", "bench") for path in files(package)],
    ids=module_of,
)
def test_every_import_goes_in_a_direction_of_the_design(path: Path) -> None:
    assert faults(module_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pipelines.plan", "import fap"),
        ("pipelines.sources.beton", "def f():\n    from fap.config import Config"),
        ("pipelines.plan", "import bench.common"),
        ("pipelines.plan", "import numpy, tests.conftest"),
        ("bench.demo", "from tests.conftest import photo"),
        ("fap.run.train", "from bench.common import ROOT"),
        ("fap.config", "from fap.nets.norm import Bn"),
        ("fap.strict_yaml", "from fap import checkpoint"),
        ("fap.budget", "import fap.step.step"),
        ("fap.nets.build", "from fap import config, step"),
        ("fap.nets.build", "from fap.step.rows import Rows"),
        ("fap.tasks.base", "from fap.step.step import Step"),
        ("fap.step.step", "from fap.evaluate import exact"),
        ("fap.step.step", "from fap.budget import Budget"),
        ("fap.distributed", "from fap.step.step import METRICS"),
        ("fap.evaluate.work", "from fap.run.data import Data"),
        ("fap.run.train", "from fap.cli.output import told"),
        ("fap.signals", "import fap.versions"),
        ("fap.step.step", "import pipelines"),
        ("fap.nets.build", "from pipelines.store import Store"),
        ("fap.config", "import ffcv"),
        ("fap.config", "from nvidia import dali"),
    ],
)
def test_a_wrong_direction_is_found(module: str, source: str) -> None:
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fap.config", "from pipelines.files import shown"),
        ("fap.config", "from fap import strict_yaml"),
        ("fap.nets.build", "from fap.nets.norm import Bn"),
        ("fap.tasks.detection", "import pipelines"),
        ("fap.run.train", "from fap.evaluate.exact import evaluate"),
        ("fap.cli.train_command", "from fap.run import train"),
        ("bench.demo", "import fap.cli.train, pipelines"),
    ],
)
def test_a_right_direction_is_not(module: str, source: str) -> None:
    assert faults(module, source) == []


def test_a_room_that_is_not_in_the_table_fails() -> None:
    with pytest.raises(KeyError, match="attic"):
        faults("fap.attic.box", "import fap.config")
    rooms = {module_of(path).split(".")[1] for path in files("fap")}
    assert rooms <= MAY_IMPORT.keys()


def test_every_exception_is_needed() -> None:
    made = {
        (module_of(path), other) for path in files("fap") for other in imported(path.read_text())
    }
    assert EXCEPTIONS.keys() <= made
    for module, other in EXCEPTIONS:
        assert not allowed(module, other)


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_a_leaf_imports_the_standard_library_and_leaves_only(leaf: str) -> None:
    source = ROOT.joinpath(*leaf.split(".")).with_suffix(".py").read_text()
    for module in imported(source):
        assert module in LEAVES or module.partition(".")[0] in sys.stdlib_module_names


def run(code: str) -> list[str]:
    """The words that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout.split()


@pytest.mark.slow
def test_importing_pipelines_imports_no_back_end() -> None:
    heavy = {"ffcv", "numba", "nvidia.dali", "cv2", "fap"}
    assert run(f"import sys, pipelines; print(*{heavy} & set(sys.modules))") == []


def test_a_command_can_be_told_to_end_before_it_imports_torch() -> None:
    entrances = "convert, corrupt, doctor, eval, export, predict, train"
    code = f"import sys; from fap.cli import {entrances}; print('torch' in sys.modules)"
    assert run(code) == ["False"]
