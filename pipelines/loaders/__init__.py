"""Loaders: back ends that execute an epoch plan, opened by name."""

from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from typing import Any

import torch

from pipelines.back_ends import BACK_ENDS, BEST_ON_A_CPU, BEST_ON_A_GPU
from pipelines.loaders.base import Loader
from pipelines.sizes import Size
from pipelines.store import Store


def open_loader(
    name: str,
    store: Store,
    *,
    size: Size,  # of the canvas in pixels, as in the plans
    device: torch.device | str = "cpu",
    **options: Any,
) -> Loader:
    """Open a back end; `options` are its own, those that `loader_options` names.

    Raises:
        ValueError: no such back end, an option out of range, or a store that it cannot read.
        ImportError: a package that it needs is missing; the message says how to install it.
        TypeError: an option that it does not have.
    """
    return _loader_class(name)(store, size=size, device=device, **options)


def loader_options(name: str) -> set[str]:
    """The names of a back end's options beside `size` and `device`.

    Raises ValueError and ImportError as `open_loader`.
    """
    return set(signature(_loader_class(name)).parameters) - {"store", "size", "device"}


def best_loader(stores: Sequence[Store], *, gpu: bool, image_filter: str | None = None) -> str:
    """What `auto` stands for: the first back end that imports, and can show all of the stores.

    `gpu`: whether the images are to be on a GPU. `image_filter`: that it must have; None: any.
    """
    for name in BEST_ON_A_GPU if gpu else BEST_ON_A_CPU:
        shown = BACK_ENDS[name].filters
        if (image_filter is None or image_filter in shown) and imports(name):
            loader = _loader_class(name)
            if not any(loader.refusal(store) for store in stores):
                return name
    raise ValueError("pipeline = 'auto': no back end can show these data")


def imports(name: str) -> bool:
    """Whether all that a back end needs is installed."""
    try:
        _loader_class(name)
    except (ImportError, OSError):  # OSError: a library of the system is missing
        return False
    return True


def _loader_class(name: str) -> type[Loader]:
    if name not in BACK_ENDS:
        raise ValueError(f"pipeline = {name!r}: must be one of {', '.join(BACK_ENDS)}")
    back_end = BACK_ENDS[name]
    try:
        return getattr(import_module(back_end.module), back_end.loader)
    except ImportError as error:
        raise ImportError(
            f"pipeline = {name!r} needs a package that is missing ({error}): {back_end.install}"
        ) from error
