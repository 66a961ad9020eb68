"""The data: stores of encoded images, epoch plans, and loaders that execute them."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pipelines.loaders.base import Batch, Loader
from pipelines.machine import settle_in
from pipelines.plan import EpochPlan, PlanSpec, draw_epoch, eval_plan
from pipelines.sources import source_of
from pipelines.store import DamagedData, Store

# fmt: off
__all__ = [
    "Batch", "DamagedData", "EpochPlan", "Loader", "PlanSpec", "Store", "draw_epoch", "eval_plan", "open_loader", "open_store"
]
# fmt: on

BACK_ENDS = {  # module: class, how to install what it needs
    "ffcv": ("FfcvLoader", "pip install --no-deps ffcv==1.0.2 (README lists the system packages)"),
    "dali": ("DaliLoader", "pip install -e '.[dali]' (CUDA 13) or '.[dali12]'"),
    "reference": ("ReferenceLoader", "pip install -e ."),
}


settle_in()  # before a back end, a plot or a compiler looks for its cache


def open_store(path: str | Path) -> Store:
    """A `.beton` file, an image folder in ImageNet's layout, or what another source accepts.

    `~` is the user's home.

    Raises:
        ValueError: nothing is there, or what no source accepts, or a folder without usable images.
        DamagedData: the file's header, tables or sidecar contradict each other.
    """
    path = Path(os.path.expanduser(path))
    source = source_of(path)
    return source(path)


def open_loader(name: Literal["ffcv", "dali", "reference"], store: Store, **options: Any) -> Loader:
    """Open a back end. `options` are those of `Loader`: size, device, threads, prefetch,
    hw_decoder_load.
    """
    if name not in BACK_ENDS:
        raise ValueError(f"pipeline = {name!r}: must be one of {', '.join(BACK_ENDS)}")
    cls, install = BACK_ENDS[name]
    try:
        back_end: type[Loader] = getattr(import_module(f"pipelines.loaders.{name}"), cls)
    except ImportError as error:
        raise ImportError(
            f"pipeline = {name!r} needs a package that is missing ({error}): {install}"
        ) from error
    return back_end(store, **options)
