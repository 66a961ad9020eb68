"""The images that a run validated on: opened again, and compared with what they were."""

from __future__ import annotations

from pathlib import Path

import pipelines
from fap import checkpoint
from fap.config import load_config
from fap.run_meta import RunMeta, run_meta
from pipelines import Store
from pipelines.files import readable
from pipelines.subset import SubsetStore, held_out

CONFIG = "config.yaml"  # in a run's folder


def validated_on(
    run: Path,  # what the user named
    of: Path,  # the checkpoint that was found there
) -> Store:
    """What a run validated on, by the paths in its folder's config.

    A checkpoint alone names no data: it may come from anyone, and what stands in it is no path to
    open. Raises ValueError where nothing is there any more, or something else; DamagedCheckpoint,
    DamagedData, OSError.
    """
    data = load_config(_config_of(run)).data
    source = data.val
    name = "data.val"
    if data.val_share is not None:
        source = data.train
        name = f"data.val_share = {data.val_share:g} of data.train"
    if source is None:
        raise ValueError(f"{run}: its config names no data.val: give --data")
    try:
        store = pipelines.open_store(source)
    except ValueError as error:
        raise ValueError(
            f"{run}: its run validated on {name} = {readable(source)}; give --data ({error})"
        ) from None
    if data.val_share is not None:
        _, store = held_out(store, data.val_share)
    check_validated_on(of, store)
    return store


def check_validated_on(path: Path, store: Store) -> None:
    """ValueError unless the run of the checkpoint at `path` validated on the images of `store`."""
    meta = _meta_of(path)
    found = store.identity()
    if found != meta.val.model_dump():
        raise ValueError(
            f"{path}: its run validated on other images ({meta.val.count:,}) than there are in "
            f"{readable(store.path)} now ({found['count']:,}): say with --data what you mean"
        )


def part_of(store: Store, share: float) -> SubsetStore:
    """The part of `store` that data.val_share holds out. Raises ValueError."""
    if not 0 < share < 0.5:
        raise ValueError(f"--val-share {share:g}: must be above 0 and below 0.5")
    try:
        _, part = held_out(store, share)
    except ValueError as error:
        raise ValueError(f"--val-share {share:g}: {error}") from None
    return part


def _config_of(run: Path) -> Path:
    """The config beside the checkpoints of a run that is named by its folder."""
    for folder in (run, run.parent):
        if run.is_dir() and (folder / CONFIG).is_file():
            return folder / CONFIG
    raise ValueError(
        f"{run}: say with --data what to evaluate on; only a run's folder, which has a {CONFIG}, "
        "says what it validated on"
    )


def _meta_of(path: Path) -> RunMeta:
    _, tree = checkpoint.load(path)
    return run_meta(path, tree)
