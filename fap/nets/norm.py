"""Two batch norms in one: a main one for clean rows, an auxiliary one for adversarial rows (section
3.1).

A batch is a sequence of row groups. Each group is normalised by its own statistics, through the
main or the auxiliary parameters, as if it were alone on a GPU. The groups of the next forward are
set once per pass on the `NormState` object that all norms of a model share. Without groups a
converted model is the plain one: every batch goes through the main norms as one group.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from pipelines.files import shown

Bn = Literal["main", "aux"]
NO_SYNC = (
    "the statistics of Fast AdvProp are those of row groups on one device, so leave"
    " convert_sync_batchnorm out: method.group_rows sets how many rows are normalised together"
)


class Group(NamedTuple):
    """Consecutive rows that one batch norm normalises together."""

    bn: Bn
    rows: int
    call: int = 0
    calls: int = 0
    """This is call `call` (from 0) of the `calls` groups that make one running average; 0 calls
    leave it alone.
    """
    running: bool = False
    """Normalise with the running statistics instead of the group's own."""


class NormState:
    """What the norms of one model share: the groups of the next forward, and which norm evaluation
    uses.
    """

    def __init__(self) -> None:
        self.groups: tuple[Group, ...] = ()
        """None: any batch is one main group, normalised and counted as the plain model does it."""
        self.eval_bn: Bn = "main"
        self.kernel: Literal["auto", "triton", "framework"] = "auto"
        """`triton`: `fap.nets.norm_kernel`; `framework`: the framework's batch norm per group, which is
        also the twin and what torch.compile fuses. auto: triton for channels_last batches on a GPU,
        else split.
        """


def momentum_of(momentum: float, group: Group) -> float:
    """Momentum of call i of G, such that the G calls together are one exponential average of the
    mean.

    m_i = (m / G) / (1 - m (G - 1 - i) / G) gives r <- (1 - m) r + m * (mean of the G statistics).
    """
    if group.calls == 0:
        return 0.0
    share = momentum / group.calls
    return share / (1 - share * (group.calls - 1 - group.call))


class DualBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` under its own parameter names, with an optional second set under `aux`.

    What follows the affine map in the model may be part of the call, and then is part of the
    kernel: `relu`, after the `residual` if the forward is given one, and timm's `drop` and `act` of
    BatchNormAct2d.
    """

    momentum: float

    def __init__(self, norm: nn.BatchNorm2d, shared: NormState, aux: bool) -> None:
        if not (norm.affine and norm.track_running_stats and norm.momentum is not None):
            raise ValueError(
                f"{norm}: only affine batch norms with running statistics and a momentum can be"
                " converted"
            )
        kind: dict[str, Any] = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        super().__init__(norm.num_features, norm.eps, norm.momentum, **kind)
        self.load_state_dict(norm.state_dict())
        self.shared = shared
        self.aux = (
            nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, **kind) if aux else None
        )
        if self.aux is not None:
            self.aux.load_state_dict(norm.state_dict())
        self.drop = getattr(norm, "drop", None) or nn.Identity()
        self.act = getattr(norm, "act", None) or nn.Identity()
        self.relu = type(self.drop) is nn.Identity and type(self.act) is nn.ReLU
        if self.relu:
            self.act = nn.Identity()
        self.train(norm.training)

    def branch(self, bn: Bn) -> nn.BatchNorm2d:
        if bn == "main":
            return self
        if self.aux is None:
            raise ValueError(
                "bn = 'aux': this model was trained without auxiliary batch norms; only 'main' is"
                " there"
            )
        return self.aux

    def forward(
        self,
        x: Tensor,  # (sum of the groups' rows, C, H, W); any number of rows in evaluation
        residual: Tensor | None = None,  # as x; a norm with a residual has `relu`
    ) -> Tensor:
        groups, kernel = self._groups(len(x)), self.shared.kernel
        if kernel == "auto":
            suits = (
                x.is_cuda
                and x.dtype != torch.float64
                and x.is_contiguous(memory_format=torch.channels_last)
            )
            # Without groups the framework's own batch norm: bit for bit the plain model.
            kernel = "triton" if suits and self.shared.groups else "framework"
        if kernel == "triton" and not any(g.running for g in groups):
            return self.act(self.drop(self._on_grid(x, residual, groups)))
        parts = x.split([g.rows for g in groups]) if len(groups) > 1 else (x,)
        normalised = [
            _normalise_group(part, self.branch(g.bn), g)
            for part, g in zip(parts, groups, strict=True)
        ]
        y = torch.cat(normalised) if len(groups) > 1 else normalised[0]
        if residual is not None:
            y += residual
        return self.act(self.drop(F.relu_(y) if self.relu else y))

    def _groups(self, rows: int) -> tuple[Group, ...]:
        """The groups of this forward. Raises ValueError if those that were set hold another number
        of rows.
        """
        if not self.training:
            return (Group(self.shared.eval_bn, rows, running=True),)
        if self.shared.groups:
            if sum(g.rows for g in self.shared.groups) != rows:
                raise ValueError(
                    f"a batch of {rows} rows, but the groups that were set are"
                    f" {shown(self.shared.groups)}; set_groups(model, ()) takes any batch as one"
                    " main group"
                )
            return self.shared.groups
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return (Group("main", rows, 0, 1),)

    def _on_grid(self, x: Tensor, residual: Tensor | None, groups: tuple[Group, ...]) -> Tensor:
        from fap.nets.norm_kernel import (
            GroupedBatchNorm,  # not at the top: a CPU build of torch has no Triton
        )

        if residual is not None:
            residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
        aux = self.aux if self.aux is not None else self
        running = self.running_mean, self.running_var, aux.running_mean, aux.running_var
        tables = _tables(groups, self.momentum, x.device)
        return GroupedBatchNorm.apply(
            x,
            residual,
            self.weight,
            self.bias,
            aux.weight,
            aux.bias,
            running,
            *tables,
            self.eps,
            self.relu,
        )


def _normalise_group(x: Tensor, norm: nn.BatchNorm2d, group: Group) -> Tensor:
    mean, var = (
        (norm.running_mean, norm.running_var) if group.running or group.calls else (None, None)
    )
    assert norm.momentum is not None
    momentum = momentum_of(norm.momentum, group)
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, not group.running, momentum, norm.eps)


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


@functools.cache  # for ever: captured graphs read them
def _tables(
    groups: tuple[Group, ...], momentum: float, device: torch.device
) -> tuple[Tensor, Tensor, int, int]:
    """The groups as `GroupedBatchNorm` takes them.

    First row of each group and their end, running weights, number of main groups, most rows.
    """
    rows = [g.rows for g in groups]
    momenta = [momentum_of(momentum, g) for g in groups]
    n_main = [g.bn for g in groups].count("main")
    assert all(g.bn == "main" for g in groups[:n_main]), (
        f"main groups come first, but groups {groups}"
    )
    starts = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32, device=device)
    # Each side has running statistics of its own.
    weights = running_weights(momenta[:n_main]) + running_weights(momenta[n_main:])
    return starts, torch.tensor(weights, dtype=torch.float32, device=device), n_main, max(rows)


def convert(model: nn.Module, aux: bool = True) -> nn.Module:
    """Replace every BatchNorm2d (and timm BatchNormAct2d) of `model` in place; returns the model.

    Parameter names stay those of the plain model; the second set lives under `<norm>.aux` and
    starts as a copy. Raises ValueError for a batch norm of another class, and for a model without
    any.
    """
    shared = NormState()
    found = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in (nn.BatchNorm2d, BatchNormAct2d):
                assert isinstance(child, nn.BatchNorm2d)
                setattr(parent, name, DualBatchNorm2d(child, shared, aux))
                found += 1
            elif isinstance(child, nn.SyncBatchNorm):
                raise ValueError(
                    f"model: {name} is a {type(child).__module__}.{type(child).__name__}; {NO_SYNC}"
                )
            elif (
                isinstance(child, nn.modules.batchnorm._NormBase)
                or "BatchNorm" in type(child).__name__
            ):
                raise ValueError(
                    f"model: {name} is a {type(child).__module__}.{type(child).__name__}; only"
                    " nn.BatchNorm2d and timm's BatchNormAct2d can be given an auxiliary twin"
                )
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no batch norm, so there is nothing for AdvProp to"
            " duplicate"
        )
    model.register_forward_pre_hook(_refuse_sync)
    return model


def _refuse_sync(model: nn.Module, _: Any) -> None:
    """Before every forward of a converted model; a conversion to SyncBatchNorm meets all norms, so
    the first one tells.
    """
    if torch.compiler.is_compiling():
        return
    for module in model.modules():
        if isinstance(module, DualBatchNorm2d):
            return
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"model: its batch norms became {type(module).__name__} after `convert`; {NO_SYNC}"
            )


def norms(model: nn.Module) -> list[DualBatchNorm2d]:
    """The norms of a converted model; none of a plain one. Raises ValueError if they became
    SyncBatchNorm.
    """
    found = []
    converted = False
    for name, module in model.named_modules():  # a parent comes before its children
        converted |= _refuse_sync in module._forward_pre_hooks.values()
        if isinstance(module, DualBatchNorm2d):
            found.append(module)
        elif isinstance(module, nn.SyncBatchNorm) and converted:
            raise ValueError(
                f"model: {name} became a {type(module).__name__} after `convert`; {NO_SYNC}"
            )
    return found


def norm_state(model: nn.Module) -> NormState:
    """The one `NormState` object of a converted model. Raises ValueError for any other."""
    found = norms(model)
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no dual batch norms; fap.nets.norm.convert makes"
            " them"
        )
    return found[0].shared


def set_groups(model: nn.Module, groups: Sequence[Group]) -> None:
    """Row groups of the next training forwards of a converted model; none: any batch is one main
    group.

    Raises ValueError for a model that is not converted.
    """
    norm_state(model).groups = tuple(groups)


@contextlib.contextmanager
def evaluate_with(model: nn.Module, bn: Bn) -> Iterator[None]:
    """Within the block, evaluation uses the running statistics and parameters of `bn`. Raises
    ValueError.
    """
    for norm in norms(model):
        norm.branch(bn)
    shared = norm_state(model)
    former, shared.eval_bn = shared.eval_bn, bn
    try:
        yield
    finally:
        shared.eval_bn = former


def export(state: dict[str, Tensor], steps: int | None = None) -> dict[str, Tensor]:
    """The plain model's state dict: no `aux` keys.

    Forwards in groups do not count `num_batches_tracked`, so it is set to `steps`; None keeps what
    is there, which is right for a model that was only trained without groups.
    """
    prefixes = tuple(
        k.removesuffix("running_mean")
        for k in state
        if k.endswith(".aux.running_mean") or k == "aux.running_mean"
    )
    plain = (
        {k: v for k, v in state.items() if not k.startswith(prefixes)} if prefixes else dict(state)
    )
    if steps is None:
        return plain
    return {
        k: torch.full_like(v, steps) if k.endswith("num_batches_tracked") else v
        for k, v in plain.items()
    }
