"""fap-doctor [PATH]: what this machine lacks for training, one line each, with the command that mends it."""

import argparse
import importlib
import os
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

MODULES = ("numpy", "timm", "pydantic", "yaml", "safetensors", "tensorboard", "tqdm", "PIL", "cv2", "numba", "scipy")
DALI = "pip install -e '.[dali]'  # CUDA 12: '.[dali12]'; until then: --pipeline ffcv"
SIDE, COLOUR = 64, (200, 100, 50)  # of the test image


def check_python(path: Path) -> str:
    return require(sys.version_info >= (3, 11), f"{sys.version.split()[0]} (>= 3.11), {len(os.sched_getaffinity(0))} cores")


def check_torch(path: Path) -> str:
    torch, torchvision = importlib.import_module("torch"), importlib.import_module("torchvision")
    return f"{torch.__version__}, torchvision {torchvision.__version__}, built for CUDA {torch.version.cuda}"


def check_packages(path: Path) -> str:
    return f"{len([importlib.import_module(name) for name in MODULES])} import"


def check_gpu(path: Path) -> str:
    torch: Any = importlib.import_module("torch")
    query = "nvidia-smi --query-gpu=driver_version,name,memory.total --format=csv,noheader"
    found = subprocess.run(query, shell=True, capture_output=True, text=True).stdout.strip()
    if torch.cuda.is_available():
        torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} (driver, name, memory: {found or 'unknown'})"
    here = found or any(v.read_text() == "0x10de\n" for v in Path("/sys/bus/pci/devices").glob("*/vendor"))
    return require(not here, f"{found or ('NVIDIA, no driver' if here else 'none')}; torch trains on the CPU")


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


def check_disk(path: Path) -> str:
    folder, block = path if path.is_dir() else path.parent, os.urandom(1 << 26)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(block)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read the disk, not the cache
        file.seek(0)
        start = time.perf_counter()
        file.read()
        speed = len(block) / 1e6 / (time.perf_counter() - start)
    free = shutil.disk_usage(folder).free / 1e9
    return require(speed >= 100 and free >= 2, f"{folder}: reads {speed:,.0f} MB/s, {free:,.0f} GB free")


def check_memory(path: Path) -> str:
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, limit = int(info["MemAvailable"].split()[0]) / 1e6, Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text() != "max\n":
        free = min(free, int(limit.read_text()) / 1e9)
    size = path.stat().st_size / 1e9 if path.is_file() else 0
    return require(free >= max(4, size), f"{free:,.1f} GB for processes and page cache; {path}: {size:,.1f} GB")


def require(good: bool, text: str) -> str:
    if not good:
        raise RuntimeError(text)
    return text


def judged(pixels: Any, package: str) -> str:
    found = [f"{d.name} {d.version}" for d in distributions() if package in str(d.name)]
    right = pixels.shape == (SIDE, SIDE, 3) and abs(pixels.astype(int) - COLOUR).max() <= 8
    return require(right, f"{', '.join(found)} {'decodes' if right else 'falsely decodes'} JPEG")


CHECKS = (  # name, needed for training on a CPU, check, what mends it
    ("Python", True, check_python, "apt-get install python3 python3-venv python3-dev && make setup"),
    ("torch", True, check_torch, "pip install -c constraints.txt torch torchvision"),
    ("packages", True, check_packages, "pip install -c constraints.txt -e ."),
    ("GPU", False, check_gpu, "nvidia-smi  # fails: install the driver; works: a torch built for its CUDA"),
    ("FFCV", False, partial(check_decoding, back_end="ffcv"), "bash setup.sh  # until then: --pipeline dali or reference"),
    ("DALI", False, partial(check_decoding, back_end="dali"), DALI),
    ("GPU decoding", False, partial(check_decoding, back_end="dali", device="cuda"), DALI),
    ("disk", False, check_disk, "df -h  # a local SSD with room for data and checkpoints"),
    ("memory", False, check_memory, "fap-convert --max-side 512 SRC DST.beton  # or more memory, or a fast SSD"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if something is missing that training on a CPU needs."""
    parser = argparse.ArgumentParser(prog="fap-doctor", description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=Path.cwd(), help="a .beton, or the folder of data and runs")
    path, missing = parser.parse_args(argv).path, False
    for name, needed, check, mend in CHECKS:
        try:
            print(f"ok    {name:13} {check(path)}", flush=True)
        except Exception as error:  # whatever a broken installation raises is the finding
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"{'fail' if needed else 'warn'}  {name:13} {text}  ->  {mend}", flush=True)
            missing |= needed
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())
