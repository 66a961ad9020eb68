"""Fields that were called otherwise once: users hear the new name, checkpoints are read by it."""

from __future__ import annotations

from typing import Any

from fap.sections import MethodConfig
from fap.sections.budget import exact

RENAMED = {"method.group": "method.group_rows", "optim.warmup_epochs": "budget.warmup_epochs"}


def with_current_names(tree: Any) -> Any:
    """A copy of a config that an earlier version wrote, with the names that its fields have now.

    A warm-up was in epochs of the run once; it is now in those of vanilla training, as all epochs
    are.
    """
    if not isinstance(tree, dict):
        return tree
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for old, new in RENAMED.items():
        section, _, old_field = old.partition(".")
        new_section, _, new_field = new.partition(".")
        fields = tree.get(section)
        if isinstance(fields, dict) and old_field in fields:
            value = fields.pop(old_field)
            if old == "optim.warmup_epochs":
                value = _of_vanilla_training(value, tree)
            tree.setdefault(new_section, {})[new_field] = value
    return tree


def _of_vanilla_training(epochs: float, tree: dict[str, Any]) -> float:
    """Epochs of the run that a tree describes, in those of vanilla training."""
    if not tree.get("budget", {}).get("same_budget", True):
        return epochs
    method = MethodConfig.model_validate(tree.get("method", {}))
    return float(exact(epochs) * method.cost_per_image)
