"""ImageNet's class names (WNIDs such as n01440764) where file names carry them."""

import re
from collections.abc import Sequence

WNID_IN_NAME = re.compile(r"(?:^|[_/])(n\d{8})(?=[_./]|$)")
WNID_AT_THE_END = re.compile(r"_n\d{8}(?=\.[^.]+$)")


def without_wnid(name: str) -> str:
    """A file's name as ImageNet has it, of one to which Hugging Face appended the WNID.

    n01440764_18_n01440764.JPEG was n01440764_18.JPEG.
    """
    return WNID_AT_THE_END.sub("", name)


def class_names(names: Sequence[str], labels: Sequence[int]) -> tuple[str, ...] | None:
    """The WNIDs in the order of the labels; None where names do not tell them.

    Every name must hold one WNID, every label from 0 on must have one, and no two the same.
    """
    wnid_of: dict[int, str] = {}
    for name, label in zip(names, labels, strict=True):
        found = set(WNID_IN_NAME.findall(name))
        if len(found) != 1:
            return None
        wnid = found.pop()
        if wnid_of.setdefault(label, wnid) != wnid:
            return None
    if sorted(wnid_of) != list(range(len(wnid_of))) or len(set(wnid_of.values())) < len(wnid_of):
        return None
    return tuple(wnid_of[label] for label in range(len(wnid_of)))
