"""What `fap-train` says of failures, and how it starts itself again after one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fap import distributed
from fap.cli import train as cli
from fap.distributed import Ranks
from fap.run import train
from fap.step.graph import FreshProcessNeeded
from fap.step.step import Step
from tests.run.runs import (
    command,
    environment,
    fail_in_the_first_step,
    fail_on_a_full_disk,
    fail_without_the_package,
    steps_recorded,
    words,
)


def fail_as_gloo_does(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561]"

    def gone(step: Step) -> None:
        raise RuntimeError(f"{place} Connection closed by peer\nand more")

    monkeypatch.setattr(Step, "__call__", gone)


OUT_OF_MEMORY = "out of memory: CUDA out of memory\nremedies: fewer optim.clean_batch rows"


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (fail_in_the_first_step, OUT_OF_MEMORY),
        (fail_as_gloo_does, "another rank is gone, its own output says why ([/pytorch"),
        (fail_without_the_package, "pipeline = 'reference' needs a package that is missing"),
        (fail_on_a_full_disk, "[Errno 28] No space left on device\n"),
    ],
)
def test_the_environments_faults_are_a_message(
    breaks: Callable[[pytest.MonkeyPatch], None],
    says: str,
    tiny_beton: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    breaks(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        cli.main(words(tiny_beton, tmp_path))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"fap-train: {says}")
    assert list(tmp_path.iterdir()) == []


def test_our_own_faults_keep_their_traceback(
    tiny_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(step: Step) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Step, "__call__", wrong)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        cli.main(words(tiny_beton, tmp_path))


@pytest.mark.slow
def test_no_room_at_all_is_a_message(tiny_beton: Path, tmp_path: Path) -> None:
    """Not even for what torch writes when it is imported."""
    done = subprocess.run(
        ["prlimit", "--fsize=0", *command(*words(tiny_beton, tmp_path))],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("fap-train: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- a fresh process

FAILS_ONCE = """
import os, sys
from pathlib import Path

import fap.run.train
from fap.cli.train import main
from fap.step.graph import FreshProcessNeeded

starts, runner = Path(sys.argv.pop(1)), fap.run.train.runner
settings = ["run.graph=off", "run.norm_kernel=framework"]

def failing(step, mode):
    with starts.open("a") as file:
        print(os.getpid(), mode, step.network.norm_state.kernel, file=file)
    if mode == "auto":
        raise FreshProcessNeeded("the capture failed (made up)", *settings)
    return runner(step, mode)

fap.run.train.runner = failing
main()
"""


@pytest.mark.slow
def test_a_run_goes_on_in_a_fresh_process(tiny_beton: Path, tmp_path: Path) -> None:
    """The first start cannot go on; it is replaced, with the same arguments and more.

    The second one finishes the run.
    """
    script = tmp_path / "fails_once.py"
    starts = tmp_path / "starts"
    script.write_text(FAILS_ONCE)
    arguments = words(tiny_beton, tmp_path / "runs", "run.max_steps=3", "seed=7")
    done = subprocess.run(
        [sys.executable, str(script), str(starts), *arguments],
        env=environment() | {"PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = (line.split() for line in starts.read_text().splitlines())
    assert first[1:] == ["auto", "auto"]
    assert second[1:] == ["off", "framework"]
    assert first[0] == second[0]  # replaced, not a child
    settings = "run.graph=off run.norm_kernel=framework resume=auto"
    said = [line for line in done.stderr.splitlines() if "fap-train" in line]
    assert said == [
        f"fap-train: the capture failed (made up); a fresh process goes on with {settings}"
    ]
    folder = tmp_path / "runs" / "fast_advprop" / "seed7"
    assert json.loads((folder / "result.json").read_text())["steps"] == 3
    assert [r["step"] for r in steps_recorded(folder)] == [1, 2, 3]
    assert "done: top-1" in done.stdout


class Ended(Exception):  # noqa: N818
    pass


class Replaced(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("world", [1, 2])
def test_only_a_run_of_one_rank_starts_itself_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world: int
) -> None:
    class Failing:
        def __init__(self, *_: object) -> None:
            raise FreshProcessNeeded("the capture failed", "run.graph=off")

    def end(code: int) -> None:
        raise Ended(code)

    def execv(*args: object) -> None:
        raise Replaced(*args)

    monkeypatch.setattr(train, "Run", Failing)
    monkeypatch.setattr(distributed, "connect", lambda: Ranks(0, world, 0))
    monkeypatch.setattr(Ranks, "gather", lambda ranks, fact: [fact] * ranks.world)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(os, "_exit", end)
    if world == 1:
        given = ["run.graph=auto", "--pipeline", "dali"]
        with pytest.raises(Replaced) as replaced:
            cli.main(given)
        program, arguments = replaced.value.args
        assert program == sys.executable
        more = ["run.graph=off", "resume=auto"]
        assert arguments == [sys.executable, "-m", "fap.cli.train", *given, *more]
    else:
        with pytest.raises(Ended, match="1"):
            cli.main(["run.graph=auto"])
        advice = "start again with run.graph=off resume=auto"
        said = f"fap-train: the capture failed; this process cannot go on: {advice}\n"
        assert capsys.readouterr().err == said
