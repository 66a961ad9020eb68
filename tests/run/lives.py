"""The life of a run, drawn from a seed: what happens to runs on real machines, in any order.

A life is a list of events. Each starts `fap-train ... resume=auto` on the same run, or does
something to its files first. Two rules judge it: a start that must be refused is refused, with exit
code 1, the reason and no traceback, and changes nothing; and after all that the last start ends
with the weights of a run that nothing happened to. Used by test_lives.py.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fap.signals import SIGNALS
from tests.run.runs import RUN, command, environment, final_state, words

PATIENCE_S = 600  # for one start of a run that takes seconds; on a busy machine a minute


class Life:
    """One run of `data` in `folder`; `other` is another data set of the same shape and count."""

    def __init__(self, seed: int, data: Path, other: Path, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.other = other
        self.folder = folder
        self.runs = folder / "runs"
        self.run = self.runs / RUN
        self.data = folder / "data0" / "train.beton"  # ours: events move it and replace it
        self.data.parent.mkdir(parents=True)
        shutil.copyfile(data, self.data)
        self.story: list[str] = []

    # ------------------------------------------------------------------ starting it

    def start(self, *more: str, out: str = "") -> subprocess.Popen[str]:
        """`out` is a redirection, as in a shell."""
        settings = ("resume=auto", "run.checkpoint_every=1", "run.keep=3", *more)
        argv = command(*words(self.data, self.runs, *settings))
        if out:
            argv = ["sh", "-c", f'exec "$@" {out}', "sh", *argv]
        return subprocess.Popen(
            argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ends(self, process: subprocess.Popen[str], *codes: int) -> str:
        """Wait for its end, with one of the exit codes and no traceback; returns what it said."""
        try:
            said, _ = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"hangs: {process.args}") from None
        assert process.returncode in codes, f"exit code {process.returncode}, not {codes}:\n{said}"
        assert "Traceback" not in said, said
        return said

    def checkpoints(self) -> list[Path]:
        """Those that are files, oldest first; an obstacle that is named like one is not."""
        named = (self.run / "checkpoints").glob("step_*.safetensors")
        return sorted(path for path in named if path.is_file())

    def step(self) -> int:
        """The newest checkpoint's step, 0 without one."""
        return max((step_of(path) for path in self.checkpoints()), default=0)

    def past(self, process: subprocess.Popen[str], step: int) -> None:
        """Wait until it has saved a step after `step`, or has ended."""
        until = time.monotonic() + PATIENCE_S
        while process.poll() is None and self.step() <= step:
            assert time.monotonic() < until, "hangs"
            time.sleep(0.02)

    def snapshot(self) -> dict[str, bytes]:
        """All files of the run, but for its lock."""
        files = (path for path in sorted(self.run.rglob("*")) if path.is_file())
        return {str(path): path.read_bytes() for path in files if path.name != ".lock"}

    def refused(self, reason: str, *more: str) -> None:
        before = self.snapshot()
        said = self.ends(self.start(*more), 1)
        assert reason in said, said
        assert self.snapshot() == before

    # ------------------------------------------------------------------ what may happen

    def killed(self) -> None:
        before = self.step()
        process = self.start()
        self.past(process, before)
        time.sleep(self.rng.uniform(0, 0.2))
        process.kill()
        process.communicate()

    def stopped(self) -> None:
        """Asked to stop, perhaps twice and by different signals, as schedulers do."""
        before = self.step()
        process = self.start()
        self.past(process, before)
        sent = [self.rng.choice(SIGNALS) for _ in range(self.rng.choice((1, 1, 2)))]
        if sent[1:] == [signal.SIGINT]:
            sent[1] = signal.SIGTERM  # a second Ctrl-C means now
        for number in sent:
            process.send_signal(number)
            time.sleep(self.rng.uniform(0, 0.1))
        saved = [128 + number for number in sent]
        # A signal that comes after the last step may meet a process that is no longer a run's.
        killed = [-number for number in sent]
        said = self.ends(process, 0, *saved, *killed)
        if process.returncode > 0 and "done: top-1" not in said:
            assert "continue with resume=auto" in said, said
        elif process.returncode < 0:
            assert "done: top-1" in said, said

    def max_steps(self) -> None:
        self.ends(self.start(f"run.max_steps={self.step() + self.rng.randint(1, 4)}"), 0)

    def output_lost(self) -> None:
        out = self.rng.choice([">/dev/full", ">&-", ">/dev/full 2>/dev/full"])
        before = self.step()
        self.ends(self.start(f"run.max_steps={before + 2}", out=out), 0)
        assert self.step() >= before

    def reader_leaves(self) -> None:
        process = self.start(f"run.max_steps={self.step() + 3}")
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE_S) == 0

    def data_moved(self) -> None:
        """A copy on another disk of the job's machine."""
        moved = self.folder / f"data{self.rng.randrange(1 << 30)}" / "copy.beton"
        moved.parent.mkdir()
        self.data.rename(moved)
        self.data = moved
        self.max_steps()

    def data_replaced(self) -> None:
        if not self.step():
            return
        kept = self.data.read_bytes()
        shutil.copyfile(self.other, self.data)
        self.refused("data.train")
        self.data.write_bytes(kept)

    def config_changed(self) -> None:
        if not self.step():
            return
        changes = [
            "optim.lr=0.3",
            "data.flip=0.25",
            "method.eps_255=3",
            "model.name=cifar_resnet14",
        ]
        change = self.rng.choice(changes)
        self.refused(change.partition("=")[0], change)

    def two_at_once(self) -> None:
        first = self.start()
        self.past(first, self.step())
        if first.poll() is None:
            said = self.ends(self.start(), 0, 1)  # 0: the first one had ended by then
            assert "another process" in said or first.poll() is not None, said
        first.terminate()
        self.ends(first, 0, 128 + signal.SIGTERM, -signal.SIGTERM)

    def obstacles(self) -> None:
        """Things named like checkpoints, or left behind by killed writers."""
        folder = self.run / "checkpoints"
        if not folder.is_dir():
            return
        name = f"step_{self.rng.randint(100, 999):08d}.safetensors"  # far ahead of the run
        match self.rng.choice(("folder", "link", "pipe", "stale")):
            case "folder":
                (folder / name).mkdir()
            case "link":
                (folder / name).symlink_to("nowhere")
            case "pipe":
                os.mkfifo(folder / name)
            case "stale":
                (folder / f".{name}.tmp").write_bytes(bytes(1000))

    def newest_damaged(self) -> None:
        """One bit of the newest of several checkpoints; the one before takes over."""
        files = self.checkpoints()
        if len(files) < 2:
            return
        newest = files[-1]
        content = bytearray(newest.read_bytes())
        content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        newest.write_bytes(content)
        said = self.ends(self.start(f"run.max_steps={step_of(newest)}"), 0)
        assert "damaged" in said, said

    EVENTS: tuple[Callable[[Life], None], ...] = (
        killed,
        stopped,
        max_steps,
        output_lost,
        reader_leaves,
        data_moved,
        data_replaced,
        config_changed,
        two_at_once,
        obstacles,
        newest_damaged,
    )

    # ------------------------------------------------------------------ the life

    def live(self, events: int, expected: dict[str, torch.Tensor]) -> None:
        for _ in range(events):
            event = self.rng.choice(self.EVENTS)
            self.story.append(f"{event.__name__} at step {self.step()}")
            event(self)
        self.story.append("the last start")
        self.ends(self.start(), 0)
        found = final_state(self.run)
        assert found.keys() == expected.keys()
        different = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not different, f"other weights than those of an undisturbed run: {different[:3]}"


def step_of(checkpoint: Path) -> int:
    """5 of `step_00000005.safetensors`."""
    return int(checkpoint.stem.removeprefix("step_"))
