"""What a run's checkpoint says of its training: the settings that make it comparable, the cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fap.budget import budget
from fap.run_meta import RunMeta
from fap.run_settings import settings_of

# What two runs of one way of training may differ in. A name is a path's.
FREE = ("name", "seed")


@dataclass(frozen=True)
class Training:
    """The training behind a checkpoint, up to it."""

    settings: dict[str, Any]
    """What the result depends on, as `section.field`, but for the seed; JSON."""
    data: str
    """What the training images are: their number and checksum, wherever they lie."""
    steps: int
    """Optimiser steps done."""
    steps_of_run: int | None
    """What the run was set to do. None: its settings do not fit its data."""
    epochs: int
    """Done and evaluated."""
    image_passes: int | None
    """Images forward and backward once, as the budget counts them; None as above."""
    seconds: float
    """By the run's own clock, all of its processes; evaluation and saving are in it."""


def training_of(meta: RunMeta) -> Training:
    """What the metadata of a checkpoint say; they are checked, but may be a stranger's."""
    config = meta.config
    settings = settings_of(config)
    for field in FREE:
        settings.pop(field)
    steps_of_run = None
    image_passes = None
    try:
        planned = budget(config, meta.train.count)
    except ValueError:
        pass
    else:
        steps_of_run = planned.steps
        if config.run.max_steps is not None:
            steps_of_run = min(steps_of_run, config.run.max_steps)
        image_passes = meta.step * planned.image_passes_per_step
    return Training(
        settings=settings,
        data=f"{meta.train.count}-{meta.train.content}",
        steps=meta.step,
        steps_of_run=steps_of_run,
        epochs=meta.closed,
        image_passes=image_passes,
        seconds=meta.seconds,
    )
