"""Models with dual batch norms: to and from the plain model, and how all norms of one normalise.

The norm itself is `fap.nets.norm.DualBatchNorm2d`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fap.nets.norm import Bn, DualBatchNorm2d, Group, NormState

NO_SYNC = (
    "the statistics of Fast AdvProp are those of row groups on one device, "
    "so leave convert_sync_batchnorm out: "
    "method.group_rows sets how many rows are normalised together"
)


def convert(model: nn.Module, aux: bool = True) -> nn.Module:
    """Replace every BatchNorm2d (and timm BatchNormAct2d) of `model` in place; returns the model.

    Parameter names stay those of the plain model. The second set lives under `<norm>.aux` and
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
            else:
                _refuse_other_norm(name, child)
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no batch norm, "
            "so there is nothing for AdvProp to duplicate"
        )
    model.register_forward_pre_hook(_refuse_sync)
    return model


def _refuse_other_norm(name: str, module: nn.Module) -> None:
    """Raise ValueError for a batch norm that has no dual twin."""
    cls = type(module)
    if isinstance(module, nn.SyncBatchNorm):
        raise ValueError(f"model: {name} is a {cls.__module__}.{cls.__name__}; {NO_SYNC}")
    # By name too: libraries have batch norms that inherit nothing from torch's.
    if isinstance(module, _NormBase) or "BatchNorm" in cls.__name__:
        raise ValueError(
            f"model: {name} is a {cls.__module__}.{cls.__name__}; "
            "only nn.BatchNorm2d and timm's BatchNormAct2d can be given an auxiliary twin"
        )


def _refuse_sync(model: nn.Module, _: Any) -> None:
    """Raise ValueError if a converted model's norms became SyncBatchNorm: before every forward.

    Such a conversion meets all norms, so the first one tells. By this hook `norms` knows a
    converted model.
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
    """The norms of a converted model; none of a plain one.

    Raises ValueError if they became SyncBatchNorm.
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
    """The one `NormState` of a converted model. Raises ValueError for any other model."""
    found = norms(model)
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no dual batch norms; "
            "fap.nets.dual.convert makes them"
        )
    return found[0].shared


def set_groups(model: nn.Module, groups: Sequence[Group]) -> None:
    """Set the groups of rows of the next training forwards; none: any batch is one main group.

    Raises ValueError for a model that is not converted.
    """
    norm_state(model).groups = tuple(groups)


@contextlib.contextmanager
def evaluate_with(model: nn.Module, bn: Bn) -> Iterator[None]:
    """Within the block, evaluation uses the running statistics and parameters of `bn`.

    Raises ValueError for a model that is not converted, or has no norms of that name.
    """
    for norm in norms(model):
        norm.branch(bn)  # raises where there is none
    shared = norm_state(model)
    former = shared.eval_bn
    shared.eval_bn = bn
    try:
        yield
    finally:
        shared.eval_bn = former


def export(state: dict[str, Tensor], steps: int | None = None) -> dict[str, Tensor]:
    """The plain model's state dict, from that of a converted one: without the auxiliary norms.

    Forwards in groups do not count `num_batches_tracked`, so it is set to `steps`. None keeps what
    is there, which is right for a model that was only trained without groups.
    """
    # A model may have a module of its own that is called aux. An auxiliary norm is a norm right
    # inside a norm.
    auxiliary = []
    for name in state:
        norm = name.removesuffix("running_mean")
        if norm != name and f"{norm}aux.running_mean" in state:
            auxiliary.append(f"{norm}aux.")
    plain = {k: v for k, v in state.items() if not k.startswith(tuple(auxiliary))}
    if steps is None:
        return plain
    for name, value in plain.items():
        if name.endswith("num_batches_tracked"):
            plain[name] = torch.full_like(value, steps)
    return plain
