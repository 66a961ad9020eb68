"""Norms whose rows know nothing of each other, with an auxiliary part: LayerNorm, GroupNorm, ...

They have no batch statistics. So their main and auxiliary parts differ in their parameters alone,
and groups of rows are only told apart by which of the two they go through.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from timm.layers import evo_norm, filter_response_norm
from timm.layers import norm as timm_norm
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from fap.nets.norm import Bn, DualNorm, NormState

# Not every version of timm that we work with has all of them.
_TIMM = {
    timm_norm: ("RmsNorm", "RmsNormFp32", "RmsNorm2d", "RmsNorm2dFp32"),
    evo_norm: ("EvoNorm2dS0", "EvoNorm2dS1", "EvoNorm2dS2"),
    filter_response_norm: ("FilterResponseNormTlu2d", "FilterResponseNormAct2d"),
}
_SIMPLE = ("SimpleNorm", "SimpleNormFp32", "SimpleNorm2d", "SimpleNorm2dFp32")
_TIMM[timm_norm] += _SIMPLE

ROW_NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    _InstanceNorm,
    *(
        getattr(file, name)
        for file, names in _TIMM.items()
        for name in names
        if hasattr(file, name)
    ),
)
"""Classes that normalise every row by itself. What inherits of them calls them, or does alike."""


class _Run(NamedTuple):
    """Consecutive rows that go through the same part."""

    bn: Bn
    n: int


class RowNorm(DualNorm):
    """Mixed into the class of a norm, whose own forward is that of its main and auxiliary parts.

    So whatever the class does besides, as timm's norms with an activation, is done here too.
    """

    def forward(
        self,
        x: Tensor,  # (sum of the groups' rows, or a multiple, ...); any number in evaluation
    ) -> Tensor:
        runs = self._runs(len(x))
        if len(runs) == 1:
            return self._through(runs[0].bn, x)
        parts = x.split([run.n for run in runs])
        return torch.cat(
            [self._through(run.bn, part) for run, part in zip(runs, parts, strict=True)]
        )

    def _through(self, bn: Bn, x: Tensor) -> Tensor:
        if bn == "aux":
            auxiliary: Tensor = self.branch("aux")(x)
            return auxiliary
        main: Tensor = super().forward(x)
        return main

    def _runs(self, n: int) -> list[_Run]:
        """Neighbouring groups of one part are one run, so that as little as possible is divided."""
        if not self.training:
            return [_Run(self.shared.eval_bn, n)]
        # Without an auxiliary part it is the plain norm, for inputs of any order.
        if self.aux is None or not self.shared.groups:
            return [_Run("main", n)]
        runs: list[_Run] = []
        for group in self.groups_of(n):
            if runs and runs[-1].bn == group.bn:
                runs[-1] = _Run(group.bn, runs[-1].n + group.rows)
            else:
                runs.append(_Run(group.bn, group.rows))
        return runs

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For pickle and copy: the class is made, so nobody finds it by its name."""
        return _new, (self.plain,), self.__dict__


def is_row_norm(module: nn.Module) -> bool:
    """Has it parameters, which an auxiliary part may differ in, and no statistics of a batch?"""
    if not isinstance(module, ROW_NORMS) or getattr(module, "track_running_stats", False):
        return False
    return any(True for _ in module.parameters())


def make_dual(norm: nn.Module, shared: NormState, aux: bool) -> None:
    """Turn a plain norm into one with an auxiliary part, a copy of it, in place."""
    plain = type(norm)
    twin = copy.deepcopy(norm) if aux else None
    norm.__class__ = _dual_class(plain)
    assert isinstance(norm, RowNorm)
    norm.shared = shared
    norm.plain_name = plain.__name__
    norm.aux = twin


_dual_classes: dict[type[nn.Module], type[nn.Module]] = {}  # one for all norms of a class


def _dual_class(plain: type[nn.Module]) -> type[nn.Module]:
    if plain not in _dual_classes:
        made = type(f"Dual{plain.__name__}", (RowNorm, plain), {"plain": plain})
        _dual_classes[plain] = made
    return _dual_classes[plain]


def _new(plain: type[nn.Module]) -> nn.Module:
    cls = _dual_class(plain)
    return cls.__new__(cls)
