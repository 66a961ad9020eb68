"""fap-doctor [PATH]: what this machine lacks for training, one line each, with the command that
mends it.
"""

import argparse
import contextlib
import importlib
import importlib.util
import locale
import multiprocessing
import os
import pwd
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from fap.cli.output import survive
from fap.cli.signals import Stopped, end, raising_stopped

MODULES = (
    "numpy",
    "timm",
    "pydantic",
    "yaml",
    "safetensors",
    "tensorboard",
    "tqdm",
    "PIL",
    "cv2",
    "numba",
    "scipy",
)
DALI = "pip install -e '.[dali]'  # CUDA 12: '.[dali12]'; until then: --pipeline ffcv"
SHARE_MEMORY = (
    "docker run --shm-size=1g  # Kubernetes: an emptyDir of medium Memory, mounted at /dev/shm"
)
MORE_THREADS = (
    "docker run --pids-limit=4096  # Kubernetes: podPidsLimit of the kubelet; systemd: TasksMax"
)
MORE_MEMORY = "docker run --memory=16g  # Kubernetes: resources.limits.memory; Slurm: --mem=16G"
CLOCK = "timedatectl set-ntp true  # or chronyc makestep, on the file server too"
SIDE, COLOUR = 64, (200, 100, 50)  # of the test image
LEAST_MEMORY_GB = 4  # one training process with its loader
LEAST_SHARED_MB = 32  # semaphores need next to nothing, NCCL a few MB for each GPU
LEAST_FILES = 1000  # that a folder must still have room for: checkpoints, TensorBoard, indexes
LEAST_THREADS = 512
CLOCK_SECONDS = 5
LIMITS = (  # of a process: what, which, the least that a run needs, what raises it
    ("open files", resource.RLIMIT_NOFILE, 1024, "ulimit -n 4096"),
    ("processes and threads of this user", resource.RLIMIT_NPROC, LEAST_THREADS, "ulimit -u 4096"),
    ("bytes of address space", resource.RLIMIT_AS, 64 << 30, "ulimit -v unlimited"),
    ("bytes in a file", resource.RLIMIT_FSIZE, 1 << 30, "ulimit -f unlimited"),
)


class Finding(Exception):  # noqa: N818
    """Something is amiss; `mend` where it is more exact than what the table of checks says."""

    def __init__(self, text: str, mend: str = "") -> None:
        super().__init__(text)
        self.mend = mend


def require(good: bool, text: str, mend: str = "") -> str:
    if not good:
        raise Finding(text, mend)
    return text


def leaf(name: str) -> Any:
    """A module of `pipelines` from its file: importing the package needs torch, which may be what
    is missing.
    """
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).parents[2] / "pipelines" / f"{name}.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


files, machine = leaf("files"), leaf("machine")


# ------------------------------------------------------------------ the installation


def check_python(path: Path) -> str:
    return require(sys.version_info >= (3, 11), f"{sys.version.split()[0]} (>= 3.11)")


def check_torch(path: Path) -> str:
    machine.settle_in()  # as every command does
    torch, torchvision = importlib.import_module("torch"), importlib.import_module("torchvision")
    return (
        f"{torch.__version__}, torchvision {torchvision.__version__}, built for CUDA"
        f" {torch.version.cuda}"
    )


def check_packages(path: Path) -> str:
    return f"{len([importlib.import_module(name) for name in MODULES])} import"


def check_gpu(path: Path) -> str:
    torch: Any = importlib.import_module("torch")
    query = "nvidia-smi --query-gpu=driver_version,name,memory.total --format=csv,noheader"
    found = subprocess.run(
        query, shell=True, capture_output=True, errors="replace", timeout=60
    ).stdout.strip()
    if torch.cuda.is_available():
        torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()
        return (
            f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} (driver, name, memory:"
            f" {found or 'unknown'})"
        )
    here = found or any(
        v.read_text() == "0x10de\n" for v in Path("/sys/bus/pci/devices").glob("*/vendor")
    )
    return require(
        not here, f"{found or ('NVIDIA, no driver' if here else 'none')}; torch trains on the CPU"
    )


def check_decoding(path: Path, back_end: str, device: str = "cpu") -> str:
    """One JPEG through a back end of ours, as in training."""
    pipelines, image = importlib.import_module("pipelines"), importlib.import_module("PIL.Image")
    if device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        return "no GPU to try it on"
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/class")
        image.new("RGB", (SIDE, SIDE), COLOUR).save(f"{folder}/class/image.jpeg")
        store = pipelines.open_store(folder)
        plan = pipelines.eval_plan(store.heights, store.widths, size=SIDE, resize=SIDE, batch=1)
        batch = next(pipelines.open_loader(back_end, store, size=SIDE, device=device).load(plan))
        return judged(batch.images[0].permute(1, 2, 0).cpu().numpy(), back_end)


def judged(pixels: Any, package: str) -> str:
    found = [f"{d.name} {d.version}" for d in distributions() if package in str(d.name)]
    right = pixels.shape == (SIDE, SIDE, 3) and abs(pixels.astype(int) - COLOUR).max() <= 8
    return require(right, f"{', '.join(found)} {'decodes' if right else 'falsely decodes'} JPEG")


# ------------------------------------------------------------------ what a container or a batch system allows


def check_cores(path: Path) -> str:
    usable, allowed = machine.usable_cores(), len(os.sched_getaffinity(0))
    text = f"{usable} usable of {os.cpu_count()}"
    if usable < allowed:
        text += ", by a CPU quota; decoding threads follow it"
    elif allowed < (os.cpu_count() or 1):
        text += ", by the CPU affinity (taskset, cpuset, Slurm)"
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    too_many = wanted.isdecimal() and int(wanted) > usable
    return require(not too_many, text + too_many * f"; OMP_NUM_THREADS={wanted} asks for more")


def check_memory(path: Path) -> str:
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, limit = int(info["MemAvailable"].split()[0]) / 1e6, machine.memory_limit_bytes()
    text = f"{free:,.1f} GB for processes and page cache"
    if limit is not None and limit / 1e9 < free:
        free = limit / 1e9
        text = f"{free:,.1f} GB for processes and page cache, the limit of this container or job"
        too_little = f"{text}: a process that goes beyond it is killed (exit code 137)"
        require(
            free >= LEAST_MEMORY_GB, f"{too_little}; a run needs {LEAST_MEMORY_GB} GB", MORE_MEMORY
        )
    size = path.stat().st_size / 1e9 if path.is_file() else 0
    return require(free >= max(LEAST_MEMORY_GB, size), f"{text}; {path}: {size:,.1f} GB")


def check_user(path: Path) -> str:
    """An account, a home and a place for caches; without them `pipelines.machine.settle_in` makes
    up for it.
    """
    lacks = [] if has_account() else ["has no account"]
    home, cache = machine.home_folder(), machine.cache_folder()
    if home is None:
        lacks.append("has no home: HOME is not set")
    elif not machine.writable(home):
        lacks.append(f"cannot write in the home {home}")
    elif not machine.writable(cache):
        lacks.append(f"cannot write in the cache {cache}")
    if not lacks:
        return f"{os.getuid()} keeps caches in {cache}"
    ours = machine.temporary_caches()
    kept = f"caches go to {ours}" if ours else "nothing that is compiled can be kept"
    raise Finding(f"{os.getuid()} {' and '.join(lacks)}; {kept}")


def check_folders(path: Path) -> str:
    """The folder of temporary files and the current one, where a run's folder is made unless
    run.dir says otherwise.
    """
    temporary = Path(tempfile.gettempdir())  # raises where none can be written
    free = shutil.disk_usage(temporary).free / 1e6
    require(
        free >= 100,
        f"{temporary} for temporary files has {free:,.0f} MB left",
        "export TMPDIR=A_FOLDER_WITH_ROOM",
    )
    here = Path.cwd()
    runs = "cd A_FOLDER_YOU_MAY_WRITE  # or: fap-train run.dir=A_FOLDER_YOU_MAY_WRITE"
    require(
        machine.writable(here),
        f"the current folder {here} cannot be written: there is no place for runs/",
        runs,
    )
    return f"{temporary} and {here} can be written"


def check_shared_memory(path: Path) -> str:
    """Training needs none on one GPU; several processes (corruptions in fap-eval, NCCL) do."""
    try:
        multiprocessing.get_context("fork").Lock()
    except (OSError, ImportError) as error:
        raise Finding(
            f"/dev/shm: no semaphore can be made ({error}): work stays in one process"
        ) from error
    free = shutil.disk_usage("/dev/shm").free / 1e6
    return require(free >= LEAST_SHARED_MB, f"/dev/shm: semaphores work, {free:,.0f} MB free")


def check_limits(path: Path) -> str:
    for what, which, least, command in LIMITS:
        limit, _ = resource.getrlimit(which)
        good = limit == resource.RLIM_INFINITY or limit >= least
        require(good, f"at most {limit:,} {what}; a run needs {least:,}", command)
    threads = machine.thread_limit()
    enough = threads is None or threads >= LEAST_THREADS
    require(
        enough,
        f"at most {threads} threads in this container; a run needs {LEAST_THREADS}",
        MORE_THREADS,
    )
    return f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} open files"


def check_text(path: Path) -> str:
    """With another encoding than UTF-8 file names and messages with other letters than ASCII fail
    or are mangled.
    """
    found = {"file names": sys.getfilesystemencoding(), "files": locale.getpreferredencoding(False)}
    wrong = [
        f"{what} are {name}"
        for what, name in found.items()
        if name.lower().replace("-", "") != "utf8"
    ]
    return require(not wrong, " and ".join(wrong) or "UTF-8")


# ------------------------------------------------------------------ where data and runs lie


def check_disk(path: Path) -> str:
    folder, block = folder_of(path), os.urandom(1 << 26)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(block)
        with contextlib.suppress(OSError):  # the check of the file system tells
            os.fsync(file.fileno())
        os.posix_fadvise(
            file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED
        )  # read the disk, not the cache
        file.seek(0)
        start = time.perf_counter()
        file.read()
        speed = len(block) / 1e6 / (time.perf_counter() - start)
    free, inodes = shutil.disk_usage(folder).free / 1e9, os.statvfs(folder)
    text = f"{folder}: reads {speed:,.0f} MB/s, {free:,.0f} GB free"
    counted = inodes.f_files > 0  # some file systems count none
    few = counted and inodes.f_favail < LEAST_FILES
    require(
        not few,
        f"{text}, room for only {inodes.f_favail:,} more files",
        f"df -i {folder}  # remove small files",
    )
    return require(speed >= 100 and free >= 2, text)


def check_file_system(path: Path) -> str:
    """Locks keep two conversions or runs of one name apart; syncing a folder lets a new checkpoint
    survive a power cut.
    """
    folder = folder_of(path)
    with tempfile.TemporaryFile(dir=folder) as file:
        lacks = [] if files.lock(file) else ["no locks (start nothing twice)"]
        if not syncs(file.fileno()):
            lacks.append("no fsync of files")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not syncs(descriptor):
            lacks.append("no fsync of folders")
    finally:
        os.close(descriptor)
    lost = " (a power cut may cost the newest checkpoint)" if "fsync" in " ".join(lacks) else ""
    return require(not lacks, f"{folder}: {', '.join(lacks) or 'locks, fsync'}{lost}")


def check_clock(path: Path) -> str:
    """Files from the future are made anew for ever, and certificates are not yet valid."""
    now, written = time.time(), Path(__file__).stat().st_mtime
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    require(now >= written - CLOCK_SECONDS, f"{text} is before this program was written")
    with tempfile.TemporaryFile(dir=folder_of(path)) as file:
        file.write(b"0")
        file.flush()
        ahead = os.fstat(file.fileno()).st_mtime - time.time()
    off = abs(ahead) > CLOCK_SECONDS
    return require(
        not off, text + off * f"; the clock of {folder_of(path)} differs by {ahead:,.0f} s"
    )


def folder_of(path: Path) -> Path:
    """`path`, or the folder that it lies in. Finding where no file can be made."""
    folder = path if path.is_dir() else path.parent
    mend = (
        "fap-doctor A_FOLDER_YOU_MAY_WRITE  # data may be read-only; runs need"
        " run.dir=A_FOLDER_YOU_MAY_WRITE"
    )
    require(folder.is_dir(), f"{folder}: no such folder", "fap-doctor A_FOLDER_THAT_EXISTS")
    require(machine.writable(folder), f"{folder}: no file can be made there", mend)
    return folder


def has_account() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def syncs(descriptor: int) -> bool:
    try:
        os.fsync(descriptor)
    except OSError:
        return False
    return True


CHECKS = (  # name, needed for training on a CPU, check, what mends it
    (
        "Python",
        True,
        check_python,
        "apt-get install python3 python3-venv python3-dev && make setup",
    ),
    ("cores", False, check_cores, "unset OMP_NUM_THREADS"),
    (
        "memory",
        False,
        check_memory,
        "fap-convert --max-side 512 SRC DST.beton  # or more memory, or a fast SSD",
    ),
    (
        "user",
        False,
        check_user,
        "export HOME=A_FOLDER_YOU_MAY_WRITE LOGNAME=fap  # or docker run --user of an account",
    ),
    ("folders", False, check_folders, "export TMPDIR=A_FOLDER_YOU_MAY_WRITE"),
    ("shared memory", False, check_shared_memory, SHARE_MEMORY),
    ("limits", False, check_limits, "ulimit -a"),
    ("text", False, check_text, "export PYTHONUTF8=1  # or LC_ALL=C.UTF-8"),
    ("disk", False, check_disk, "df -h  # a local SSD with room for data and checkpoints"),
    (
        "file system",
        False,
        check_file_system,
        "mount  # a local disk, NFS 4, or Lustre mounted with -o flock",
    ),
    ("clock", False, check_clock, CLOCK),
    ("torch", True, check_torch, "pip install -c constraints.txt torch torchvision"),
    ("packages", True, check_packages, "pip install -c constraints.txt -e ."),
    (
        "GPU",
        False,
        check_gpu,
        "nvidia-smi  # fails: install the driver; works: a torch built for its CUDA",
    ),
    (
        "FFCV",
        False,
        partial(check_decoding, back_end="ffcv"),
        "bash setup.sh  # until then: --pipeline dali or reference",
    ),
    ("DALI", False, partial(check_decoding, back_end="dali"), DALI),
    ("GPU decoding", False, partial(check_decoding, back_end="dali", device="cuda"), DALI),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if something is missing that training on a CPU needs."""
    survive()
    parser = argparse.ArgumentParser(prog="fap-doctor", description=__doc__)
    parser.add_argument(
        "path",
        nargs="?",
        default=".",
        help="a .beton, or the folder of data and runs; default: this one",
    )
    path = Path(os.path.expanduser(parser.parse_args(argv).path))
    try:
        with raising_stopped():
            return examine(path)
    except Stopped as stopped:
        return end("fap-doctor", stopped)


def examine(path: Path) -> int:
    missing = False
    for name, needed, check, mend in CHECKS:
        try:
            print(f"ok    {name:13} {check(path)}", flush=True)
        except Exception as error:  # whatever a broken installation raises is the finding
            text = " ".join(str(error).split()) or type(error).__name__
            advice = getattr(error, "mend", "") or mend
            print(f"{'fail' if needed else 'warn'}  {name:13} {text}  ->  {advice}", flush=True)
            missing |= needed
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())
