"""Standard output and error that may fail: a full disk or a closed pipe never costs the work."""

import contextlib
import os
import sys
from typing import Any, TextIO

MOST_SAID = 600  # characters of an error of the operating system


class Surviving:
    """A text stream whose `write` and `flush` never raise; all else is the stream's own.

    After the first failure nothing more is written. The failed text is dropped with its file
    descriptor, because Python would try to write it again, and fail, when the process ends.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost = False

    def write(self, text: str) -> int:
        if not self.lost:
            try:
                self.stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if not self.lost:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _give_up(self, error: Exception) -> None:
        self.lost = True
        with contextlib.suppress(OSError, ValueError):
            descriptor = self.stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
        if self is sys.stdout:
            warning = f"warning: standard output is lost ({error}); the work goes on"
            print(warning, file=sys.stderr, flush=True)


def told(error: BaseException) -> str:
    """An error's text for a message; the middle of a very long path is left out."""
    text = str(error)
    if isinstance(error, OSError) and len(text) > MOST_SAID:
        half = MOST_SAID // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return text


def survive() -> None:
    """Make `sys.stdout` and `sys.stderr` survive. What their encoding lacks is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before we were started: `command >&-`
            stream = open(os.devnull, "w")  # noqa: SIM115
        if not isinstance(stream, Surviving):
            with contextlib.suppress(AttributeError):  # a test's stream
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, Surviving(stream))
