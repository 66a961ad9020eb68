"""Standard output that fails: what is lost, what is said, and that the command goes on."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fap.cli import export
from fap.export import formats
from fap.signals import SIGNALS

ROOT = Path(__file__).parents[2]

# A worker that prints, also what ASCII lacks, and then leaves a file.
CODE = """
import sys
from fap.cli.output import survive
survive()
for line in range(int(sys.argv[1])):
    print(line, "\\u2192 \\udce9", flush=line % 2 == 0)
open(sys.argv[2], "w").write("worked")
"""


def start(tmp_path: Path, lines: int = 3, **options: object) -> subprocess.Popen:
    argv = [sys.executable, "-c", CODE, str(lines), str(tmp_path / "done")]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("shell", [">/dev/full", ">&-", "2>&-", ">/dev/full 2>/dev/full"])
def test_a_full_disk_or_a_closed_output_costs_lines_only(tmp_path: Path, shell: str) -> None:
    redirected = ["sh", "-c", f'exec "$@" {shell}', "sh"]
    worker = [sys.executable, "-c", CODE, "3", str(tmp_path / "done")]
    done = subprocess.run([*redirected, *worker], capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "done").read_text()) == (0, "worked")
    assert ("No space left" in done.stderr) == (shell == ">/dev/full")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_the_reader_of_a_pipe_may_leave(tmp_path: Path) -> None:
    process = start(tmp_path, 100_000, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read().count("Broken pipe") == 1
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "done").read_text() == "worked"


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", CODE, "1", str(tmp_path / "done")]
    environment = {"PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"0 \\u2192 \\udce9\n")


# The least that each command wants.
WORDS: dict[str, list[str]] = {
    "train": [],
    "convert": ["a", "b.beton"],
    "eval": ["a"],
    "corrupt": ["a", "b"],
    "export": ["a", "b.safetensors"],
    "doctor": [],
}


def run_with_torch(
    source: str, name: str, folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The command, where torch is a module of this source."""
    (folder / "torch.py").write_text(source)
    argv = [sys.executable, "-m", f"fap.cli.{name}", *WORDS[name]]
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths} | variables
    return subprocess.run(
        argv, capture_output=True, text=True, env=environment, cwd=folder, timeout=60
    )


SIGNAL_INSIDE_AN_EXEC = (
    "exec('import os, sys, time; os.kill(os.getpid(), int(os.environ[\"SENT\"])); time.sleep(30)')"
)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", WORDS)
def test_a_signal_while_torch_is_imported_is_one_line(
    name: str, number: signal.Signals, tmp_path: Path
) -> None:
    """Even in the middle of an `exec`.

    After that Python itself turned Ctrl-C's exit code 130 into death by SIGINT.
    """
    done = run_with_torch(SIGNAL_INSIDE_AN_EXEC, name, tmp_path, SENT=str(int(number)))
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == f"fap-{name}: stopped by {number.name}\n"


@pytest.mark.parametrize("name", ["train", "convert", "eval", "export", "corrupt"])
def test_what_torch_lacks_is_one_line(name: str, tmp_path: Path) -> None:
    done = run_with_torch("raise OSError(28, 'No space left on device', '/tmp')", name, tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"fap-{name}: [Errno 28] No space left on device: '/tmp'\n"


@pytest.mark.parametrize("name", ["convert", "eval", "export", "corrupt"])
def test_a_very_long_path_is_cut(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = "x" * 20_000
    words = {
        "convert": [path, "a.beton"],
        "eval": [path, "--data", str(Path(__file__).parent)],
        "export": [path, "a.safetensors"],
        "corrupt": [path, "a"],
    }
    main = importlib.import_module(f"fap.cli.{name}").main
    assert main(words[name]) == 1
    said = capsys.readouterr().err
    assert "File name too long" in said or "no images under" in said
    assert len(said) < 800


def test_no_memory_for_a_checkpoint_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(formats, "export", full)
    assert export.main(["a.safetensors", "b.safetensors"]) == 1
    assert capsys.readouterr().err == "fap-export: a.safetensors: not enough memory for it\n"
