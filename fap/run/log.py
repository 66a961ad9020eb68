"""What a run tells: metrics.jsonl, TensorBoard, and progress.

Progress is a bar or, where there is no terminal, plain lines.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from pipelines.extras import needs

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Log:
    """The log of one run in `folder`, continued after step `done` of `steps`.

    A full disk costs records, never the run. Shown as progress: `progress(values)`, and when the
    last step is due.
    """

    def __init__(
        self,
        folder: str | Path,
        done: int,
        steps: int,
        *,
        quiet: bool = False,  # of ranks > 0: no log at all
        out: TextIO | None = None,  # None: standard output
    ):
        self.done = done
        self.steps = steps
        self.started = time.monotonic()
        self._out = out
        file: str | Path = Path(folder) / "metrics.jsonl"
        if quiet:
            self._out = open(os.devnull, "w")  # noqa: SIM115
            file = os.devnull
        self.file = open(file, "ab", buffering=0)  # noqa: SIM115
        if not quiet:
            trim(file, done)
        # disable=None: no bar where there is no terminal, whose log a repainted bar would fill.
        self.bar: tqdm[Any] = tqdm(
            total=steps, initial=done, file=self.out, disable=None, unit="step", dynamic_ncols=True
        )
        self.board: SummaryWriter | None = None
        if not quiet:
            try:
                self.board = _board(Path(folder) / "tensorboard", done + 1)
            except (OSError, ImportError) as error:
                self.say(f"warning: no TensorBoard: {error}")

    @property
    def out(self) -> TextIO:
        """Looked up whenever it is used: `fap.cli.output` may have replaced standard output."""
        return self._out or sys.stdout

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of the steps since the last call: recorded, and shown as progress."""
        self.record(step, values, "steps")
        if not self.bar.disable:
            self.bar.set_postfix_str(progress(values), refresh=False)
            self.advance(step)
            return
        seconds_per_step = (time.monotonic() - self.started) / max(1, step - self.done)
        seconds_left = tqdm.format_interval(seconds_per_step * (self.steps - step))
        self.say(f"step {step}/{self.steps}  {progress(values)}  ETA {seconds_left}")

    def advance(self, step: int) -> None:
        """Move the bar, if there is one; cheap enough for every step."""
        self.bar.update(step - self.bar.n)

    def say(self, message: str) -> None:
        """A line for the user; the bar stays below it."""
        self.bar.write(message, file=self.out)
        self.out.flush()

    def close(self) -> None:
        """Never raises: whatever could not be closed, the run is over."""
        for close in (self.file.close, self._close_board, self.bar.close):
            try:
                close()
            except Exception as error:
                self.say(f"warning: the log was not closed properly: {error}")

    def record(self, step: int, values: Mapping[str, float], group: str = "epochs") -> None:
        """Metrics of an epoch: recorded only. `group` heads their names in TensorBoard."""
        numbers: dict[str, float | None] = {"step": step}
        for name, value in values.items():
            numbers[name] = None  # JSON has no NaN and no infinity
            if math.isfinite(value):
                numbers[name] = float(value)
        self._append(json.dumps(numbers).encode() + b"\n", step)
        for name, value in values.items():
            self._on_board("add_scalar", f"{group}/{name}", float(value), step)

    def _append(self, line: bytes, step: int) -> None:
        end = None
        try:
            end = self.file.seek(0, os.SEEK_END)
            if self.file.write(line) < len(line):
                raise OSError("only a part of it could be written")
        except OSError as error:
            if end is not None:
                with contextlib.suppress(OSError):
                    self.file.truncate(end)  # half a record would spoil the next one
            self.say(f"warning: no record of step {step} in {self.file.name}: {error}")

    def _on_board(self, method: str, *args: Any) -> None:
        try:
            if self.board is not None:
                getattr(self.board, method)(*args)
        except Exception as error:  # of its thread, which does not come back
            self.board = None
            self.say(f"warning: TensorBoard is off from here on: {error}")

    def _close_board(self) -> None:
        self._on_board("close")


def _board(folder: Path, first_step: int) -> "SummaryWriter":
    """TensorBoard's records in `folder`, those of `first_step` and later dropped.

    Raises OSError, and ImportError if TensorBoard is missing.
    """
    with needs("tensorboard", "it"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder), purge_step=first_step)


def progress(values: Mapping[str, float]) -> str:
    """`epoch 1.25  clean 2.301 45.0%  noise ...  1,234 image passes/s`, of the values there are."""
    parts = []
    if "epoch" in values:
        parts.append(f"epoch {values['epoch']:.2f}")
    for kind in ("clean", "noise", "adv"):
        if f"loss_{kind}" in values:
            parts.append(f"{kind} {values[f'loss_{kind}']:.3f} {values[f'acc_{kind}']:.1%}")
    if "image_passes_per_second" in values:
        parts.append(f"{values['image_passes_per_second']:,.0f} image passes/s")
    return "  ".join(parts)


def trim(path: str | Path, step: int) -> None:
    """Cut a metrics.jsonl before the first record of a later step or the first torn one."""
    kept_bytes = 0
    with open(path, "rb") as lines:
        for line in lines:
            if not line.endswith(b"\n") or not _is_record_until(step, line):
                break
            kept_bytes += len(line)
    os.truncate(path, kept_bytes)


def _is_record_until(step: int, line: bytes) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, LookupError, TypeError):  # no record at all
        return False
