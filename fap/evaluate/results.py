"""Results of finished sets, each a small file, found again by what it was computed from."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fap.tasks.base import Result, Task
from pipelines.files import read_regular, write_whole

MOST_BYTES = 1 << 16  # of one result
# What reading, parsing and checking raise where a file is not what `Results.keep` wrote.
NO_RESULT = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def digest(of: Any) -> str:
    """64 hex digits that say what a JSON value is, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()


def safe_name(text: str) -> str:
    """A file name of at most 100 plain characters.

    `text` may be anything: a run's name comes out of a checkpoint, which may be a stranger's.
    """
    return re.sub(r"[^A-Za-z0-9_-]", "_", text[:100]) or "_"


class Results:
    """The results kept in `folder`. Processes may share it: a file is written once and whole."""

    def __init__(self, folder: Path, say: Callable[[str], Any]) -> None:
        """`say` is told of what cannot be read or written: it costs time, never a result."""
        self.folder = folder
        self.say = say

    def find(
        self,
        name: str,
        of: dict[str, Any],  # JSON: all that the result depends on
        count: int,  # images
        task: Task,
    ) -> Result | None:
        """The result computed from exactly `of`; None where there is none, or a damaged one."""
        file = self._file(name, of)
        try:
            return _checked(json.loads(read_regular(file, MOST_BYTES)), digest(of), count, task)
        except FileNotFoundError:
            return None
        except NO_RESULT as error:
            why = str(error)[:200]
            self.say(f"warning: {file} is no result ({why}); the set is evaluated again")
            return None

    def keep(self, name: str, of: dict[str, Any], result: Result) -> None:
        """Write a result for `find`, which is to be asked with the same `name` and `of`."""
        content = {"of": digest(of), "set": name, "result": result}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._file(name, of), [json.dumps(content, indent=1).encode()])
        except OSError as error:
            self.say(f"warning: the result of {name} cannot be kept for a later call: {error}")

    def _file(self, name: str, of: dict[str, Any]) -> Path:
        return self.folder / f"{safe_name(name.replace('/', '-'))}-{digest(of)[:16]}.json"


def _checked(tree: Any, of: str, count: int, task: Task) -> Result:
    """A result out of a file. Raises one of `NO_RESULT` for anything else."""
    if tree["of"] != of:
        raise ValueError("it was computed from something else")
    metrics = dict(tree["result"])
    found = metrics.pop("count")
    if type(found) is not int or found != count:
        raise ValueError("another number of images")
    return task.check_metrics(metrics) | {"count": count}
