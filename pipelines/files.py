"""Files as the world has them: of any type, of any size, on file systems without locks; and how a
message shows a path or a text that may be long. Standard library only.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import stat
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

GIGABYTE = 1 << 30
BLOCK_BYTES = 1 << 16  # at least so much is asked for at once

# Some Lustre, NFS, CIFS and FUSE mounts have no locks.
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# FAT and some FUSE mounts have no hard links.
NO_LINKS_HERE = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
NO_FOLDER_SYNC_HERE = (
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
)


# ------------------------------------------------------------------ reading


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a regular file for unbuffered reading; links are followed.

    Raises ValueError for anything else, such as a named pipe, on which a plain `open` would wait
    for ever. Raises OSError as `open`.
    """
    # Without O_NONBLOCK opening a named pipe waits for its writer. It changes nothing for a regular
    # file.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ValueError(f"{readable(path)}: is {_what_it_is(mode)}, not a file")
    return open(descriptor, "rb", buffering=0)


def first_bytes(path: str | Path, most: int) -> bytes:
    """The first `most` bytes of a regular file, or all of a shorter one.

    Raises as `open_regular`.
    """
    with open_regular(path) as file:
        return file.read(most)


def _what_it_is(mode: int) -> str:
    match stat.S_IFMT(mode):
        case stat.S_IFDIR:
            return "a folder"
        case stat.S_IFIFO:
            return "a named pipe"
        case stat.S_IFCHR:
            return "a character device"
        case stat.S_IFBLK:
            return "a block device"
        case stat.S_IFSOCK:
            return "a socket"
        case _:
            return "no regular file"


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
            part = file.read(min(most + 1 - length, max(size + 1 - length, BLOCK_BYTES)))
            if not part:
                return b"".join(parts)
            parts.append(part)
            length += len(part)
    raise ValueError(f"{readable(path)}: has more than {most:,} bytes")


# ------------------------------------------------------------------ locks, and writing that lasts


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
    """Make a rename in `folder` survive a power cut, where the file system can.

    Raises OSError for a failing disk.
    """
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC_HERE:
            raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def sync_file_system(folder: str | Path) -> None:
    """Make all that was written to the file system of `folder` survive a power cut.

    For many files this takes one wait, not one for each. Raises OSError for a failing or full disk.
    """
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if syncfs(descriptor):
            number = ctypes.get_errno()
            if number not in NO_FOLDER_SYNC_HERE:
                raise OSError(number, os.strerror(number), os.fspath(folder))
    finally:
        os.close(descriptor)


def write_whole(
    path: str | Path, parts: Iterable[bytes | memoryview], *, overwrite: bool = True
) -> None:
    """Write a file completely or not at all.

    It is written under a temporary name, flushed to the disk, then renamed. Two writers do not
    disturb each other; a killed one leaves `.NAME.*.tmp` behind.

    Raises OSError after removing what it had written, with a file at `path` as it was;
    FileExistsError without `overwrite` where there is anything at `path`. After the rename nothing
    is raised any more: the file is there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _rename_to_a_new_name(temporary, path)
    except OSError as error:
        # The error of a full disk names no file, others name the temporary one: say which is meant.
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    try:
        sync_folder(path.parent)
    except OSError as error:
        warnings.warn(
            f"{path} is written, but its folder could not be flushed to the disk: {error}",
            stacklevel=2,
        )


def _rename_to_a_new_name(old: Path, new: Path) -> None:
    """Rename, or FileExistsError. The old name may stay: `write_whole` removes it."""
    try:
        os.link(old, new)  # unlike a rename, it fails where there is something
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from None
    except OSError as error:
        if error.errno not in NO_LINKS_HERE:
            raise
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from None
        os.replace(old, new)


# ------------------------------------------------------------------ for messages


def shown(value: Any, most: int = 200) -> str:
    """`repr` of a value, cut in the middle where it is longer than `most` characters."""
    text = repr(value)
    if len(text) <= most:
        return text
    return f"{_cut(text, most)} ({len(text):,} characters)"


def readable(text: str | os.PathLike[str], most: int = 300) -> str:
    """A path, a name or another text without quotes, cut in the middle where it is long.

    Characters that a terminal would act on and undecodable bytes are escaped.
    """
    text = os.fspath(text)
    if not text.isprintable():
        text = repr(text)[1:-1]
    return _cut(text, most)


def one_line(error: Exception, most: int = 400) -> str:
    """What an error says, on one line, cut in the middle where a file could make it long.

    An error that says nothing is told by its type.
    """
    said = " ".join(str(error).split())
    return readable(said or type(error).__name__, most)


def listed(names: Sequence[str], most: int = 5, longest: int = 60) -> str:
    """The first `most` names, readable and with commas; "..." stands for those beyond."""
    told = [readable(name, longest) for name in names[:most]]
    if len(names) > most:
        told.append("...")
    return ", ".join(told)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... {text[-half:]}"
