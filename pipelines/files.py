"""Files as the world has them: of any kind, of any size, on file systems without locks. Standard library only."""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import IO, Any

GIGABYTE = 1 << 30
BLOCK = 1 << 16  # bytes
KINDS = {  # what a path may be instead of a file
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # some Lustre, NFS, CIFS and FUSE mounts
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM)


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a regular file for unbuffered reading; links are followed.

    Raises ValueError for anything else, such as a named pipe, on which a plain `open` would wait for
    ever. Raises OSError as `open`.
    """
    # Without O_NONBLOCK opening a named pipe waits for its writer. It changes nothing for a regular file.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise ValueError(f"{readable(path)}: is {KINDS.get(kind, 'no regular file')}, not a file")
    return open(descriptor, "rb", buffering=0)


def read_regular(path: str | Path, most: int = GIGABYTE) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises ValueError for a larger one and for what is no regular file; OSError as `open`.
    """
    with open_regular(path) as file:
        # Its size as the first guess: reading what may be a gigabyte would reserve one each time.
        size = os.fstat(file.fileno()).st_size
        parts: list[bytes] = []
        length = 0
        while max(size, length) <= most:
            # One byte more than allowed: a file that grows while it is read is noticed too.
            part = file.read(min(most + 1 - length, max(size + 1 - length, BLOCK)))
            if not part:
                return parts[0] if len(parts) == 1 else b"".join(parts)
            parts.append(part)
            length += len(part)
    raise ValueError(f"{readable(path)}: has more than {most:,} bytes")


def lock(file: IO[Any]) -> bool:
    """Lock an open file against other processes until it is closed; a killed process holds no lock.

    False where the file system has no locks. Raises BlockingIOError if another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS_HERE:
            return False
        raise
    return True


def sync_folder(folder: str | Path) -> None:
    """Make a rename in `folder` survive a power cut, where the file system can. Raises OSError for a failing disk."""
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def shown(value: Any, most: int = 200) -> str:
    """`repr` of a value for a message, cut in the middle where it is longer than `most` characters."""
    text = repr(value)
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... {text[-half:]} ({len(text):,} characters)"


def readable(path: str | Path, most: int = 300) -> str:
    """A path for a message: control characters and undecodable bytes escaped, cut in the middle where it is long."""
    text = os.fspath(path)
    if not text.isprintable():
        text = repr(text)[1:-1]
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... {text[-half:]}"
