"""The data: stores of encoded images, epoch plans, and loaders that execute them."""

import os
from pathlib import Path

from pipelines.back_ends import BACK_ENDS
from pipelines.loaders import best_loader, imports, loader_options, open_loader
from pipelines.loaders.base import Batch, Loader
from pipelines.machine import settle_in
from pipelines.plan import EpochPlan, draw_epoch, eval_plan
from pipelines.plan_spec import PlanSpec
from pipelines.sizes import Size, sides_of
from pipelines.sources import source_of
from pipelines.store import DamagedData, Store

__all__ = [
    "BACK_ENDS",
    "Batch",
    "DamagedData",
    "EpochPlan",
    "Loader",
    "PlanSpec",
    "Size",
    "Store",
    "best_loader",
    "draw_epoch",
    "eval_plan",
    "imports",
    "loader_options",
    "open_loader",
    "open_store",
    "sides_of",
]

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
