"""What is learned from the data. `TASKS` is the registry; base.py has the contract."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fap.config import Config
    from fap.tasks.base import Task

# `config.task`: where its class is. Not the class itself: its module imports models, which takes
# seconds, and the config, which asks this table what may be asked for.
TASKS = {
    "classification": "fap.tasks.classification:Classification",
    "detection": "fap.tasks.detection:Detection",
}


def make_task(config: Config) -> Task:
    """The task of a run whose data is open, so that `model.num_classes` is known.

    Raises ValueError for a config that the task cannot be trained by.
    """
    module, _, name = TASKS[config.task].partition(":")
    task: Task = getattr(import_module(module), name)(config)
    return task
