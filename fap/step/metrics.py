"""What the steps of a run counted: sums on the device, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fap.distributed import Ranks
from fap.methods import KINDS, Kind

OF_A_KIND = ("loss", "correct", "rows", "nonfinite")
OF_ROWS = (
    *(f"{what}_{kind}" for kind in KINDS for what in OF_A_KIND),
    "zero_signs",  # values of an attack's direction that are exactly zero, of `signs` in all
    "signs",
)
"""Each rank counts its own rows."""
OF_STEPS = ("steps", "skipped", "skipped_in_a_row")
"""The same on every rank."""
METRICS = (*OF_ROWS, *OF_STEPS)


class Metrics:
    """Sums since they were last taken. Nothing here waits for the device but `take`."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        # Views of the sums, so that adding to one is adding to the other.
        self._sum_of = dict(zip(METRICS, self.sums.unbind(), strict=True))

    @torch.no_grad()
    def count_rows(
        self,
        kind: Kind,
        losses: Tensor,  # (rows,)
        hits: Tensor,  # bool (rows,)
    ) -> None:
        finite = losses.isfinite()
        self._sum_of[f"loss_{kind}"] += torch.where(finite, losses, 0).double().sum()
        self._sum_of[f"correct_{kind}"] += hits.sum()
        self._sum_of[f"rows_{kind}"] += len(losses)
        self._sum_of[f"nonfinite_{kind}"] += (~finite).sum()

    def count_signs(self, direction: Tensor) -> None:
        self._sum_of["zero_signs"] += (direction == 0).sum()
        self._sum_of["signs"] += direction.numel()

    def count_step(self, found_inf: Tensor) -> None:
        """`found_inf` float32 (): 1 if the step was skipped, else 0."""
        self._sum_of["steps"] += 1
        self._sum_of["skipped"] += found_inf
        in_a_row = self._sum_of["skipped_in_a_row"]
        in_a_row.add_(1).mul_(found_inf)

    def of_all_ranks(self, ranks: Ranks) -> Tensor:
        """The sums so far, over all ranks; what counts steps is common to all."""
        totals = self.sums.clone()
        ranks.sum_(totals[: len(OF_ROWS)])
        return totals

    def take(self, ranks: Ranks) -> dict[str, float]:
        """The sums over all ranks since the last call (a host sync).

        They start anew, except `skipped_in_a_row`.
        """
        totals = self.of_all_ranks(ranks)
        for name in METRICS:
            if name != "skipped_in_a_row":
                self._sum_of[name].zero_()
        return dict(zip(METRICS, totals.tolist(), strict=True))


def rates(metrics: Mapping[str, float]) -> dict[str, float]:
    """Mean loss and accuracy per kind of row, and the share of exactly zero gradient signs."""
    found: dict[str, float] = {}
    if metrics["signs"]:
        found["zero_signs"] = metrics["zero_signs"] / metrics["signs"]
    for kind in KINDS:
        n_rows = metrics[f"rows_{kind}"]
        if n_rows:
            found[f"loss_{kind}"] = metrics[f"loss_{kind}"] / n_rows
            found[f"acc_{kind}"] = metrics[f"correct_{kind}"] / n_rows
    return found
