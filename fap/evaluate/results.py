"""Results of finished sets, each a small file, found again by what it was computed from."""

import base64
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fap.tasks.base import Judge, Result
from fap.tasks.class_counts import ClassCounts, table_shape
from pipelines.files import read_regular, write_whole

MOST_BYTES = 1 << 26  # of one result, counts by class included
# What reading, parsing and checking raise where a file is not what `Results.keep` wrote.
NO_RESULT = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
    zlib.error,
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
        judge: Judge,
    ) -> Result | None:
        """The result computed from exactly `of`; None where there is none, or a damaged one."""
        file = self._file(name, of)
        try:
            return _checked(json.loads(read_regular(file, MOST_BYTES)), digest(of), count, judge)
        except FileNotFoundError:
            return None
        except NO_RESULT as error:
            why = str(error)[:200]
            self.say(f"warning: {file} is no result ({why}); the set is evaluated again")
            return None

    def find_counts(
        self,
        name: str,
        of: dict[str, Any],
        result: Result,  # what `find` gave
        n_classes: int,  # of the model
    ) -> ClassCounts | None:
        """The counts by class that stand beside a result; None where there are none, or others."""
        file = self._file(name, of)
        try:
            kept = json.loads(read_regular(file, MOST_BYTES))["counts"]
            counts = _unpacked(kept, n_classes)
            if counts.n_images.sum() != result["count"]:
                raise ValueError("its classes have another number of images")
            if not math.isclose(counts.n_right.sum() / result["count"], result["top1"]):
                raise ValueError("its classes have another accuracy")
            return counts
        except KeyError:  # kept before there were counts
            return None
        except NO_RESULT as error:
            why = str(error)[:200]
            self.say(f"warning: {file} has no counts ({why}); the set is evaluated again")
            return None

    def keep(
        self, name: str, of: dict[str, Any], result: Result, counts: ClassCounts | None = None
    ) -> None:
        """Write a result for `find`, which is to be asked with the same `name` and `of`."""
        content: dict[str, Any] = {"of": digest(of), "set": name, "result": result}
        if counts is not None:
            content["counts"] = _packed(counts)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._file(name, of), [json.dumps(content, indent=1).encode()])
        except OSError as error:
            self.say(f"warning: the result of {name} cannot be kept for a later call: {error}")

    def _file(self, name: str, of: dict[str, Any]) -> Path:
        return self.folder / f"{safe_name(name.replace('/', '-'))}-{digest(of)[:16]}.json"


def _packed(counts: ClassCounts) -> str:
    """As text: most of the K x K counts are 0."""
    return base64.b64encode(zlib.compress(counts.table().astype("<i8").tobytes())).decode()


def _unpacked(text: Any, n_classes: int) -> ClassCounts:
    """What was packed. Raises one of `NO_RESULT` for anything else; never takes more room."""
    rows, columns = table_shape(n_classes)
    n_bytes = 8 * rows * columns
    unpacking = zlib.decompressobj()
    content = unpacking.decompress(base64.b64decode(text, validate=True), n_bytes)
    if len(content) != n_bytes or not unpacking.eof:
        raise ValueError("counts of other classes")
    table = np.frombuffer(content, "<i8").astype(np.int64).reshape(rows, columns)
    return ClassCounts.of(table)


def _checked(tree: Any, of: str, count: int, judge: Judge) -> Result:
    """A result out of a file. Raises one of `NO_RESULT` for anything else."""
    if tree["of"] != of:
        raise ValueError("it was computed from something else")
    metrics = dict(tree["result"])
    found = metrics.pop("count")
    if type(found) is not int or found != count:
        raise ValueError("another number of images")
    return judge.check_metrics(metrics) | {"count": count}
