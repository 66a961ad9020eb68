"""What the pages say exists: links, files, commands, options, config fields, tests; and the
examples of docs/extend.md and docs/weights.md run.

The examples follow a convention. docs/extend.md teaches by code that is complete, and each fenced
block of Python in it begins with one line that says what the block is for:

    # file: fap/tasks/mine.py      the block is this new file
    # append: fap/methods.py       the block is added at the end of this file
    # run                          the block is executed

They are carried out in the order of the page in a scratch folder that begins as a copy of `fap`,
`pipelines` and `configs`. A `# run` block is a process of its own in that folder, which stands
first on its path. It sees every file that the blocks above it wrote, and must exit with 0. A page
shows what it does not run as another language (`text`), so no Python of it is unproved.

What the blocks of a page write counts as being there on that page: the files, the names in them,
and the test of each new file, which the reader is told to write.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from fap.config import SECTIONS, load_config
from fap.evaluate.published import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fap", "pipelines", "configs", "bench", "tests")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench" / "README.md",
    ROOT / "configs" / "README.md",
    ROOT / "tests" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))

# Files that a user or a run has, not we.
NOT_OURS = {"a.yaml", "b.yaml", "config.yaml", "report.md", "table.md"}
OUR_SUFFIXES = (".py", ".md", ".sh", ".yaml", ".toml", ".txt")


# ------------------------------------------------------------------ reading a page


class Fence(NamedTuple):
    language: str
    text: str


def fences(page: str) -> list[Fence]:
    """The fenced code blocks of a page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [Fence(language, text) for language, text in found]


def code_lines(page: str) -> list[str]:
    """Lines of code of a page, comments cut off and continued lines joined; then code in prose."""
    blocks = [fence.text for fence in fences(page)]
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^(?:    .*)?\n)+", prose, re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    lines = "\n".join(line.split(" # ")[0].rstrip() for line in lines).replace("\\\n", " ")
    code = [line.strip() for line in lines.splitlines() if line.strip()]
    text = re.sub(r"^    .*$", "", prose, flags=re.MULTILINE)
    return code + re.findall(r"`([^`\n]+)`", text)


def words(page: str) -> list[str]:
    """Words of the page's code, without the punctuation around them."""
    return [word.strip("()[],;:'\"") for line in code_lines(page) for word in line.split()]


class Example(NamedTuple):
    """A block of Python, and what it is for."""

    what: Literal["file", "append", "run"]
    path: str  # of the file that it makes or adds to; empty for "run"
    code: str


def examples(page: str) -> Iterator[Example]:
    """The blocks of Python of a page; see this module's docstring."""
    for block in fences(page):
        if block.language != "python":
            continue
        first, _, code = block.text.partition("\n")
        match first.removeprefix("# ").split():
            case ["file:", path]:
                yield Example("file", path, code)
            case ["append:", path]:
                yield Example("append", path, code)
            case ["run"]:
                yield Example("run", "", code)
            case _:
                raise AssertionError(f"a block of Python begins with {first!r}: see this module")


def written_by(page: str) -> dict[str, str]:
    """Files that the examples of a page make or add to, by their paths from the root: their text
    afterwards.
    """
    texts: dict[str, str] = {}
    for example in examples(page):
        match example.what:
            case "file":
                texts[example.path] = example.code
            case "append":
                if example.path not in texts:
                    texts[example.path] = (ROOT / example.path).read_text()
                texts[example.path] += f"\n\n{example.code}"
    return texts


def place_of_test(path: str) -> str:
    """Where a module's test belongs: the tests mirror the folders of `fap`, and `pipelines`."""
    package, *folders, name = Path(path).parts
    if package == "fap":
        return "/".join(["tests", *folders, f"test_{name}"])
    return f"tests/{package}/test_{name}"


def is_placeholder(word: str) -> bool:
    """`NAME.yaml`, `step_*.safetensors`, `runs/<name>`, `data.train=...`: it stands for others."""
    parts = re.split(r"[/.]", word)
    ours = {"README", "CONTRIBUTING", "CHANGELOG", "NOTES", "LICENSE", "CITATION"}
    return bool(re.search(r"[*<>{}$=]|\.\.\.", word)) or any(
        re.fullmatch(r"[A-Z_]{2,}", part) and part not in ours for part in parts
    )


# ------------------------------------------------------------------ links and files


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@EVERY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


def is_there(word: str, page: Path) -> bool:
    """As a path from the root, from the page, or as the name of a file somewhere."""
    path = word.rstrip("/")
    if (ROOT / path).exists() or (page.parent / path).exists():
        return True
    found = list(ROOT.glob(f"docs/{path}"))
    for package in PACKAGES:
        found += (ROOT / package).rglob(path)
    return "/" not in path and bool(found)


@EVERY_PAGE
def test_files_and_folders_exist(page: Path) -> None:
    text = page.read_text()
    written = set(written_by(text))
    written |= {place_of_test(path) for path in written if not (ROOT / path).exists()}
    for word in words(text):
        ours = word.endswith(OUR_SUFFIXES) or (word.split("/")[0] in PACKAGES and "/" in word)
        if ours and not (is_placeholder(word) or Path(word).name in (*NOT_OURS, *OUR_SUFFIXES)):
            path = word.partition("::")[0]
            assert path in written or is_there(path, page), word


@EVERY_PAGE
def test_names_in_the_code_exist(page: Path) -> None:
    """`fap.step.step.Step` and the like, and `python -m bench.step`."""
    text = page.read_text()
    written = written_by(text)
    for word in words(text):
        match = re.fullmatch(rf"((?:{'|'.join(PACKAGES)})(?:\.\w+)+)", word)
        if match and not word.endswith(OUR_SUFFIXES):
            assert name_exists(word, written), word


def name_exists(
    dotted: str,
    written: Mapping[str, str],  # texts of files that are elsewhere, or otherwise, than in the tree
) -> bool:
    """A module, a name in it, or a name in a class of it."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        path = "/".join(parts[:n])
        if (ROOT / path).is_dir():
            if n == len(parts):
                return True
            path = f"{path}/__init__"
        file = f"{path}.py"
        if file in written:
            return has_name(ast.parse(written[file]).body, parts[n:])
        if (ROOT / file).is_file():
            return has_name(ast.parse((ROOT / file).read_text()).body, parts[n:])
    return False


def has_name(body: list[ast.stmt], names: list[str]) -> bool:
    if not names:
        return True
    for node in body:
        targets: list[ast.expr] = []
        found: list[str] = []
        match node:
            case ast.Assign():
                targets = node.targets
            case ast.AnnAssign():
                targets = [node.target]
            case ast.FunctionDef() | ast.ClassDef():
                found = [node.name]
        for target in targets:  # `a = ...`, and `a, b = ...`
            found += [part.id for part in ast.walk(target) if isinstance(part, ast.Name)]
        if names[0] in found:
            return has_name(getattr(node, "body", []), names[1:])
    return False


# ------------------------------------------------------------------ commands


@EVERY_PAGE
def test_make_has_the_targets(page: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code_lines(page.read_text()):
        match = re.match(r"(?:[A-Z]+=\S+ )*make (\w+)", line)
        if match:
            assert match[1] in targets, line


def test_make_help_names_every_target_of_a_user() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE)) - {"help", "lint"}
    assert targets == set(re.findall(r"make (\w+)", makefile.split("\nsetup:")[0]))


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """(module, words after it) of every command of ours: `fap-train ...`, `python -m fap.cli...`"""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    modules_of_ours = rf"-m ((?:{'|'.join(PACKAGES)})\.[\w.]+)(.*)"
    for line in code_lines(page):
        script = re.search(r"(?<![\w/-])(fap-\w+)(?= |$)(.*)", line)
        module = re.search(modules_of_ours, line)
        if script:
            assert script[1] in scripts, line
            yield scripts[script[1]].partition(":")[0], script[2].split()
        elif module:
            yield module[1], module[2].split()


@EVERY_PAGE
def test_options_of_commands_exist(page: Path) -> None:
    """Each is in the package of its command: as `"--out"`, or as `out=`, which makes it.

    The options of fap-eval for published sets come from their table.
    """
    published = {one.option for one in PUBLISHED}
    for module, arguments in commands(page.read_text()):
        package = ROOT / module.replace(".", "/")
        if not package.is_dir():  # a module: the others of its package belong to it
            package = package.parent
        sources = "\n".join(file.read_text() for file in package.glob("*.py"))
        for argument in arguments:
            option = argument.strip("[]();,.")
            if re.fullmatch(r"--[a-z0-9-]+", option):
                keyword = option.removeprefix("--").removeprefix("no-").replace("-", "_")
                if module == "fap.cli.eval" and option in published:
                    continue
                assert re.search(rf'"{option}"|\b{keyword}=', sources), (module, option)


@EVERY_PAGE
def test_training_commands_have_a_config(page: Path) -> None:
    for module, arguments in commands(page.read_text()):
        files = [word for word in arguments if word.endswith(".yaml")]
        overrides = [word for word in arguments if re.match(r"[a-z_]+(\.[a-z_]+)?=", word)]
        if module != "fap.cli.train" or any(is_placeholder(file) for file in files):
            continue
        if files:
            load_config(ROOT / files[0], overrides)
        else:
            load_config(None, overrides)


# ------------------------------------------------------------------ config fields, tests


@EVERY_PAGE
def test_config_fields_exist(page: Path) -> None:
    """`section.field`, alone or as `section.field=value`."""
    sections = "|".join([*SECTIONS, "paper"])
    for word in words(page.read_text()):
        match = re.fullmatch(rf"({sections})\.(\w+)(=.*)?", word)
        if match and not word.endswith(OUR_SUFFIXES):
            fields = {"top1", "imagenet_c", "imagenet_r", "stylized"}
            if match[1] in SECTIONS:
                fields = set(SECTIONS[match[1]].model_fields)
            assert match[2] in fields, word


def test_tests_that_are_named_exist() -> None:
    """tests/README.md: `test_data`, `test_store::test_identity...`, `::test_...` of the last."""
    file = ""
    for span in re.findall(r"`([\w/]*(?:::[\w*]+)?)`", (ROOT / "tests" / "README.md").read_text()):
        name, _, test = span.partition("::")
        file = name or file
        if not (test or Path(file).name.startswith("test_")):
            continue
        sources = [path.read_text() for path in (ROOT / "tests").rglob(f"{file}.py")]
        assert sources, span
        if not test:
            continue
        tests = [found for text in sources for found in re.findall(r"^def (\w+)", text, re.M)]
        assert any(fnmatch(found, test) for found in tests), span


# ------------------------------------------------------------------ tables that must be complete


def first_cells(text: str) -> list[str]:
    """Names in the first column of every table of files: `a.py`, or `a.py`, `b.py`."""
    rows = re.findall(r"^\| (`[^|]*?\.py`) \|", text, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def modules(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if path.name != "__init__.py"]


def test_tests_readme_names_every_file() -> None:
    page = (ROOT / "tests" / "README.md").read_text()
    files = [path.relative_to(ROOT / "tests").as_posix() for path in modules(ROOT / "tests")]
    assert sorted(first_cells(page)) == files


def test_the_layout_in_design_names_every_module() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    named = []
    for folder, text in re.findall(r"^### ([\w/]+)/\n(.*?)(?=^##)", page, re.M | re.S):
        named += [f"{folder}/{name}" for name in first_cells(text)]
    files = [
        path.relative_to(ROOT).as_posix()
        for package in ("fap", "pipelines")
        for path in modules(ROOT / package)
    ]
    assert sorted(named) == sorted(files)


# ------------------------------------------------------------------ the examples of docs/extend.md


def run_examples(page: str, scratch: Path) -> int:
    """Carry out the Python blocks of a page as the module's docstring says; how many were run."""
    for package in ("fap", "pipelines", "configs"):
        shutil.copytree(ROOT / package, scratch / package, ignore=shutil.ignore_patterns("*.pyc"))
    runs = 0
    for example in examples(page):
        file = scratch / example.path
        match example.what:
            case "file":
                assert not file.exists(), (
                    f"{example.path} is there already; '# append:' adds to a file"
                )
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(example.code)
            case "append":
                file.write_text(f"{file.read_text()}\n\n{example.code}")
            case "run":
                run_block(example.code, scratch)
                runs += 1
    return runs


def run_block(code: str, scratch: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["extend.md", "weights.md"])
def test_the_examples_of_a_page_run(name: str, tmp_path: Path) -> None:
    assert run_examples((ROOT / "docs" / name).read_text(), tmp_path) > 0


EXAMPLE = """
```python
# file: fap/extra/mine.py
answer = 42
```
```python
# append: configs/table.py
MORE = 7
```
```text
not run
```
```python
# run
from fap.extra.mine import answer
from configs.table import MORE
assert (answer, MORE) == (42, 7)
```
"""


def test_examples_are_written_and_run(tmp_path: Path) -> None:
    assert run_examples(EXAMPLE, tmp_path) == 1
    assert not (ROOT / "fap" / "extra").exists()


def test_what_examples_write_is_there_on_their_page_only() -> None:
    written = written_by(EXAMPLE)
    assert set(written) == {"fap/extra/mine.py", "configs/table.py"}
    for name in ("fap.extra.mine", "fap.extra.mine.answer", "configs.table.MORE"):
        assert name_exists(name, written)
        assert not name_exists(name, {})
    assert name_exists("configs.table.TABLE", written)
    assert not name_exists("fap.extra.mine.question", written)


@pytest.mark.parametrize(
    ("path", "test"),
    [
        ("fap/budget.py", "tests/test_budget.py"),
        ("fap/tasks/mce.py", "tests/tasks/test_mce.py"),
        ("pipelines/plan.py", "tests/pipelines/test_plan.py"),
        ("pipelines/sources/beton.py", "tests/pipelines/test_beton.py"),
    ],
)
def test_the_test_of_a_module_is_where_the_tests_mirror_it(path: str, test: str) -> None:
    assert (ROOT / path).is_file()
    assert (ROOT / test).is_file()
    assert place_of_test(path) == test


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("answer, MORE) ==", "answer, MORE) !=", "AssertionError"),
        ("# run", "# later", "begins with '# later'"),
        ("fap/extra/mine.py", "fap/config.py", "there already"),
    ],
)
def test_examples_that_are_wrong_are_noticed(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        run_examples(EXAMPLE.replace(old, new), tmp_path)
