"""Models with dual norms: to and from the plain model, and how all norms of one normalise.

The norms themselves are in `fap.nets.norm` (batch norms) and `fap.nets.row_norm` (all others).
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fap.nets.norm import DUAL, Bn, DualBatchNorm, DualNorm, Group, NormState, can_be_dual
from fap.nets.row_norm import is_row_norm, make_dual

NO_SYNC = (
    "the statistics of Fast AdvProp are those of row groups on one device, "
    "so leave convert_sync_batchnorm out: "
    "method.group_rows sets how many rows are normalised together"
)
STATE = "norm_state"  # the attribute by which a converted model is known
AUX = "aux"  # of a norm: the module that is its auxiliary part
STATISTICS = ("running_mean", "running_var")


def convert(model: nn.Module, aux: bool = True, *, any_norm: bool = False) -> nn.Module:
    """Make every norm of `model` a dual one in place; returns the model.

    Those are batch norms of torch and timm's BatchNormAct2d, and norms without batch statistics
    that have parameters (`fap.nets.row_norm`). A model may have none. Parameter names stay those of
    the plain model. The second set lives under `<norm>.aux` and starts as a copy.

    Raises ValueError for a norm with batch statistics of another kind, which cannot normalise
    group by group. With `any_norm` such a norm stays as it is, and sees a batch as one group.
    """
    shared = NormState()
    made: dict[nn.Module, DualNorm] = {}  # a norm that lies in two places stays one
    for path, parent in list(model.named_modules()):
        for name, child in parent._modules.items():
            if child is None or isinstance(parent, DualNorm) or isinstance(child, DualNorm):
                continue
            own_path = f"{path}.{name}" if path else name
            norm = made.get(child) or _converted(child, shared, aux, any_norm, own_path)
            if norm is not None:
                norm.path = own_path
                made[child] = norm
                parent._modules[name] = norm
    setattr(model, STATE, shared)
    if any(isinstance(norm, DualBatchNorm) for norm in made.values()):
        model.register_forward_pre_hook(_refuse_sync)
    return model


def _converted(
    module: nn.Module, shared: NormState, aux: bool, any_norm: bool, path: str
) -> DualNorm | None:
    """What a module becomes; None if it stays as it is."""
    if can_be_dual(module):
        assert isinstance(module, _BatchNorm)
        return DUAL[type(module)](module, shared, aux)
    if is_row_norm(module):
        make_dual(module, shared, aux)
        assert isinstance(module, DualNorm)
        return module
    if isinstance(module, nn.SyncBatchNorm):
        cls = type(module)
        raise ValueError(f"model: {path} is a {cls.__module__}.{cls.__name__}; {NO_SYNC}")
    if has_batch_statistics(module) and not any_norm:
        _refuse(path, module)
    return None


def has_batch_statistics(module: nn.Module) -> bool:
    """Is it a norm, of any library, whose rows depend on each other?"""
    if isinstance(module, _NormBase):
        # An InstanceNorm without running statistics has those of each row.
        return isinstance(module, _BatchNorm) or module.track_running_stats
    # By name too: libraries have batch norms that inherit nothing from torch's.
    buffers = dict(module.named_buffers(recurse=False))
    return "BatchNorm" in type(module).__name__ or any(name in buffers for name in STATISTICS)


def _refuse(path: str, module: nn.Module) -> None:
    """Raise ValueError for a norm that has no dual twin."""
    if type(module) in DUAL:
        raise ValueError(
            f"model: {path} is a {module}: only affine batch norms with running statistics and a "
            "momentum can be given an auxiliary twin"
        )
    cls = type(module)
    raise ValueError(
        f"model: {path} is a {cls.__module__}.{cls.__name__}, whose statistics are those of a "
        "batch: of such norms only torch's BatchNorm1d, 2d and 3d and timm's BatchNormAct2d can be "
        "given an auxiliary twin; method.name=vanilla trains with any norm"
    )


def _refuse_sync(model: nn.Module, _: Any) -> None:
    """Raise ValueError if a converted model's norms became SyncBatchNorm: before every forward.

    Such a conversion meets all batch norms, so the first one tells.
    """
    if torch.compiler.is_compiling():
        return
    for module in model.modules():
        if isinstance(module, DualBatchNorm):
            return
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"model: its batch norms became {type(module).__name__} after `convert`; {NO_SYNC}"
            )


def norms(model: nn.Module) -> list[DualNorm]:
    """The dual norms of a converted model; none of a plain one.

    Raises ValueError if they became SyncBatchNorm.
    """
    found = []
    converted = False
    for name, module in model.named_modules():  # a parent comes before its children
        converted |= STATE in module.__dict__
        if isinstance(module, DualNorm):
            found.append(module)
        elif isinstance(module, nn.SyncBatchNorm) and converted:
            raise ValueError(
                f"model: {name} became a {type(module).__name__} after `convert`; {NO_SYNC}"
            )
    return found


def has_aux(model: nn.Module) -> bool:
    """Has a converted model auxiliary norms?"""
    return any(norm.aux is not None for norm in norms(model))


def undivided(model: nn.Module) -> list[str]:
    """Classes of a converted model's norms that see a whole batch as one group, once per norm."""
    dual = norms(model)
    known = {module for norm in dual for module in norm.modules()}
    found = [norm.plain_name for norm in dual if norm.whole_batch]
    for module in model.modules():
        if module not in known and has_batch_statistics(module):
            found.append(type(module).__name__)
    return found


def counted(names: Iterable[str]) -> str:
    """For example `53 BatchNorm2d, 24 LayerNorm2d`."""
    return ", ".join(f"{n} {name}" for name, n in Counter(names).items())


def statistics(model: nn.Module) -> list[Tensor]:
    """The running statistics of all norms, also of those that are not dual, each once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in STATISTICS and buffer.is_floating_point():
                found[id(buffer)] = buffer
    return [*found.values()]


def is_converted(model: nn.Module) -> bool:
    """Is it, or holds it, what `convert` has made?"""
    return any(STATE in module.__dict__ for module in model.modules())


def names_of_main(model: nn.Module) -> dict[str, str]:
    """Names of the auxiliary norms' tensors -> those of the main norms' that they begin as."""
    names: dict[str, str] = {}
    dual = set(norms(model))
    for path, module in model.named_modules():
        if module in dual and module.aux is not None:
            prefix = f"{path}." if path else ""
            names |= {f"{prefix}aux.{k}": f"{prefix}{k}" for k in module.aux.state_dict()}
    return names


def divides_statistics(model: nn.Module) -> bool:
    """Has a converted model statistics of groups? Only batch norms take any."""
    return any(isinstance(norm, DualBatchNorm) and not norm.whole_batch for norm in norms(model))


def norm_state(model: nn.Module) -> NormState:
    """The one `NormState` of a converted model. Raises ValueError for any other model."""
    found = norms(model)
    if found:
        return found[0].shared
    for module in model.modules():
        if STATE in module.__dict__:
            shared = module.__dict__[STATE]
            assert isinstance(shared, NormState)
            return shared
    raise ValueError(
        f"model: {type(model).__name__} has no dual norms; fap.nets.dual.convert makes them"
    )


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
    shared = norm_state(model)
    found = norms(model)
    for norm in found:
        norm.branch(bn)  # raises where there is none
    if bn == "aux" and not found:
        raise ValueError(f"bn = 'aux': {type(model).__name__} has no norms")
    former = shared.eval_bn
    shared.eval_bn = bn
    try:
        yield
    finally:
        shared.eval_bn = former


def export(
    state: dict[str, Tensor], steps: int | None = None, bn: Bn = "main"
) -> dict[str, Tensor]:
    """The plain model's state dict, from that of a converted one: with its norms of `bn` alone.

    Forwards in groups do not count `num_batches_tracked`, so it is set to `steps`. None keeps what
    is there, which is right for a model that was only trained without groups. Raises ValueError
    for "aux" where there are no auxiliary norms.
    """
    auxiliary = _auxiliary(state)
    plain = {k: v for k, v in state.items() if not k.startswith(auxiliary)}
    if bn == "aux":
        if not auxiliary:
            raise ValueError("bn = 'aux': there are no auxiliary norms; must be 'main'")
        for prefix in auxiliary:
            norm = prefix.removesuffix(f"{AUX}.")
            for name, value in state.items():
                if name.startswith(prefix):
                    plain[norm + name.removeprefix(prefix)] = value
    if steps is None:
        return plain
    for name, value in plain.items():
        if name.endswith("num_batches_tracked"):
            plain[name] = torch.full_like(value, steps)
    return plain


def _auxiliary(state: dict[str, Tensor]) -> tuple[str, ...]:
    """What the names of auxiliary norms' tensors begin with.

    A model may have a module of its own that is called aux. An auxiliary norm has tensors of the
    names and shapes that the module around it has too.
    """
    inside: dict[str, list[str]] = {}
    for name in state:
        parts = name.split(".")
        for i, part in enumerate(parts[:-1]):
            if part == AUX:
                prefix = "".join(f"{one}." for one in parts[: i + 1])
                inside.setdefault(prefix, []).append(name.removeprefix(prefix))
    auxiliary = []
    for prefix, names in inside.items():
        norm = prefix.removesuffix(f"{AUX}.")
        main = [state.get(norm + name) for name in names]
        twins = [state[prefix + name] for name in names]
        if all(m is not None and m.shape == t.shape for m, t in zip(main, twins, strict=True)):
            auxiliary.append(prefix)
    return tuple(auxiliary)
