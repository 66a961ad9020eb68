"""The metadata of a run's checkpoint: what stands beside its tensors, and the check of it.

A checkpoint may come from anyone, or from an earlier version. What is read from one is data that
nobody has checked until `run_meta` has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fap.checkpoint import DamagedCheckpoint
from fap.config import Config, make_config
from fap.renamed import with_current_names
from pipelines.files import one_line, shown
from pipelines.names import checked_names

MOST_CONFIG_KEYS = 1000  # of a config's top level; ours has a dozen
MOST_PARTS = 4  # of a field's dotted name in a message
# What a config that is none of ours may raise on its way through the validators.
NO_CONFIG = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Count = Annotated[int, Field(ge=0, le=1 << 53)]
_Numbers = Annotated[dict[Annotated[str, Field(max_length=100)], float], Field(max_length=1000)]
_Text = Annotated[str, Field(max_length=1000)]


class DataIdentity(_Strict):
    """What a run's data is, wherever it lies; `pipelines.Store.identity` says it."""

    count: _Count
    # Any, because pydantic's own check of a text refuses surrogates.
    classes: Annotated[Any, BeforeValidator(checked_names)]
    """tuple[str, ...] | None: the class names in the order of the labels."""
    content: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


class RunMeta(_Strict):
    """The metadata of a run's checkpoint: `fap.run.saving` writes it, everyone else reads it."""

    config: Config
    """With `model.num_classes`; read by the names that its fields have now."""
    step: _Count
    """Optimiser steps done."""
    closed: _Count
    """Epochs evaluated and logged."""
    totals: _Numbers
    """Sums over the steps of the epoch so far, by the names of the step's METRICS."""
    best: _Numbers
    """The task's primary metric in its best epoch, and the number of that epoch."""
    best_step: _Count | None = None
    """Whose checkpoint is that of the best epoch. None: nothing has been evaluated, or an earlier
    version wrote this."""
    last: _Numbers
    """The newest evaluation."""
    last_step: _Count | None = None
    """Of which step it is. None: nothing has been evaluated, or an earlier version wrote this."""
    seconds: Annotated[float, Field(ge=0, le=1e12)]
    """Of all processes of the run."""
    world: Annotated[int, Field(ge=1, le=1 << 20)]
    """Ranks."""
    dropout: bool | None = None
    """Did the steps draw from torch's generator, which every rank seeds for itself? None: an
    earlier version wrote this."""
    versions: Annotated[dict[_Text, _Text | None], Field(max_length=1000)]
    train: DataIdentity
    val: DataIdentity

    @model_validator(mode="before")
    @classmethod
    def _read_config(cls, written: Any) -> Any:
        if not isinstance(written, dict) or not isinstance(written.get("config"), dict):
            return written
        return written | {"config": _config_of(written["config"])}

    @model_validator(mode="after")
    def _check(self) -> RunMeta:
        if self.closed > self.step:
            raise ValueError(f"closed = {self.closed} epochs in step = {self.step} steps")
        if self.best_step is not None and self.best_step > self.step:
            raise ValueError(f"best_step = {self.best_step} after step = {self.step}")
        if self.last_step is not None and self.last_step > self.step:
            raise ValueError(f"last_step = {self.last_step} after step = {self.step}")
        if "epoch" not in self.best or len(self.best) != 2:
            raise ValueError("best must hold one metric and epoch")
        n_classes = self.config.model.num_classes
        if n_classes is None:
            raise ValueError("config.model.num_classes is not set")
        names = self.train.classes
        if names is not None and len(names) > n_classes:
            raise ValueError(
                f"{len(names)} class names, but config.model.num_classes = {n_classes}"
            )
        return self


def _config_of(tree: dict[str, Any]) -> Config:
    if len(tree) > MOST_CONFIG_KEYS:
        raise ValueError(
            f"its config has {len(tree):,} keys, at most {MOST_CONFIG_KEYS:,} are read"
        )
    try:
        return make_config(with_current_names(tree))
    except NO_CONFIG as error:
        raise ValueError(f"its config is none of this version: {one_line(error)}") from None


def run_meta(path: str | Path, meta: dict[str, Any]) -> RunMeta:
    """The metadata of the checkpoint at `path`, checked.

    Raises DamagedCheckpoint, or ValueError if it is none of a training run.
    """
    if not {"config", "step"} <= meta.keys():
        raise ValueError(
            f"{path}: no checkpoint of a training run (its metadata has no config or step);"
            " fap-eval and model.init take plain weights"
        )
    try:
        return RunMeta.model_validate(meta)
    except ValidationError as error:
        raise DamagedCheckpoint(f"{path}: metadata: {_first_of(error)}") from None


def _first_of(error: ValidationError) -> str:
    """The first finding, in one line."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"][:MOST_PARTS])
    if not field:  # found by a validator of the whole: its text names the field, and is cut already
        return first["msg"].removeprefix("Value error, ")
    return f"{shown(field)}: {one_line(ValueError(first['msg']))}"
