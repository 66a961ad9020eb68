"""Two batch norms in one: a main one for clean rows, an auxiliary one for adversarial rows (section 3.1).

A batch is a sequence of row groups. Each group is normalised by its own statistics, through the main or the
auxiliary parameters, as if it were alone on a GPU. The groups of the next forward are set once per pass on
the `RowGroups` object that all norms of a model share.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

Bn = Literal["main", "aux"]


class Group(NamedTuple):
    """Consecutive rows that one batch norm normalises together."""

    bn: Bn
    rows: int
    call: int = 0
    calls: int = 0
    """This is call `call` (from 0) of the `calls` groups that make one running average; 0 calls leave it alone."""
    running: bool = False
    """Normalise with the running statistics instead of the group's own."""


class RowGroups:
    """What the norms of one model share: the groups of the next forward, and which norm evaluation uses."""

    def __init__(self) -> None:
        self.groups: tuple[Group, ...] = ()
        self.eval_bn: Bn = "main"
        self.functional = False
        """Use plain differentiable operations (torch.compile) instead of `_GroupedBatchNorm`."""


def momentum_of(norm: nn.BatchNorm2d, group: Group) -> float:
    """Momentum of call i of G, such that the G calls together are one exponential average of the mean.

    m_i = (m / G) / (1 - m (G - 1 - i) / G) gives r <- (1 - m) r + m * (mean of the G statistics).
    """
    if group.calls == 0:
        return 0.0
    assert norm.momentum is not None
    share = norm.momentum / group.calls
    return share / (1 - share * (group.calls - 1 - group.call))


class DualBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` under its own parameter names, with an optional second set under `aux`.

    `act` and `drop` follow the affine map, for timm's BatchNormAct2d, which contains them.
    """

    def __init__(self, norm: nn.BatchNorm2d, shared: RowGroups, aux: bool) -> None:
        if not (norm.affine and norm.track_running_stats and norm.momentum is not None):
            raise ValueError(f"{norm}: only affine batch norms with running statistics and a momentum can be converted")
        kind: dict[str, Any] = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        super().__init__(norm.num_features, norm.eps, norm.momentum, **kind)
        self.load_state_dict(norm.state_dict())
        self.shared = shared
        self.aux = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, **kind) if aux else None
        if self.aux is not None:
            self.aux.load_state_dict(norm.state_dict())
        self.drop = getattr(norm, "drop", None) or nn.Identity()
        self.act = getattr(norm, "act", None) or nn.Identity()
        self.train(norm.training)

    def side(self, bn: Bn) -> nn.BatchNorm2d:
        if bn == "main":
            return self
        if self.aux is None:
            raise ValueError("bn = 'aux': this model was trained without auxiliary batch norms; only 'main' is there")
        return self.aux

    def forward(
        self,
        x: Tensor,  # (sum of the groups' rows, C, H, W); any number of rows in evaluation
    ) -> Tensor:
        return self.act(self.drop(self._normalise(x)))

    def _normalise(self, x: Tensor) -> Tensor:
        if not self.training:
            return _normalise_group(x, self.side(self.shared.eval_bn), Group(self.shared.eval_bn, len(x), running=True))
        groups = self.shared.groups
        assert sum(g.rows for g in groups) == x.shape[0], f"{x.shape[0]} rows, but groups {groups}"
        if len(groups) == 1:
            return _normalise_group(x, self.side(groups[0].bn), groups[0])
        if self.shared.functional or any(g.running for g in groups):
            parts = x.split([g.rows for g in groups])
            return torch.cat([_normalise_group(p, self.side(g.bn), g) for p, g in zip(parts, groups, strict=True)])
        aux = self.aux if self.aux is not None else self
        return _GroupedBatchNorm.apply(x, self.weight, self.bias, aux.weight, aux.bias, self, groups)


def _normalise_group(x: Tensor, norm: nn.BatchNorm2d, group: Group) -> Tensor:
    mean, var = (norm.running_mean, norm.running_var) if group.running or group.calls else (None, None)
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, not group.running, momentum_of(norm, group), norm.eps)


class _GroupedBatchNorm(torch.autograd.Function):
    """Every group normalised by the native kernel straight into its slice of one output: no split, no cat.

    Twin: `split` + `F.batch_norm` + `cat`, the `functional` branch above.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, aux_weight: Tensor, aux_bias: Tensor,
                norm: DualBatchNorm2d, groups: tuple[Group, ...]) -> Tensor:  # fmt: skip
        memory_format = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        x = x.contiguous(memory_format=memory_format)
        y = torch.empty_like(x, memory_format=memory_format)
        stats = weight.new_empty(2, len(groups), x.shape[1])
        row = 0
        for g, mean, invstd in zip(groups, stats[0], stats[1], strict=True):
            side, rows = norm.side(g.bn), slice(row, row + g.rows)
            tracked = (side.running_mean, side.running_var) if g.calls else (None, None)
            torch.native_batch_norm(x[rows], side.weight, side.bias, *tracked, True, momentum_of(side, g), side.eps,
                                    out=(y[rows], mean, invstd))  # fmt: skip
            row += g.rows
        ctx.save_for_backward(x, weight, aux_weight, stats)
        ctx.groups, ctx.eps, ctx.memory_format = groups, norm.eps, memory_format
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, aux_weight, stats = ctx.saved_tensors
        gy = gy.contiguous(memory_format=ctx.memory_format)
        gx = torch.empty_like(x, memory_format=ctx.memory_format)
        affine = torch.empty_like(stats)  # gradients of weight and bias, per group
        row = 0
        for k, g in enumerate(ctx.groups):
            rows = slice(row, row + g.rows)
            torch.ops.aten.native_batch_norm_backward.out(
                gy[rows], x[rows], weight if g.bn == "main" else aux_weight, None, None, stats[0, k], stats[1, k],
                True, ctx.eps, [True, True, True], out0=gx[rows], out1=affine[0, k], out2=affine[1, k],
            )  # fmt: skip
            row += g.rows
        grads: dict[Bn, tuple[Tensor | None, Tensor | None]] = {"main": (None, None), "aux": (None, None)}
        for bn in {g.bn for g in ctx.groups}:
            of_bn = [k for k, g in enumerate(ctx.groups) if g.bn == bn]
            # The groups of one norm are consecutive in every pass, so this is a view.
            assert of_bn == list(range(of_bn[0], of_bn[-1] + 1))
            grads[bn] = tuple(affine[:, of_bn[0] : of_bn[-1] + 1].sum(1))
        return gx, *grads["main"], *grads["aux"], None, None


def convert(model: nn.Module, aux: bool = True) -> nn.Module:
    """Replace every BatchNorm2d (and timm BatchNormAct2d) of `model` in place; returns the model.

    Parameter names stay those of the plain model; the second set lives under `<norm>.aux` and starts as a copy.
    Raises ValueError for a batch norm of another class, and for a model without any.
    """
    shared = RowGroups()
    found = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in (nn.BatchNorm2d, BatchNormAct2d):
                assert isinstance(child, nn.BatchNorm2d)
                setattr(parent, name, DualBatchNorm2d(child, shared, aux))
                found += 1
            elif isinstance(child, nn.modules.batchnorm._NormBase) or "BatchNorm" in type(child).__name__:
                raise ValueError(
                    f"model: {name} is a {type(child).__module__}.{type(child).__name__}; only nn.BatchNorm2d and timm's "
                    "BatchNormAct2d can be given an auxiliary twin"
                )
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no batch norm, so there is nothing for AdvProp to duplicate")
    return model


def norms(model: nn.Module) -> list[DualBatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, DualBatchNorm2d)]


def shared_groups(model: nn.Module) -> RowGroups:
    """The one `RowGroups` object of a converted model."""
    return norms(model)[0].shared


def set_groups(model: nn.Module, groups: Sequence[Group]) -> None:
    """Row groups of the next training forwards of a converted model."""
    shared_groups(model).groups = tuple(groups)


@contextlib.contextmanager
def evaluate_with(model: nn.Module, bn: Bn) -> Iterator[None]:
    """Within the block, evaluation uses the running statistics and parameters of `bn`. Raises ValueError."""
    for norm in norms(model):
        norm.side(bn)
    shared = shared_groups(model)
    former, shared.eval_bn = shared.eval_bn, bn
    try:
        yield
    finally:
        shared.eval_bn = former


def export(state: dict[str, Tensor], steps: int = 0) -> dict[str, Tensor]:
    """The plain model's state dict: no `aux` keys; `num_batches_tracked` (not counted in training) set to `steps`."""
    prefixes = tuple(
        k.removesuffix("running_mean") for k in state if k.endswith(".aux.running_mean") or k == "aux.running_mean"
    )
    plain = {k: v for k, v in state.items() if not k.startswith(prefixes)} if prefixes else dict(state)
    return {k: torch.full_like(v, steps) if k.endswith("num_batches_tracked") else v for k, v in plain.items()}
