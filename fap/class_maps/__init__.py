"""The classes of published sets, and what they mean in ImageNet's: lists of facts, in data files.

WNIDs are WordNet's names of classes, such as n01440764, and the names of ImageNet's folders. Where
each list is from stands in its file.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files

COMMENT = "#"


@cache
def imagenet() -> tuple[str, ...]:
    """The 1,000 WNIDs of ImageNet-1k in the order of the labels."""
    return tuple(_lines("imagenet"))


@cache
def imagenet_a() -> tuple[str, ...]:
    """The WNIDs of ImageNet-A's 200 classes, sorted."""
    return tuple(_lines("imagenet_a"))


@cache
def imagenet_r() -> tuple[str, ...]:
    """The WNIDs of ImageNet-R's 200 classes, sorted."""
    return tuple(_lines("imagenet_r"))


@cache
def cifar100() -> tuple[str, ...]:
    """CIFAR-100's fine classes in the order of the labels."""
    return tuple(_lines("cifar100"))


@cache
def sixteen_categories() -> Mapping[str, tuple[str, ...]]:
    """The WNIDs that each of the 16 categories of cue conflict images covers, sorted by name."""
    found = {}
    for line in _lines("sixteen"):
        category, *wnids = line.split()
        found[category] = tuple(wnids)
    return found


def _lines(name: str) -> list[str]:
    text = files(__name__).joinpath(f"{name}.txt").read_text("utf-8")
    return [line for line in text.splitlines() if not line.startswith(COMMENT)]
