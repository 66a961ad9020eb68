"""The weights of a step: of every row's loss, and of the norms' gradients (section 3.2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fap.methods import KINDS, Kind
from fap.nets.norm import Bn
from fap.sections import MethodConfig


class Weights(NamedTuple):
    """Factors that stay fixed for a run."""

    of_row: Mapping[Kind, float]
    """The loss of a step is the sum over all rows of all ranks of their losses times these."""
    main: float
    """For the gradients of the main norms, once all passes are done."""
    aux: float


def weights_of(
    method: MethodConfig,
    n_rows: Mapping[Kind, int],  # rows of each kind that are trained on one device
    world: int,
) -> Weights:
    """The weights of a run's steps.

    With w the method's weight of a kind and W the sum of w over all rows of the step, a row's loss
    counts w / W, as in the authors' code: 80 for each 64 clean rows, 64 + 16/2 + 16/2. The norms
    see only a part of the rows. Update-speed synchronisation divides their gradients by the
    weights that reached them instead: a factor of 80/64 for the main ones, 80/16 for the auxiliary
    ones.

    `combine: mean` is Algorithm 1 to the letter: means over each kind, added with their weights.
    """
    weight: dict[Kind, float] = {
        "clean": _one_if_unset(method.weight_clean),
        "noise": _one_if_unset(method.weight_noise),
        "adv": _one_if_unset(method.weight_adv),
    }
    if method.combine == "mean":
        of_row = {kind: weight[kind] / (n_rows[kind] * world) for kind in KINDS if n_rows[kind]}
        return Weights(of_row, main=1.0, aux=1.0)

    reached: dict[Kind, float] = {kind: weight[kind] * n_rows[kind] * world for kind in KINDS}
    total = sum(reached.values())

    def speed(bn: Bn) -> float:
        """The factor of a set of norms' gradients; 1 for norms that no row goes through."""
        through = sum(reached[kind] for kind in KINDS if method.norms.get(kind) == bn)
        if not (method.sync and through):
            return 1.0
        return total / through

    of_row = {kind: weight[kind] / total for kind in KINDS}
    return Weights(of_row, main=speed("main"), aux=speed("aux"))


def _one_if_unset(weight: float | None) -> float:
    """A method with one kind of rows has no weights."""
    return 1.0 if weight is None else weight
