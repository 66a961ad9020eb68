"""Two batch norms in one: a main one for clean rows, an auxiliary one for adversarial rows.

This is the paper's section 3.1. A batch is a sequence of groups of rows. Each group is normalised
by its own statistics, through the main or the auxiliary parameters, as if it were alone on a GPU.
The groups of the next forward are set once per pass on the `NormState` that all norms of a model
share. Without groups a converted model is the plain one: every batch goes through the main norms as
one group.

`fap.nets.row_norm` has the norms whose rows know nothing of each other; `fap.nets.dual` gives a
model its norms.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipelines.files import shown

Bn = Literal["main", "aux"]
IMAGE_DIMENSIONS = 4  # (B, C, H, W)


class Group(NamedTuple):
    """Consecutive rows that one batch norm normalises together.

    It is call `call` (from 0) of the `calls` groups whose statistics make one running average.
    With `calls` = 0 it leaves the running statistics alone.
    """

    bn: Bn
    rows: int
    call: int = 0
    calls: int = 0
    running: bool = False  # normalise with the running statistics instead of the group's own


class NormState:
    """What the norms of one model share: how the next forward normalises.

    There is one object per model, and every norm of it holds that object as `shared`. A step
    writes it before a pass and the norms read it in their forward, so nothing has to be handed
    through the model's layers.
    """

    def __init__(self) -> None:
        # Of the next training forward, in the order of its rows. Empty: any batch is one main
        # group, normalised and counted as the plain model does it.
        self.groups: tuple[Group, ...] = ()
        # The norm whose running statistics and parameters evaluation uses.
        self.eval_bn: Bn = "main"
        # What computes the norms. "triton" is `fap.nets.grouped_norm`. "framework" is torch's batch
        # norm group by group: the twin of the kernels, and what torch.compile fuses. "auto" is
        # triton for groups of a channels_last batch on a GPU, else framework.
        self.kernel: Literal["auto", "triton", "framework"] = "auto"
        # May the first dimension of a norm's input be a multiple of the rows, as where windows or
        # tokens are folded into it? Only if those of one row lie together, in the order of the
        # rows, which `fap.nets.row_order` proves.
        self.multiples = False


def momentum_of(momentum: float, group: Group) -> float:
    """Momentum m_i of call i of G, such that all G calls are one exponential average of the mean.

    m_i = (m / G) / (1 - m (G - 1 - i) / G) gives r <- (1 - m) r + m * (mean of the G statistics):
    it is larger than m / G by as much as the later calls shrink again what call i adds.
    """
    if group.calls == 0:
        return 0.0
    share = momentum / group.calls
    later_calls = group.calls - 1 - group.call
    return share / (1 - share * later_calls)


def running_weights(momenta: Sequence[float]) -> list[float]:
    """Weights w_i with which the statistics s_i of consecutive calls move the running ones at once.

    The chain r <- r + m_i (s_i - r) over all calls equals r <- r + sum of w_i (s_i - r) with
    w_i = m_i * product over later calls j of (1 - m_j). What stays of the old r is
    1 - sum of w_i = product of all (1 - m_i).
    """
    weights = []
    kept_later = 1.0  # of what one call adds, the part that the calls after it keep
    for momentum in reversed(momenta):
        weights.append(momentum * kept_later)
        kept_later *= 1 - momentum
    return weights[::-1]


class DualNorm(nn.Module):
    """What every norm with a main and an optional auxiliary part has, whatever its class.

    It keeps the parameter names of the plain norm; the auxiliary part is the module `aux`.
    """

    shared: NormState
    aux: nn.Module | None
    plain: ClassVar[type[nn.Module]]
    """The class of its auxiliary part."""
    plain_name: str
    """The class that the norm had in the plain model."""
    path: str = "a norm"
    """Its name in the model, for errors."""
    whole_batch = False
    """Is every training batch one main group, because its rows cannot be told apart?"""

    def branch(self, bn: Bn) -> nn.Module:
        """The norm that holds the parameters and running statistics of `bn`.

        Raises ValueError if there is no auxiliary one.
        """
        if bn == "main":
            return self
        if self.aux is None:
            raise ValueError(
                "bn = 'aux': this model was trained without auxiliary norms; only 'main' is there"
            )
        return self.aux

    def main_parameters(self) -> list[nn.Parameter]:
        """Those that the auxiliary part has copies of."""
        auxiliary = set() if self.aux is None else {*self.aux.parameters()}
        return [p for p in self.parameters() if p not in auxiliary]

    def groups_of(self, n: int) -> tuple[Group, ...]:
        """The groups that are set, in units of the first dimension of an input, of length `n`.

        Raises ValueError if they hold another number of rows, `multiples` of it apart.
        """
        groups = self.shared.groups
        rows = sum(g.rows for g in groups)
        if n == rows:
            return groups
        times, rest = divmod(n, rows)
        if rest or not times:
            raise ValueError(
                f"{self.path}: a batch of {n} rows, but the groups that were set are "
                f"{shown(groups)}; set_groups(model, ()) takes any batch as one main group"
            )
        if not self.shared.multiples:
            raise ValueError(
                f"{self.path}: a batch of {n} rows, {times} for each of the {rows} rows of the "
                "groups that were set, and nobody has proved in which order they lie; "
                "fap.nets.build.prepare does"
            )
        return tuple(g._replace(rows=times * g.rows) for g in groups)


class DualBatchNorm(DualNorm, _BatchNorm):
    """A batch norm under its own parameter names, with an optional second set under `aux`.

    What follows the affine map in the model may be part of the call, and then is part of the
    kernel: `relu`, after the `residual` if the forward is given one. timm's `drop` and `act` of
    BatchNormAct2d are part of the call too.
    """

    momentum: float
    aux: _BatchNorm | None
    plain: ClassVar[type[_BatchNorm]]

    def __init__(self, norm: _BatchNorm, shared: NormState, aux: bool) -> None:
        if not can_be_dual(norm):
            raise ValueError(
                f"{norm}: only affine batch norms with running statistics and a momentum "
                "can be converted"
            )
        device = norm.weight.device
        dtype = norm.weight.dtype
        options = (norm.num_features, norm.eps, norm.momentum)
        super().__init__(*options, device=device, dtype=dtype)
        given = norm.state_dict()
        own = {name: given[name] for name in self.state_dict()}
        self.load_state_dict(own)
        self.shared = shared
        self.plain_name = type(norm).__name__
        self.aux = self.plain(*options, device=device, dtype=dtype) if aux else None
        if self.aux is not None:
            self.aux.load_state_dict(own)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()
        if isinstance(norm, BatchNormAct2d):
            self.drop = norm.drop
            self.act = norm.act
        # A ReLU right after the affine map becomes part of the kernel.
        self.relu = type(self.drop) is nn.Identity and type(self.act) is nn.ReLU
        if self.relu:
            self.act = nn.Identity()
        self.train(norm.training)

    def branch(self, bn: Bn) -> _BatchNorm:
        branch = super().branch(bn)
        assert isinstance(branch, _BatchNorm)
        return branch

    def main_parameters(self) -> list[nn.Parameter]:
        """Not those of `act`, which rows of both kinds go through."""
        return [self.weight, self.bias]

    def forward(
        self,
        x: Tensor,  # (sum of the groups' rows, C, ...); any number of rows in evaluation
        residual: Tensor | None = None,  # as x; a norm with a residual has `relu`
    ) -> Tensor:
        groups = self._groups(len(x))
        if self._suits_kernel(x, groups):
            y = self._on_grid(x, residual, groups)
        else:
            y = self._group_by_group(x, residual, groups)
        return self.act(self.drop(y))

    def _groups(self, rows: int) -> tuple[Group, ...]:
        """The groups of this forward.

        Raises ValueError if those that were set hold another number of rows.
        """
        if not self.training:
            return (Group(self.shared.eval_bn, rows, running=True),)
        if self.whole_batch or not self.shared.groups:
            # The plain model's training forward, which counts itself.
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            return (Group("main", rows, call=0, calls=1),)
        return self.groups_of(rows)

    def _suits_kernel(self, x: Tensor, groups: tuple[Group, ...]) -> bool:
        if x.ndim != IMAGE_DIMENSIONS:
            return False
        match self.shared.kernel:
            case "triton":
                suits = True
            case "framework":
                suits = False
            case "auto":
                # Without groups the framework's own batch norm: bit for bit the plain model.
                suits = (
                    bool(self.shared.groups)
                    and x.is_cuda
                    and x.dtype != torch.float64
                    and x.is_contiguous(memory_format=torch.channels_last)
                )
        # The kernels know the statistics of a group only, not how to use the running ones.
        return suits and not any(g.running for g in groups)

    def _group_by_group(
        self, x: Tensor, residual: Tensor | None, groups: tuple[Group, ...]
    ) -> Tensor:
        """The forward as a call of torch's batch norm for each group."""
        if len(groups) == 1:
            (group,) = groups
            y = _normalise_group(x, self.branch(group.bn), group)
        else:
            parts = x.split([g.rows for g in groups])
            normalised = [
                _normalise_group(part, self.branch(g.bn), g)
                for part, g in zip(parts, groups, strict=True)
            ]
            y = torch.cat(normalised)
        # In place: `y` is nobody else's, and the backward of a batch norm needs its input only.
        if residual is not None:
            y += residual
        if self.relu:
            y = F.relu_(y)
        return y

    def _on_grid(self, x: Tensor, residual: Tensor | None, groups: tuple[Group, ...]) -> Tensor:
        """The forward of all groups at once, the group being a dimension of the kernels' grid."""
        # Not at the top: a CPU build of torch has no Triton.
        from fap.nets.grouped_norm import GroupedBatchNorm

        if x[0, 0].numel() == 1 and min(g.rows for g in groups) == 1:
            raise ValueError(
                "a group of one row whose channels are one pixel has no variance "
                f"(input {tuple(x.shape)}): use more rows in a group, or larger images"
            )
        if residual is not None:
            residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
        # Without auxiliary norms there are no auxiliary groups, so nothing reads these.
        aux = self if self.aux is None else self.aux
        running = (self.running_mean, self.running_var, aux.running_mean, aux.running_var)
        return GroupedBatchNorm.apply(
            x,
            residual,
            self.weight,
            self.bias,
            aux.weight,
            aux.bias,
            running,
            *_tables(groups, self.momentum, x.device),
            self.eps,
            self.relu,
        )


class DualBatchNorm1d(DualBatchNorm, nn.BatchNorm1d):
    """Of (B, C) or (B, C, L)."""

    plain = nn.BatchNorm1d


class DualBatchNorm2d(DualBatchNorm, nn.BatchNorm2d):
    """Of (B, C, H, W); the kernels are for these."""

    plain = nn.BatchNorm2d


class DualBatchNorm3d(DualBatchNorm, nn.BatchNorm3d):
    """Of (B, C, D, H, W)."""

    plain = nn.BatchNorm3d


DUAL: dict[type[nn.Module], type[DualBatchNorm]] = {
    nn.BatchNorm1d: DualBatchNorm1d,
    nn.BatchNorm2d: DualBatchNorm2d,
    nn.BatchNorm3d: DualBatchNorm3d,
    BatchNormAct2d: DualBatchNorm2d,
}
"""What becomes of batch norms of exactly these classes."""


def can_be_dual(norm: nn.Module) -> bool:
    """Is it a batch norm of a class that we know, with all that two sets of norms need?"""
    if type(norm) not in DUAL:
        return False
    assert isinstance(norm, _BatchNorm)
    return norm.affine and norm.track_running_stats and norm.momentum is not None


def _normalise_group(
    x: Tensor,  # (rows of the group, C, ...)
    norm: _BatchNorm,
    group: Group,
) -> Tensor:
    assert norm.momentum is not None
    # Statistics at rest are not even passed: a NaN would get into them by a momentum of 0 too.
    mean: Tensor | None = None
    var: Tensor | None = None
    if group.running or group.calls:
        mean = norm.running_mean
        var = norm.running_var
    use_own_statistics = not group.running
    momentum = momentum_of(norm.momentum, group)
    return F.batch_norm(
        x, mean, var, norm.weight, norm.bias, use_own_statistics, momentum, norm.eps
    )


@functools.cache  # for ever: captured graphs read the tables
def _tables(
    groups: tuple[Group, ...], momentum: float, device: torch.device
) -> tuple[Tensor, Tensor, int, int]:
    """The groups as `GroupedBatchNorm` takes them, on the device.

    First row of each group and the end of the last (int32), running weights (float32), number of
    main groups, rows of the largest group. Made once for equal groups, so a forward copies nothing
    to the device.
    """
    rows = [g.rows for g in groups]
    n_main = sum(g.bn == "main" for g in groups)
    main_comes_first = all(g.bn == "main" for g in groups[:n_main])
    assert main_comes_first, f"main groups come first, but groups {groups}"
    starts = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32, device=device)
    momenta = [momentum_of(momentum, g) for g in groups]
    # Main and auxiliary running statistics are two averages.
    weights = running_weights(momenta[:n_main]) + running_weights(momenta[n_main:])
    return starts, torch.tensor(weights, dtype=torch.float32, device=device), n_main, max(rows)
