"""Stochastic depth (arXiv 1603.09382): residual branches that are left out of random rows."""

from __future__ import annotations

from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth


def rates_of(model: nn.Module) -> list[float]:
    """How often each branch that can be left out is, in the model's order."""
    rates: list[float] = []
    for module in model.modules():
        if isinstance(module, DropPath):
            rates.append(module.drop_prob or 0.0)
        elif isinstance(module, StochasticDepth):
            rates.append(module.p)
    return rates


def rescale(model: nn.Module, drop_path: float) -> None:
    """Make `drop_path` the largest rate of torchvision's model, in place, and the others in
    proportion; theirs grow with depth, as timm's do.
    """
    largest = max(rates_of(model), default=0.0)
    if largest == 0:  # there is none
        return
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p *= drop_path / largest
