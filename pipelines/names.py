"""The rule for class names, wherever they come from: a sidecar, a checkpoint, a list of them."""

from collections import Counter
from pathlib import Path
from typing import Any

from pipelines.files import read_regular, readable, shown

MOST_NAME = 1000  # characters of a class name


def checked_names(classes: Any) -> tuple[str, ...] | None:
    """The class names, in the order of the labels; None where the labels have none.

    Undecodable folder names, which Python spells with surrogates, are names too. Raises ValueError
    unless `classes` is None or a list of unique texts of 1 to MOST_NAME characters.
    """
    if classes is None:
        return None
    if not isinstance(classes, (list, tuple)) or not classes:
        raise ValueError("must be a list of class names, or null")
    for name in classes:
        if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME:
            raise ValueError(
                f"a class name is {shown(name)}: must be a text of 1 to {MOST_NAME:,} characters"
            )
    name, times = Counter(classes).most_common(1)[0]
    if times > 1:
        raise ValueError(
            f"the class name {shown(name)} stands {times} times: none may be there twice"
        )
    return tuple(classes)


def names_in(path: Path) -> tuple[str, ...]:
    """Names of classes, one a line. ValueError for what are none."""
    try:
        lines = read_regular(path).decode("utf-8-sig").splitlines()
        names = checked_names([line.strip() for line in lines])
    except ValueError as error:
        raise ValueError(f"classes = {readable(path)}: {error}") from None
    assert names is not None
    return names
