"""The GPU suite: its cells exist and are in order, and what fails stops nothing.

Then what smoke calls wrong, the table of what was found, and a dry run of all of it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from bench import step as bench_step
from bench.evidence.arms import ARMS
from bench.gpu import smoke, suite
from bench.gpu.cells import REAL, TOY, Cell, cells, command
from bench.gpu.study import STUDY
from bench.gpu.suite import Suite
from bench.gpu.table import TARGETS, Target, table
from fap.config import load_config

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.14.1", "commit": "abc"}


# ------------------------------------------------------------------ the cells


@pytest.mark.parametrize("sizes", [REAL, TOY])
def test_names_are_unique_and_every_target_has_its_cells(sizes):
    names = [c.name for c in cells(sizes, Path("images"))]
    assert len(names) == len(set(names))
    assert {c for t in TARGETS for c in t.cells} <= set(names)


def test_order_of_value():
    """First contact, tests, then all that a target hangs on; the study last.

    The JPEGs come before the loaders.
    """
    names = [c.name for c in cells(REAL, Path("images"))]
    sorts = [name.split("/")[0] for name in names]
    assert sorts[:8] == ["smoke"] * 6 + ["photos", "tests"]
    assert names[8:12] == [target.cells[0] for target in TARGETS[:4]]
    last_target = max(names.index(c) for t in TARGETS for c in t.cells)
    others = [n for n in names if (n.startswith("parity/") and n.endswith("whole")) or "bf16" in n]
    assert last_target < min(names.index(name) for name in others)
    assert names[-1] == "study"
    loaders = [i for i, sort in enumerate(sorts) if sort in ("loaders", "loader")]
    assert names.index("photos") < min(loaders)


def test_each_step_cell_names_one_contender(monkeypatch):
    """`--only` takes a part of a name; two matches would make the table refuse the cell."""
    monkeypatch.setattr(bench_step, "GPU", True)
    for cell in cells(REAL, Path("images")):
        if not cell.name.startswith("step/"):
            continue
        word = cell.words[cell.words.index("--only") + 1]
        options = Namespace(
            model="cifar_resnet8",
            rows=64,
            size=8,
            amp="fp16",
            compile="--compile" in cell.words,
            compile_backend="inductor",
        )
        names = [contender.name for contender in bench_step.contenders(options)]
        assert len([n for n in names if word in n]) == 1, (word, names)


def test_the_words_of_a_command():
    words = command("bench.x", a_b=1, on=True, off=False, several=("c", "d e"))
    assert words == ("bench.x", "--a-b", "1", "--on", "--no-off", "--several", "c", "d e")


def test_the_modules_the_tests_and_the_study_s_configs_exist():
    for sizes in (REAL, TOY):
        assert (ROOT / sizes.tests).exists(), sizes.tests
    modules = {cell.words[0] for cell in cells(REAL, Path("images"))} - {"pytest"}
    for module in modules:
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file(), module
    for module in suite.PRELOADED:
        assert suite.importable(module), module
    for run in STUDY.runs():
        config = ARMS[run.arm].config
        assert load_config(ROOT / "configs" / "cifar10" / f"{config}.yaml").name == config


def test_targets_and_profile_fit_into_nine_minutes_by_their_usual_times():
    usual = 0.0
    for cell in cells(REAL, Path("images")):
        if not cell.at_once:
            usual += cell.usual_s
        if cell.name == "step/256/torchvision reference":
            break
    assert usual + 20 < 540


# ------------------------------------------------------------------ running them


def python(name: str, code: str, limit_s: int = 60, **more) -> Cell:
    """A cell that runs a few lines: `code` sees the folder for results as `out`."""
    return Cell(name, ("tests.run_lines", code), limit_s, 0, **more)


HEAD = "import json, os, pathlib, sys, time\nout = pathlib.Path(sys.argv[-1])\n"


def spawned(words: list[str], log: Path) -> subprocess.Popen:
    """As the suite's, of a cell made by `python`."""
    with log.open("wb") as stream:
        command = [sys.executable, "-c", HEAD + words[1], *words[2:]]
        return subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )


@pytest.fixture
def lines(monkeypatch):
    """Lets cells run lines of Python instead of a module."""
    monkeypatch.setattr(suite, "spawned", spawned)


def write(content: str) -> str:
    return f"(out / 'x.json').write_text(json.dumps({content}))"


GOOD = write("{'environment': 1, 'results': [{'figure': 3}]}")


def run(tmp_path, *chosen: Cell, seconds: float = 100) -> dict:
    Suite(chosen, tmp_path, seconds, False, tmp_path / "cells").run()
    found = json.loads((tmp_path / "suite.json").read_text())
    assert (tmp_path / "table.md").read_text()
    return {c["cell"]: c for c in found["cells"]}


def test_a_cell_that_fails_says_why_and_stops_nothing(tmp_path, lines):
    found = run(
        tmp_path,
        python("good", GOOD),
        python("raises", "raise TypeError('no such kernel')"),
        python("segfault", "os.kill(os.getpid(), 11)"),
        python("error inside", write("{'results': [{'error': 'OutOfMemoryError: full'}]}")),
        python("silent", "pass"),
        python("absent", GOOD, needs=("no_such_package.inside",)),
        python("no JSON wanted", "print('done')", results=False),
        python("good again", GOOD),
    )
    states = {name: record["state"] for name, record in found.items()}
    assert states == {
        "good": "measured",
        "raises": "failed",
        "segfault": "failed",
        "error inside": "failed",
        "silent": "failed",
        "absent": "not measured",
        "no JSON wanted": "measured",
        "good again": "measured",
    }
    assert found["good"]["found"] == {"x": {"results": [{"figure": 3}]}}
    assert found["raises"]["why"] == "exit status 1: TypeError: no such kernel"
    assert found["segfault"]["why"].startswith("exit status -11")
    assert found["error inside"]["why"] == "OutOfMemoryError: full"
    assert found["silent"]["why"] == "it measured nothing"
    assert found["absent"]["why"] == "no_such_package.inside is not installed"


@pytest.mark.slow
def test_a_cell_that_hangs_is_ended_with_all_it_started(tmp_path, lines, monkeypatch):
    child = (
        "import subprocess; p = subprocess.Popen(['sleep', '600']); "
        "(out / 'part').write_text(str(p.pid)); (out / 'part').rename(out / 'pid'); time.sleep(600)"
    )
    file = tmp_path / "cells" / "hangs" / "pid"

    def clock() -> float:
        """An hour passes as soon as the cell hangs, however long it takes to start."""
        return time.monotonic() + 3600 * file.exists()

    fake = SimpleNamespace(monotonic=clock, sleep=time.sleep)
    monkeypatch.setattr(suite, "time", fake)
    found = run(tmp_path, python("hangs", child), python("good", GOOD), seconds=10_000)
    assert found["hangs"]["state"] == "failed"
    assert "ended after 60 s" in found["hangs"]["why"]
    assert found["good"]["state"] == "measured"
    pid = int(file.read_text())
    deadline = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < deadline, "the cell's child is still alive"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    state = stat.rpartition(")")[2].split()[0]
    return state != "Z"  # nobody may have waited for it yet


def test_half_a_file_of_a_cell_that_was_ended_is_no_result(tmp_path, lines):
    torn = "(out / 'x.json').write_text('{\"results\": [{')"
    found = run(tmp_path, python("torn", torn), python("good", GOOD))
    assert found["torn"]["why"] == "it measured nothing"
    assert found["good"]["state"] == "measured"


def test_what_no_longer_fits_is_left_out_and_shorter_cells_still_run(tmp_path, lines):
    long = Cell("long", ("x", GOOD), 60, usual_s=1000)
    found = run(tmp_path, long, python("short", GOOD), seconds=50)
    assert found["long"]["state"] == "not measured"
    assert "it takes about 1000 s" in found["long"]["why"]
    assert found["short"]["state"] == "measured"


def test_only_cells_without_timing_run_beside_each_other(tmp_path, lines):
    begins = "(out.parent / f'{out.name}.begin').write_text(str(time.time()))"
    ends = "(out.parent / f'{out.name}.end').write_text(str(time.time()))"
    note = f"{begins}; {GOOD}; {ends}"
    # Each look waits until all have begun.
    meet = "\nwhile len([*out.parent.glob('look*.begin')]) < 3: time.sleep(0.01)\n"
    look = f"{begins}{meet}{GOOD}; {ends}"
    chosen = [python(f"look{i}", look, at_once=True) for i in range(3)]
    chosen += [python(f"timed{i}", note) for i in range(2)]
    run(tmp_path, *chosen)

    def when(name: str) -> tuple[float, float]:
        begin = (tmp_path / "cells" / f"{name}.begin").read_text()
        end = (tmp_path / "cells" / f"{name}.end").read_text()
        return float(begin), float(end)

    looks = [when(f"look{i}") for i in range(3)]
    assert max(begin for begin, _ in looks) < min(end for _, end in looks)
    assert when("timed0")[0] > max(end for _, end in looks)
    assert when("timed1")[0] > when("timed0")[1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_suite_keeps_what_it_has_and_leaves_nothing_running(tmp_path, number, code):
    script = f"""
import pathlib, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from argparse import Namespace
from bench.gpu import suite
from tests.bench.test_gpu_suite import ENVIRONMENT, GOOD, python, spawned
suite.spawned = spawned
suite.environment = lambda: ENVIRONMENT
torch.cuda.is_available = lambda: True
out = pathlib.Path({str(tmp_path)!r})
chosen = [python("good", GOOD), python("hangs", "time.sleep(600)"), python("never", GOOD)]
sys.exit(suite.measure(chosen, Namespace(dry_run=False, out=out, seconds=1000), out / "cells"))
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 600
    while not (tmp_path / "cells" / "hangs" / "log.txt").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code
    assert "what was measured is in" in said
    found = json.loads((tmp_path / "suite.json").read_text())
    assert [(c["cell"], c["state"]) for c in found["cells"]] == [("good", "measured")]
    assert found["not_reached"] == ["hangs", "never"]
    assert "- never: not reached" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_cell_that_is_just_starting_is_ended_too(tmp_path, lines, monkeypatch, number):
    """The signal comes when the process is there, and the suite has not noted it yet."""
    started = []

    def start(words: list[str], log: Path) -> subprocess.Popen:
        started.append(spawned(words, log))
        signal.raise_signal(number)
        return started[0]

    monkeypatch.setattr(suite, "spawned", start)
    before = signal.getsignal(signal.SIGTERM)
    try:
        chosen = [python("hangs", "time.sleep(600)"), python("never", GOOD)]
        arguments = Namespace(dry_run=False, out=tmp_path, seconds=1000)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert suite.measure(chosen, arguments, tmp_path / "cells") == 128 + number
    finally:
        signal.signal(signal.SIGTERM, before)
    (process,) = started
    assert process.wait(60) == -signal.SIGKILL
    assert json.loads((tmp_path / "suite.json").read_text())["not_reached"] == ["hangs", "never"]


def test_a_table_that_cannot_be_made_loses_no_figure(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(suite, "table", mock.Mock(side_effect=KeyError("whole_run")))
    found = run(tmp_path, python("good", GOOD))
    assert found["good"]["state"] == "measured"
    assert "KeyError" in (tmp_path / "table.md").read_text()


def test_a_full_disk_costs_a_record_and_not_the_suite(tmp_path, lines, monkeypatch, capsys):
    real = Path.write_text
    failures = []

    def full(path, *arguments, **more):
        if path.name == "suite.json.part" and len(failures) < 2:
            failures.append(path)
            raise OSError(28, "No space left on device")
        return real(path, *arguments, **more)

    monkeypatch.setattr(Path, "write_text", full)
    found = run(tmp_path, python("good", GOOD), python("good again", GOOD))
    assert len(failures) == 2
    assert {c["state"] for c in found.values()} == {"measured"}
    assert "No space left" in capsys.readouterr().out


def test_a_closed_pipe_ends_the_lines_and_not_the_suite(tmp_path, lines, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert run(tmp_path, python("good", GOOD))["good"]["state"] == "measured"


def test_out_that_is_a_file_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "file").write_text("")
    assert suite.main(["--out", str(tmp_path / "file"), "--only", "kernels"]) == 2
    assert "give a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "state"),
    [("38 passed, 2 skipped in 60 s", "measured"), ("49 skipped in 7 s", "failed")],
)
def test_gpu_tests_that_are_all_skipped_are_no_success(tmp_path, lines, last, state):
    cell = python("tests", f"print({last!r})", results=False)
    assert run(tmp_path, cell)["tests"]["state"] == state


def test_without_a_gpu_nothing_is_claimed(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("would run the whole suite")
    assert suite.main(["--out", str(tmp_path / "out")]) == 1
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_word_that_no_cell_has_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        suite.main(["--only", "no-such-cell"])
    assert end.value.code == 2
    assert "--list shows them" in capsys.readouterr().err


def test_list_runs_nothing(capsys):
    assert suite.main(["--list", "--only", "parity/fp16/256/fused/groups"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "--schedules fused" in line


# ------------------------------------------------------------------ smoke and the table


def test_smoke_names_each_fault(monkeypatch):
    good = {"loss_clean": 2.0, "skipped": 1.0, "steps": 25.0, "how": "CUDA graph"}
    monkeypatch.setattr(smoke, "GPU", True)
    assert smoke.faults(good) == []
    for change, word in (
        ({"loss_clean": float("nan")}, "nan"),
        ({"skipped": 20.0}, "skipped"),
        ({"how": "eager"}, "eager"),
        ({"how": "CUDA graph, framework norm"}, "framework norm"),
    ):
        (sentence,) = smoke.faults(good | change)
        assert word in sentence


@pytest.mark.parametrize(
    ("bound", "at_least", "figure", "verdict"),
    [
        (1.02, False, (1.00, 0.99, 1.01), "met"),
        (1.02, False, (1.02, 1.02, 1.02), "met"),
        (1.02, False, (1.05, 1.04, 1.06), "missed"),
        (1.02, False, (1.01, 0.99, 1.03), "open"),
        (1.2, True, (1.3, 1.25, 1.4), "met"),
        (1.2, True, (1.2, 1.2, 1.2), "met"),
        (1.2, True, (1.1, 1.05, 1.15), "missed"),
        (1.2, True, (1.21, 1.1, 1.3), "open"),
        (0.85, True, (0.9, 0.9, 0.9), "met"),
    ],
)
def test_a_verdict_needs_the_whole_interval(bound, at_least, figure, verdict):
    assert Target("x", bound, at_least, (), lambda _: figure).verdict(figure).startswith(verdict)


def parity_cell(name: str, ratio: float, rate: float) -> dict:
    run = {
        "passes_per_s": rate,
        "s_per_step": {"n": 3, "median": 0.08, "min": 0.08, "max": 0.08},
        "waiting_share": 0.0,
    }
    result = {
        "amp": "fp16",
        "model": "resnet50",
        "rows": 256,
        "schedule": "fused",
        "bn": "groups",
        "ours": run,
        "vanilla": run,
        "whole_run": {"ratio": ratio, "low": ratio - 0.005, "high": ratio + 0.005},
    }
    return {"cell": name, "state": "measured", "found": {"cost_parity_cuda": {"results": [result]}}}


def detection_cell(canvas: str, ratio: float, rate: float) -> dict:
    cell = parity_cell(f"detection/{canvas}", ratio, rate)
    found = cell["found"].pop("cost_parity_cuda")
    found["results"][0] |= {"model": "retinanet_resnet50_fpn", "rows": 16}
    cell["found"] = {"cost_parity_detection_cuda": found}
    return cell


def peer_cell(name: str, ratio: float) -> dict:
    result = {
        "ours": "vanilla",
        "other": name,
        "our rows/s": 5000.0,
        "other / ours": {"ratio": ratio, "low": ratio, "high": ratio},
    }
    return {"cell": name, "state": "measured", "found": {"step_cuda": {"results": [result]}}}


def test_the_table_holds_target_figure_verdict_and_share():
    measured = [
        parity_cell("parity/fp16/256/fused/groups", 1.03, 3580.0),
        peer_cell("step/256/timm-like: AMP", 1.5),
        peer_cell("step/256/torchvision reference", 3.0),
    ]
    failed = {"cell": "kernels", "state": "failed", "why": "exit status 1: no such kernel"}
    text = table(content(*measured, failed, not_reached=["study"]))
    for line in (
        "| `fused` / vanilla, whole run, 256 rows | <= 1.02 | 1.030 [1.025, 1.035] | missed |",
        # the faster of the two
        "| vanilla against the best eager peer, 256 rows | >= 1.20 | 1.500 | met |",
        "| norm kernel / bandwidth of a copy | >= 0.85 | not measured "
        "| exit status 1: no such kernel |",
        "| vanilla, resnet50, fp16, 256 rows, norm over groups | 3,580 | 50% |",
        "- study: not reached",
    ):
        assert line in text
    assert "dry run" not in text


def test_detection_stands_beside_mlperf_s_retinanet_and_not_its_resnet():
    measured = [
        parity_cell("parity/fp16/256/fused/groups", 1.03, 3580.0),
        detection_cell("640", 1.02, 435.0),
        detection_cell("800x1344", 1.20, 145.0),
    ]
    lines = table(content(*measured, not_reached=[])).splitlines()
    for line in (
        "| `fused` / vanilla, whole run, RetinaNet at 640, 16 rows | <= 1.05 "
        "| 1.020 [1.015, 1.025] | met |",
        "| `fused` / vanilla, whole run, RetinaNet at 800x1344, 16 rows | <= 1.05 "
        "| 1.200 [1.195, 1.205] | missed |",
        "| detection/640: retinanet_resnet50_fpn, fp16, 16 rows | 435 | 150% |",
        "| detection/800x1344: retinanet_resnet50_fpn, fp16, 16 rows | 145 | 50% |",
        "| detection/640 | 1.020 [1.015, 1.025] | 80.00 | 80.00 |",
    ):
        assert line in lines
    assert len([line for line in lines if "ResNeXt-50" in line]) == 1
    assert not [line for line in lines if line.startswith("| vanilla, retinanet")]
    none = table(content(parity_cell("parity/fp16/256/fused/groups", 1, 1), not_reached=[]))
    assert "ResNeXt-50" not in none


def content(*cells: dict, not_reached: list[str]) -> dict:
    """What suite.json holds."""
    return {
        "environment": ENVIRONMENT,
        "dry_run": False,
        "cells": list(cells),
        "not_reached": not_reached,
    }


def test_a_target_is_not_met_while_one_of_its_peers_is_missing():
    text = table(content(peer_cell("step/256/timm-like: AMP", 1.5), not_reached=[]))
    assert (
        "| vanilla against the best eager peer, 256 rows | >= 1.20 | not measured "
        "| not among the chosen cells |"
    ) in text


# ------------------------------------------------------------------ all of it


@pytest.mark.slow
def test_a_dry_run_measures_every_cell(tmp_path):
    """Every part of the suite at toy size: on a GPU none can fail for a wrong path or argument."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.suite", "--dry-run", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = json.loads((tmp_path / "suite.json").read_text())
    wrong = {c["cell"]: c["why"] for c in found["cells"] if c["state"] != "measured"}
    allowed = {name for name, why in wrong.items() if "is not installed" in why}  # FFCV or DALI
    assert wrong.keys() == allowed, (wrong, done.stdout[-2000:], done.stderr[-2000:])
    assert found["not_reached"] == []
    ran = [c["cell"] for c in found["cells"]]
    planned = [c.name for c in cells(TOY, tmp_path)]
    assert ran == ["study", *planned[:-1]]  # the longest first
    text = (tmp_path / "table.md").read_text()
    assert "The figures mean nothing" in text
    for target in TARGETS:
        assert f"| {target.what} |" in text
        assert f"| {target.what} | not measured" not in text
