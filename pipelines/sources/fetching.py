"""What sources that are fetched share: patience with the network, a copy that is checked."""

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def verified(file: Path, sha256: str, most: int = GIGABYTE) -> bytes:
    """The content of a fetched file of at most `most` bytes.

    Raises ValueError for another than the published one.
    """
    content = read_regular(file, most)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(
            f"{file}: damaged or not fetched to its end (wrong sha256);"
            " delete it and it is fetched again"
        )
    return content
