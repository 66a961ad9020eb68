"""`fap-doctor [PATH]`: what this machine lacks for training, and the commands that mend it."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fap.cli import checks
from fap.cli.output import survive
from fap.cli.signals import Stopped, end, raising_stopped

DESCRIPTION = (
    "fap-doctor [PATH]: what this machine lacks for training, "
    "one line each, with the command that mends it."
)
INSTALL_DALI = "pip install -e '.[dali]'  # CUDA 12: '.[dali12]'; until then: another pipeline"


class Check(NamedTuple):
    """One line of what fap-doctor prints."""

    name: str
    needed: bool  # for training on a CPU
    look: Callable[[Path], str]  # returns what is there, raises what is amiss
    mend: str


CHECKS: Sequence[Check] = (
    Check(
        "Python",
        True,
        checks.check_python,
        "apt-get install python3 python3-venv python3-dev && make setup",
    ),
    Check("cores", False, checks.check_cores, "unset OMP_NUM_THREADS"),
    Check(
        "memory",
        False,
        checks.check_memory,
        "fap-convert --max-side 512 SRC DST.beton  # or more memory, or a fast SSD",
    ),
    Check(
        "user",
        False,
        checks.check_user,
        "export HOME=A_FOLDER_YOU_MAY_WRITE LOGNAME=fap  # or docker run --user of an account",
    ),
    Check("folders", False, checks.check_folders, "export TMPDIR=A_FOLDER_YOU_MAY_WRITE"),
    Check(
        "shared memory",
        False,
        checks.check_shared_memory,
        "docker run --shm-size=1g  # Kubernetes: an emptyDir of medium Memory, mounted at /dev/shm",
    ),
    Check("limits", False, checks.check_limits, "ulimit -a"),
    Check("text", False, checks.check_text, "export PYTHONUTF8=1  # or LC_ALL=C.UTF-8"),
    Check(
        "disk", False, checks.check_disk, "df -h  # a local SSD with room for data and checkpoints"
    ),
    Check(
        "file system",
        False,
        checks.check_file_system,
        "mount  # a local disk, NFS 4, or Lustre mounted with -o flock",
    ),
    Check(
        "clock",
        False,
        checks.check_clock,
        "timedatectl set-ntp true  # or chronyc makestep, on the file server too",
    ),
    Check("torch", True, checks.check_torch, "pip install -c constraints.txt torch torchvision"),
    Check("packages", True, checks.check_packages, "pip install -c constraints.txt -e ."),
    Check("extras", False, checks.check_extras, "pip install -e '.[all]'"),
    Check(
        "GPU",
        False,
        checks.check_gpu,
        "nvidia-smi  # fails: install the driver; works: a torch built for its CUDA",
    ),
    Check(
        "FFCV",
        False,
        checks.check_ffcv,
        "bash setup.sh  # until then: --pipeline turbojpeg, which data.pipeline=auto takes",
    ),
    Check("DALI", False, checks.check_dali, INSTALL_DALI),
    Check("GPU decoding", False, checks.check_gpu_decoding, INSTALL_DALI),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if something is missing that training on a CPU needs."""
    survive()
    parser = argparse.ArgumentParser(prog="fap-doctor", description=DESCRIPTION)
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
    for name, needed, look, mend in CHECKS:
        try:
            print(f"ok    {name:13} {look(path)}", flush=True)
        except Exception as error:  # whatever a broken installation raises is the finding
            status = "fail" if needed else "warn"
            text = " ".join(str(error).split()) or type(error).__name__
            advice = getattr(error, "mend", "") or mend
            print(f"{status}  {name:13} {text}  ->  {advice}", flush=True)
            missing |= needed
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())
