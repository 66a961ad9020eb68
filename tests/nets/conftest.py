"""Every test of this folder draws fresh random input; SEED=n repeats a failed one."""

from __future__ import annotations

import pytest
from torch import nn


@pytest.fixture(autouse=True)
def fresh_draws(seed: int) -> None:
    """Each test begins with `seed`."""


def randomise_norms(model: nn.Module) -> None:
    """Give every norm the values of some training, so that mixing them up shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.7, 1.5)  # type: ignore[arg-type]
