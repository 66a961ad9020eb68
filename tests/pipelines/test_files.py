"""Files: what is none, what is too large, file systems without locks or folder syncs; messages."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.files import (
    listed,
    lock,
    one_line,
    open_regular,
    read_regular,
    readable,
    shown,
    sync_folder,
)


def test_a_regular_file_is_read_whole_through_links_too(tmp_path: Path) -> None:
    content = os.urandom(100_000)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "link").symlink_to("a")
    assert read_regular(tmp_path / "a") == read_regular(tmp_path / "link", len(content)) == content
    with pytest.raises(ValueError, match="more than 99,999 bytes"):
        read_regular(tmp_path / "a", len(content) - 1)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "b")


def test_what_is_no_file_is_named_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # a plain open would wait for a writer
    (tmp_path / "zero").symlink_to("/dev/zero")  # and this one never ends
    for path, what in (
        (tmp_path / "pipe", "is a named pipe, not a file"),
        (tmp_path / "zero", "is a character device, not a file"),
        (tmp_path, "is a folder, not a file"),
    ):
        with pytest.raises(ValueError, match=f"{path}: {what}"):
            open_regular(path)


@pytest.mark.slow
def test_a_lock_is_held_against_other_processes_and_dies_with_its_own(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = """
import sys
from pipelines.files import lock
file = open(sys.argv[1], "w")
lock(file)
print(1, flush=True)
input()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"1\n"
    with open(path, "w") as file:
        with pytest.raises(BlockingIOError):
            lock(file)
        other.kill()
        other.wait()
        assert lock(file) is True


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open(tmp_path / "lock", "w") as file:
        assert lock(file) is False


def test_a_folder_that_cannot_be_synced_is_no_error_but_a_failing_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync_folder(tmp_path)
    for number, fails in ((errno.EINVAL, False), (errno.EIO, True)):

        def refuse(_: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refuse)
        if fails:
            with pytest.raises(OSError, match=os.strerror(number)):
                sync_folder(tmp_path)
        else:
            sync_folder(tmp_path)


def test_long_values_are_cut() -> None:
    assert shown("abc") == "'abc'"
    assert len(shown("x" * 10_000)) < 260
    assert shown("x" * 10_000).endswith("x' (10,002 characters)")


def test_texts_for_messages_are_readable_and_short() -> None:
    assert readable(Path("/a/caf\u00e9")) == "/a/caf\u00e9"
    assert readable(os.fsdecode(b"caf\xe9\n\x1b[31m")) == r"caf\udce9\n\x1b[31m"
    assert readable("a" * 40 + "b" * 40, 60) == "a" * 30 + " ... " + "b" * 30
    assert readable("a" * 60, 60) == "a" * 60


def test_an_error_is_told_on_one_line() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 10_000))) < 410
    assert one_line(ValueError("\x1b[31m")).isprintable()


def test_a_list_of_names_is_cut() -> None:
    assert listed(["a", "b\n"]) == r"a, b\n"
    assert listed([]) == ""
    assert listed([str(i) for i in range(6)]) == "0, 1, 2, 3, 4, ..."
    assert listed(["x" * 100, "y"], most=1, longest=10) == "xxxxx ... xxxxx, ..."
