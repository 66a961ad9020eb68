"""Results of finished sets, each a small file of its own, found again by what they were computed
from.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fap.tasks.base import Result, Task
from pipelines.files import read_regular, write_whole

MOST_BYTES = 1 << 16  # of one result


def digest(of: Any) -> str:
    """64 hex digits that say what a JSON value is, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()


def safe_name(text: str) -> str:
    """A file name of at most 100 plain characters, whatever the text: it may come out of a
    stranger's checkpoint.
    """
    return re.sub(r"[^A-Za-z0-9_-]", "_", text[:100]) or "_"


class Results:
    """The results kept in `folder`. Two processes may share it: a file is written once and whole."""

    def __init__(self, folder: Path, say: Callable[[str], Any]) -> None:
        """`say` is told of what cannot be read or written: it costs time, never a result."""
        self.folder = folder
        self.say = say

    def find(self, name: str, of: dict[str, Any], count: int, task: Task) -> Result | None:
        """The result computed from exactly `of`, on `count` images; None where there is none, or a
        damaged one.
        """
        file = self._file(name, of)
        try:
            return _checked(json.loads(read_regular(file, MOST_BYTES)), digest(of), count, task)
        except FileNotFoundError:
            return None
        except (
            OSError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            self.say(
                f"warning: {file} is no result ({str(error)[:200]}); the set is evaluated again"
            )
            return None

    def keep(self, name: str, of: dict[str, Any], result: Result) -> None:
        content = {"of": digest(of), "set": name, "result": result}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._file(name, of), [json.dumps(content, indent=1).encode()])
        except OSError as error:
            self.say(f"warning: the result of {name} cannot be kept for a later call: {error}")

    def _file(self, name: str, of: dict[str, Any]) -> Path:
        return self.folder / f"{safe_name(name.replace('/', '-'))}-{digest(of)[:16]}.json"


def _checked(tree: Any, of: str, count: int, task: Task) -> Result:
    """A result out of a file. Raises ValueError, TypeError or LookupError for anything else."""
    if tree["of"] != of:
        raise ValueError("it was computed from something else")
    found = task.check_result(tree["result"])
    if type(found["count"]) is not int or found["count"] != count:
        raise ValueError("another number of images")
    return found
