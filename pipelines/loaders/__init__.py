"""Loaders: back ends that execute an epoch plan, opened by name."""

from importlib import import_module
from inspect import signature
from typing import Any

import torch

from pipelines.back_ends import BACK_ENDS
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
