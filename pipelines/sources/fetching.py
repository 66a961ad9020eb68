"""What sources that are fetched share: patience with the network, a copy that is checked."""

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pipelines.files import GIGABYTE, read_regular

PATIENCE_SECONDS = 10  # with a network that does not answer


@contextmanager
def little_patience() -> Iterator[None]:
    """Sockets that are opened in the block wait PATIENCE_SECONDS for an answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def verified(
    file: Path,
    digest: str,  # of the published content, in hexadecimal digits
    *,
    algorithm: Literal["sha256", "md5"] = "sha256",
    most: int = GIGABYTE,  # bytes
) -> bytes:
    """The content of a fetched file. `md5` is for where nothing better was published.

    Raises ValueError for another than the published one.
    """
    content = read_regular(file, most)
    if hashlib.new(algorithm, content, usedforsecurity=False).hexdigest() != digest:
        raise ValueError(
            f"{file}: damaged or not fetched to its end (wrong {algorithm});"
            " delete it and it is fetched again"
        )
    return content
