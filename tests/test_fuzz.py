"""Damaged input of every kind, worked through in processes of their own.

fuzz.py says what may happen and what may not.
"""

import re
import secrets
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fap.config import load_config
from tests.soak_results import record

WORKER = [sys.executable, str(Path(__file__).with_name("fuzz.py"))]
BATCH = 500  # inputs of one process
MOST_WRONG = 10  # then it is enough
HANG_S = 600  # an input takes seconds, the first one of a process longer
TARGETS = {
    "beton",
    "planes",
    "sidecar",
    "folder",
    "convert",
    "checkpoint",
    "config",
    "metadata",
    "tree",
    "images",
    "no_file",
    "annotations",
    "archive",
    "weights",
}


def work_through(first: int, count: int, hang_s: int = HANG_S) -> tuple[Counter[str], list[str]]:
    """How often each target passed, and what went wrong.

    After a crash or a hang the next process takes over.
    """
    passed = Counter[str]()
    wrong: list[str] = []
    seed = first
    while seed < first + count and len(wrong) < MOST_WRONG:
        batch = min(BATCH, first + count - seed)
        options = ["--seed", str(seed), "--count", str(batch), "--hang", str(hang_s)]
        done = subprocess.run([*WORKER, *options], capture_output=True, text=True, timeout=3600)
        lines = done.stdout.splitlines()
        passed.update(re.findall(r"^ok \S+ fuzz_(\w+)", done.stdout, re.M))
        for line in lines:
            if line.startswith("bad"):
                wrong.append(line.encode().decode("unicode_escape"))
        assert lines, done.stderr
        outcome, last, *_ = lines[-1].split()
        seed = int(last)
        if outcome == "start":
            said = done.stderr[-2000:]
            wrong.append(f"crash or hang, exit code {done.returncode}: {said}\nbad {seed}")
        seed += 1
    return passed, wrong


def explain(wrong: list[str]) -> str:
    return "\n".join([*wrong, "replay: python tests/fuzz.py --seed N"])


@pytest.mark.slow
def test_500_damaged_inputs() -> None:
    passed, wrong = work_through(0, 500)
    assert not wrong, explain(wrong)
    assert passed.keys() == TARGETS
    assert passed.total() == 500


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "hang_s", "says"),
    [
        (-1, HANG_S, "Aborted"),
        (-2, 2, "Timeout"),
        (-3, HANG_S, "reference: sample 0 shows sample 1"),
    ],
)
def test_the_fuzzer_notices(seed: int, hang_s: int, says: str) -> None:
    _, (wrong,) = work_through(seed, 1, hang_s)
    assert says in wrong
    assert f"bad {seed}" in wrong


HOSTILE_OVERRIDES = [
    "seed=!!bool x",
    "seed=!!int x",
    "seed=!!timestamp x",
    "seed=2001-99-99",
    "seed=0x_",
    "seed=" + "9" * 5000,
    "method.p_adv=1e99999999",
    "method.p_adv=" + "9" * 5000,
    "method.group_rows=yes",
    "seed=" + "[" * 5000,
    "method.name=[1]",
    "method.name={}",
]


@pytest.mark.parametrize("override", HOSTILE_OVERRIDES, ids=lambda override: override[:20])
def test_every_value_is_an_error_that_names_its_field(override: str) -> None:
    with pytest.raises(ValueError, match=override.partition("=")[0]):
        load_config(None, [override])


@pytest.mark.soak
def test_10000_damaged_inputs() -> None:
    first = secrets.randbelow(1 << 40)
    passed, wrong = work_through(first, 10_000)
    figures = {
        "first_seed": first,
        "passed": dict(sorted(passed.items())),
        "wrong": [text[-300:] for text in wrong],
    }
    record("fuzz", figures)
    assert not wrong, explain(wrong)
    assert passed.total() == 10_000
