"""Every test of this folder draws fresh random input; SEED=n repeats a failed one."""

from __future__ import annotations

import pytest
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fap.nets.row_norm import ROW_NORMS


@pytest.fixture(autouse=True)
def fresh_draws(seed: int) -> None:
    """Each test begins with `seed`."""


def randomise_norms(model: nn.Module) -> None:
    """Give every norm the values of some training, so that mixing them up shows."""
    for module in model.modules():
        if isinstance(module, (_BatchNorm, *ROW_NORMS)):
            for name, parameter in module.named_parameters(recurse=False):
                low, high = (-0.3, 0.3) if name == "bias" else (0.5, 1.5)
                nn.init.uniform_(parameter, low, high)
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.7, 1.5)  # type: ignore[arg-type]
