"""The registry of loaders, for whoever must know their names: it needs the standard library only.

To add a loader, see `pipelines.loaders.base.Loader`.
"""

from typing import Literal, NamedTuple, get_args

# What resizes an image; `pipelines.plan_spec.PlanSpec` says what each one is.
Filter = Literal["area", "bilinear", "bicubic"]
EvalFilter = Literal["bilinear", "bicubic"]
FILTERS: tuple[Filter, ...] = get_args(Filter)
EVAL_FILTERS: tuple[EvalFilter, ...] = get_args(EvalFilter)


class BackEnd(NamedTuple):
    """Where a loader is. It is imported when it is asked for: its packages may be missing."""

    module: str
    loader: str  # the class in it
    install: str  # how to install what it needs
    # The resizes that it can show; the first is the one where none is named.
    filters: tuple[Filter, ...] = FILTERS


AUTO = "auto"  # instead of a name: the best back end that is installed and can show the data

BACK_ENDS = {
    "ffcv": BackEnd(
        "pipelines.loaders.ffcv",
        "FfcvLoader",
        "pip install --no-deps ffcv==1.0.2 (README lists the system packages)",
    ),
    "dali": BackEnd(
        "pipelines.loaders.dali",
        "DaliLoader",
        "pip install -e '.[dali]' (CUDA 13) or '.[dali12]'",
        filters=("bilinear", "bicubic"),
    ),
    "turbojpeg": BackEnd(
        "pipelines.loaders.turbojpeg", "TurboJpegLoader", "pip install -e . (simplejpeg, numba)"
    ),
    "memory": BackEnd("pipelines.loaders.memory", "MemoryLoader", "pip install -e ."),
    "reference": BackEnd("pipelines.loaders.reference", "ReferenceLoader", "pip install -e ."),
}

GPU_DECODER = "dali"  # that decodes on a GPU

# What `auto` tries, in this order.
BEST_ON_A_GPU = ("dali", "ffcv", "turbojpeg", "reference")
BEST_ON_A_CPU = ("ffcv", "turbojpeg", "reference")
