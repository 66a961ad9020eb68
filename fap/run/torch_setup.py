"""torch in the process of a run: its threads, its memory, its precision, its batch norm."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from typing import Literal

import torch

from fap.config import Config
from fap.step.half import Amp
from pipelines.machine import usable_cores

# malloc.h of glibc
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
NO_MMAP = 0
NEVER_TRIM = -1


def limit_threads(wanted: int | None = None) -> None:
    """torch's CPU threads: `wanted`, else its own default, or fewer.

    The default knows nothing of a container's CPU quota.
    """
    if wanted is None:
        wanted = min(torch.get_num_threads(), usable_cores())
    torch.set_num_threads(wanted)


def set_up_torch(device: torch.device) -> None:
    """What makes every step of this process faster and changes no result but by rounding."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep what a step, or a batch of an evaluation on CPU cores, frees.

    Otherwise the next one's page faults take a fifth of its time or more (bench/NOTES.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, NO_MMAP)
        mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)


def precision(config: Config, device: torch.device) -> Amp:
    """`run.amp`, or what `auto` comes to on this device."""
    if config.run.amp != "auto":
        return config.run.amp
    if device.type == "cuda":
        return "fp16"
    return "off"


def settled(config: Config, amp: Amp) -> Config:
    """The config with what `run.amp: auto` came to: half precision has a loss scale to save."""
    run = config.run.model_copy(update={"amp": amp})
    return config.model_copy(update={"run": run})


def norm_kernel(config: Config, device: torch.device) -> Literal["auto", "triton", "framework"]:
    """`run.norm_kernel` as `fap.nets.norm.NormState` says it.

    Raises ValueError where Triton cannot run.
    """
    wanted = config.run.norm_kernel
    if wanted == "framework" or config.run.compile:  # the framework's is what a compiler fuses
        return "framework"
    if wanted == "triton":
        lacks = ""
        if device.type != "cuda":
            lacks = "it needs a GPU"
        elif find_spec("triton") is None:
            lacks = "it needs the package triton"
        if lacks:
            raise ValueError(f"run.norm_kernel = 'triton': {lacks}; use 'auto' or 'framework'")
    return wanted
