"""Import directions: `pipelines` knows nothing of `fap`; in `fap` only what joins both knows
`pipelines`: run/, evaluate/ and cli/.

`pipelines.files`, `pipelines.machine` and `pipelines.names` are leaves (plain file handling,
limits, class names) that anyone may import.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = ("files", "machine", "names")
JOINING = [ROOT / "fap" / name for name in ("run", "evaluate", "cli")]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and node.module not in [f"pipelines.{leaf}" for leaf in LEAVES]
        ):
            found.add((node.module or "").split(".")[0])
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", files("pipelines"), ids=lambda p: p.name)
def test_pipelines_import_nothing_of_fap_or_bench(path: Path) -> None:
    assert not imported(path) & {"fap", "bench", "tests"}


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_imports_the_standard_library_only(leaf: str) -> None:
    assert imported(ROOT / "pipelines" / f"{leaf}.py") <= sys.stdlib_module_names


@pytest.mark.parametrize("path", files("fap"), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_training_evaluation_and_commands_join_both(path: Path) -> None:
    forbidden = {"bench", "tests"}
    if path.parent not in JOINING:
        forbidden |= {"pipelines", "ffcv", "nvidia"}
    assert not imported(path) & forbidden


def test_importing_pipelines_imports_no_back_end() -> None:
    code = (
        "import sys, pipelines; print(*{'ffcv', 'numba', 'nvidia.dali', 'cv2', 'fap'} &"
        " set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert out.stdout.split() == []
