"""The data: stores of encoded images, epoch plans, and loaders that execute them."""

import os
from pathlib import Path

from pipelines.files import readable
from pipelines.loaders import BACK_ENDS, loader_options, open_loader
from pipelines.loaders.base import Batch, Loader
from pipelines.machine import settle_in
from pipelines.plan import EpochPlan, PlanSpec, draw_epoch, eval_plan
from pipelines.sources.beton import BetonStore
from pipelines.sources.folder import FolderStore
from pipelines.store import DamagedData, Store

__all__ = [
    "BACK_ENDS",
    "Batch",
    "DamagedData",
    "EpochPlan",
    "Loader",
    "PlanSpec",
    "Store",
    "draw_epoch",
    "eval_plan",
    "loader_options",
    "open_loader",
    "open_store",
]

settle_in()  # before a back end, a plot or a compiler looks for its cache


def open_store(path: str | Path) -> Store:
    """A `.beton` file or an image folder in ImageNet's layout; `~` is the user's home.

    Raises:
        ValueError: nothing is there, or neither of them, or a folder without usable images.
        DamagedData: the file's header, tables or sidecar contradict each other.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        return FolderStore(path)
    if not path.exists():
        raise ValueError(
            f"{readable(path)}: no such file or folder; expected a .beton file or an image folder"
        )
    return BetonStore(path)
