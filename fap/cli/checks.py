"""The checks of fap-doctor: each looks at one thing that training needs of a machine.

A check takes the path that the user names (data, or the folder of runs) and returns what it found.
What is amiss it raises: a `Finding`, or whatever error a broken installation gives.

Nothing here imports torch, or a package that needs it, outside a check: it may be what is missing.
"""

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
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

MODULES = ("numpy", "timm", "pydantic", "yaml", "safetensors", "tqdm", "PIL", "simplejpeg", "numba")
# What only one feature needs: the extras of pyproject.toml, and the modules of each.
EXTRAS = {
    "attacks": ("pyautoattack",),
    "corruptions": ("cv2", "scipy"),
    "detection": ("faster_coco_eval",),
    "devkit": ("scipy",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "parquet": ("pyarrow",),
    "plots": ("matplotlib",),
    "statistics": ("scipy",),
    "tensorboard": ("tensorboard",),
}

LEAST_PYTHON = (3, 11)
LEAST_MEMORY_GB = 4  # one training process with its loader
LEAST_SHARED_MB = 32  # semaphores need next to nothing, NCCL a few MB for each GPU
LEAST_TEMPORARY_MB = 100
LEAST_DISK_GB = 2
LEAST_MB_PER_SECOND = 100  # of the disk
LEAST_FILES = 1000  # that a folder must still have room for: checkpoints, TensorBoard, indexes
LEAST_THREADS = 512
CLOCK_SECONDS = 5  # by which two clocks may differ
READ_BYTES = 64 << 20  # to measure the disk
KB_PER_GB = 1e6
MB = 1e6  # bytes
GB = 1e9

SIDE = 64  # pixels of the test image
COLOUR = (200, 100, 50)
DECODING_ERROR = 8  # grey levels by which JPEG may change a single colour

MORE_MEMORY = "docker run --memory=16g  # Kubernetes: resources.limits.memory; Slurm: --mem=16G"
MORE_THREADS = (
    "docker run --pids-limit=4096  # Kubernetes: podPidsLimit of the kubelet; systemd: TasksMax"
)
TEMPORARY_FILES_ELSEWHERE = "export TMPDIR=A_FOLDER_WITH_ROOM"
RUNS_ELSEWHERE = "cd A_FOLDER_YOU_MAY_WRITE  # or: fap-train run.dir=A_FOLDER_YOU_MAY_WRITE"
OTHER_FOLDER = (
    "fap-doctor A_FOLDER_YOU_MAY_WRITE  "
    "# data may be read-only; runs need run.dir=A_FOLDER_YOU_MAY_WRITE"
)


class Limit(NamedTuple):
    """A limit of a process."""

    what: str
    number: int  # RLIMIT_...
    least: int  # that a run needs
    mend: str


LIMITS = (
    Limit("open files", resource.RLIMIT_NOFILE, 1024, "ulimit -n 4096"),
    Limit(
        "processes and threads of this user", resource.RLIMIT_NPROC, LEAST_THREADS, "ulimit -u 4096"
    ),
    Limit("bytes of address space", resource.RLIMIT_AS, 64 << 30, "ulimit -v unlimited"),
    Limit("bytes in a file", resource.RLIMIT_FSIZE, 1 << 30, "ulimit -f unlimited"),
)


class Finding(Exception):  # noqa: N818
    """Something is amiss; `mend` where it is more exact than what the table of checks says."""

    def __init__(self, text: str, mend: str = "") -> None:
        super().__init__(text)
        self.mend = mend


def require(good: bool, text: str, mend: str = "") -> str:
    """`text` if all is good. Raises it as a Finding if not."""
    if not good:
        raise Finding(text, mend)
    return text


def leaf(name: str) -> Any:
    """A module of `pipelines` from its file: importing the package itself would need torch."""
    file = Path(__file__).parents[2] / "pipelines" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


files = leaf("files")
machine = leaf("machine")


# ------------------------------------------------------------------ the installation


def check_python(path: Path) -> str:
    return require(sys.version_info >= LEAST_PYTHON, f"{sys.version.split()[0]} (>= 3.11)")


def check_torch(path: Path) -> str:
    machine.settle_in()  # as every command does
    torch = importlib.import_module("torch")
    torchvision = importlib.import_module("torchvision")
    versions = f"{torch.__version__}, torchvision {torchvision.__version__}"
    return f"{versions}, built for CUDA {torch.version.cuda}"


def check_packages(path: Path) -> str:
    for name in MODULES:
        importlib.import_module(name)
    return f"{len(MODULES)} import"


def check_extras(path: Path) -> str:
    """What only one feature needs, and works without."""
    lacking = []
    for extra, modules in EXTRAS.items():
        try:
            for name in modules:
                importlib.import_module(name)
        except ImportError:
            lacking.append(extra)
    if lacking:
        wanted = ",".join(lacking)
        raise Finding(
            f"not installed: {', '.join(lacking)}; only these features need them",
            f"pip install -e '.[{wanted}]'",
        )
    return f"{', '.join(EXTRAS)} import"


def check_gpu(path: Path) -> str:
    torch: Any = importlib.import_module("torch")
    told = _nvidia_smi()
    if torch.cuda.is_available():
        ones = torch.ones(8, 8, device="cuda")
        ones.mm(ones).sum().item()  # a kernel can be launched
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        return f"{gpus} (driver, name, memory: {told or 'unknown'})"
    if told:
        raise Finding(f"{told}; torch trains on the CPU")
    if _has_nvidia_device():
        raise Finding("NVIDIA, no driver; torch trains on the CPU")
    return "none; torch trains on the CPU"


def _nvidia_smi() -> str:
    """Driver, name and memory of each GPU, "" without the program."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, errors="replace", timeout=60)
    except OSError:
        return ""
    return done.stdout.strip()


def _has_nvidia_device() -> bool:
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text() == "0x10de\n" for vendor in vendors)


def check_ffcv(path: Path) -> str:
    return _decoding("ffcv")


def check_dali(path: Path) -> str:
    return _decoding("dali")


def check_gpu_decoding(path: Path) -> str:
    return _decoding("dali", "cuda")


def _decoding(back_end: str, device: str = "cpu") -> str:
    """One JPEG through a back end of ours, as in training."""
    pipelines = importlib.import_module("pipelines")
    image = importlib.import_module("PIL.Image")
    if device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        return "no GPU to try it on"
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/class")
        image.new("RGB", (SIDE, SIDE), COLOUR).save(f"{folder}/class/image.jpeg")
        store = pipelines.open_store(folder)
        spec = pipelines.PlanSpec(
            0,
            SIDE,
            clean_rows=1,
            clean_group_rows=1,
            crop="pad",
            pad=0,
            # Of several, that for which the back end brings a decoder of its own.
            filter=pipelines.BACK_ENDS[back_end].filters[0],
        )
        plan = pipelines.draw_epoch(spec, store.heights, store.widths, 0)
        loader = pipelines.open_loader(back_end, store, size=SIDE, device=device)
        batch = next(loader.load(plan))
        return judged(batch.images[0].permute(1, 2, 0).cpu().numpy(), back_end)


def judged(pixels: Any, package: str) -> str:
    """Whether the decoded pixels, (H, W, 3), are those of the test image."""
    found = [f"{d.name} {d.version}" for d in distributions() if package in str(d.name)]
    right = pixels.shape == (SIDE, SIDE, 3)
    right = right and abs(pixels.astype(int) - COLOUR).max() <= DECODING_ERROR
    verb = "decodes" if right else "falsely decodes"
    return require(right, f"{', '.join(found)} {verb} JPEG")


# ------------------------------------------------------------------ what a container allows


def check_cores(path: Path) -> str:
    usable = machine.usable_cores()
    allowed = len(os.sched_getaffinity(0))
    text = f"{usable} usable of {os.cpu_count()}"
    if usable < allowed:
        text += ", by a CPU quota; decoding threads follow it"
    elif allowed < (os.cpu_count() or 1):
        text += ", by the CPU affinity (taskset, cpuset, Slurm)"
    # One number for each level of nested parallelism: the first is what counts.
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if wanted.isdecimal() and int(wanted) > usable:
        raise Finding(f"{text}; OMP_NUM_THREADS={wanted} asks for more")
    return text


def check_memory(path: Path) -> str:
    lines = Path("/proc/meminfo").read_text().splitlines()
    info = dict(line.split(":") for line in lines)
    free_gb = int(info["MemAvailable"].split()[0]) / KB_PER_GB
    text = f"{free_gb:,.1f} GB for processes and page cache"
    limit = machine.memory_limit_bytes()
    if limit is not None and limit / GB < free_gb:
        free_gb = limit / GB
        text = f"{free_gb:,.1f} GB for processes and page cache, the limit of this container or job"
        require(
            free_gb >= LEAST_MEMORY_GB,
            f"{text}: a process that goes beyond it is killed (exit code 137); "
            f"a run needs {LEAST_MEMORY_GB} GB",
            MORE_MEMORY,
        )
    data_gb = path.stat().st_size / GB if path.is_file() else 0
    # Data that fit into the page cache are read from the disk once.
    good = free_gb >= max(LEAST_MEMORY_GB, data_gb)
    return require(good, f"{text}; {path}: {data_gb:,.1f} GB")


def check_user(path: Path) -> str:
    """An account, a home and a place for caches: what `settle_in` otherwise makes up for."""
    lacks = []
    if not _has_account():
        lacks.append("has no account")
    home = machine.home_folder()
    cache = machine.cache_folder()
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


def _has_account() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def check_folders(path: Path) -> str:
    """The folder of temporary files, and the current one.

    There a run's folder is made unless run.dir says otherwise.
    """
    temporary = Path(tempfile.gettempdir())  # raises where none can be written
    free_mb = shutil.disk_usage(temporary).free / MB
    require(
        free_mb >= LEAST_TEMPORARY_MB,
        f"{temporary} for temporary files has {free_mb:,.0f} MB left",
        TEMPORARY_FILES_ELSEWHERE,
    )
    here = Path.cwd()
    require(
        machine.writable(here),
        f"the current folder {here} cannot be written: there is no place for runs/",
        RUNS_ELSEWHERE,
    )
    return f"{temporary} and {here} can be written"


def check_shared_memory(path: Path) -> str:
    """Training needs none on one GPU; several processes (corruptions, NCCL) do."""
    try:
        multiprocessing.get_context("fork").Lock()
    except (OSError, ImportError) as error:
        raise Finding(
            f"/dev/shm: no semaphore can be made ({error}): work stays in one process"
        ) from error
    free_mb = shutil.disk_usage("/dev/shm").free / MB
    return require(free_mb >= LEAST_SHARED_MB, f"/dev/shm: semaphores work, {free_mb:,.0f} MB free")


def check_limits(path: Path) -> str:
    for what, number, least, mend in LIMITS:
        limit, _ = resource.getrlimit(number)
        good = limit == resource.RLIM_INFINITY or limit >= least
        require(good, f"at most {limit:,} {what}; a run needs {least:,}", mend)
    threads = machine.thread_limit()
    require(
        threads is None or threads >= LEAST_THREADS,
        f"at most {threads} threads in this container; a run needs {LEAST_THREADS}",
        MORE_THREADS,
    )
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"{open_files:,} open files"


def check_text(path: Path) -> str:
    """In another encoding than UTF-8, names and messages beyond ASCII fail or are mangled."""
    encodings = {
        "file names": sys.getfilesystemencoding(),
        "files": locale.getpreferredencoding(False),
    }
    wrong = []
    for what, encoding in encodings.items():
        if encoding.lower().replace("-", "") != "utf8":
            wrong.append(f"{what} are {encoding}")
    if wrong:
        raise Finding(" and ".join(wrong))
    return "UTF-8"


# ------------------------------------------------------------------ where data and runs lie


def check_disk(path: Path) -> str:
    folder = folder_of(path)
    speed = _megabytes_per_second(folder)
    free_gb = shutil.disk_usage(folder).free / GB
    inodes = os.statvfs(folder)
    text = f"{folder}: reads {speed:,.0f} MB/s, {free_gb:,.0f} GB free"
    counted = inodes.f_files > 0  # some file systems count none
    require(
        not counted or inodes.f_favail >= LEAST_FILES,
        f"{text}, room for only {inodes.f_favail:,} more files",
        f"df -i {folder}  # remove small files",
    )
    return require(speed >= LEAST_MB_PER_SECOND and free_gb >= LEAST_DISK_GB, text)


def _megabytes_per_second(folder: Path) -> float:
    """How fast the disk reads a file that is no longer in the page cache."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(os.urandom(READ_BYTES))
        with contextlib.suppress(OSError):  # the check of the file system tells
            os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        file.read()
        return READ_BYTES / MB / (time.perf_counter() - start)


def check_file_system(path: Path) -> str:
    """Locks and fsync.

    Locks keep two conversions or runs of one name apart; syncing a folder lets a new checkpoint
    survive a power cut.
    """
    folder = folder_of(path)
    lacks = []
    with tempfile.TemporaryFile(dir=folder) as file:
        if not files.lock(file):
            lacks.append("no locks (start nothing twice)")
        syncs_files = _syncs(file.fileno())
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        syncs_folders = _syncs(descriptor)
    finally:
        os.close(descriptor)
    if not syncs_files:
        lacks.append("no fsync of files")
    if not syncs_folders:
        lacks.append("no fsync of folders")
    if not lacks:
        return f"{folder}: locks, fsync"
    text = f"{folder}: {', '.join(lacks)}"
    if not (syncs_files and syncs_folders):
        text += " (a power cut may cost the newest checkpoint)"
    raise Finding(text)


def _syncs(descriptor: int) -> bool:
    try:
        os.fsync(descriptor)
    except OSError:
        return False
    return True


def check_clock(path: Path) -> str:
    """Files from the future are made anew for ever, and certificates are not yet valid."""
    now = time.time()
    written = Path(__file__).stat().st_mtime
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    require(now >= written - CLOCK_SECONDS, f"{text} is before this program was written")
    folder = folder_of(path)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0")
        file.flush()
        ahead = os.fstat(file.fileno()).st_mtime - time.time()  # seconds, of a file server's clock
    if abs(ahead) > CLOCK_SECONDS:
        raise Finding(f"{text}; the clock of {folder} differs by {ahead:,.0f} s")
    return text


def folder_of(path: Path) -> Path:
    """`path`, or the folder that it lies in. Raises a Finding where no file can be made."""
    folder = path if path.is_dir() else path.parent
    require(folder.is_dir(), f"{folder}: no such folder", "fap-doctor A_FOLDER_THAT_EXISTS")
    require(machine.writable(folder), f"{folder}: no file can be made there", OTHER_FOLDER)
    return folder
