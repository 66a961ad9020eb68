"""Named sums: what is counted, what starts anew, and the rates made of them."""

import math

import pytest
import torch

from fap.distributed import ONE_RANK, Ranks
from fap.step.metrics import METRICS, OF_STEPS, Metrics, rates


def made() -> Metrics:
    return Metrics(torch.device("cpu"))


def test_rows_are_counted_by_kind() -> None:
    metrics = made()
    losses = torch.tensor([1.0, 2.5, float("nan"), float("inf")], requires_grad=True)
    metrics.count_rows("noise", losses, torch.tensor([True, False, True, True]))
    metrics.count_rows("noise", torch.tensor([0.5]), torch.tensor([False]))
    found = metrics.take(ONE_RANK)
    assert found.keys() == set(METRICS)
    assert found["loss_noise"] == 4
    assert found["correct_noise"] == 3
    assert found["rows_noise"] == 5
    assert found["nonfinite_noise"] == 2
    assert not any(found[name] for name in METRICS if not name.endswith("_noise"))


def test_signs() -> None:
    metrics = made()
    metrics.count_signs(torch.tensor([1.0, 0.0, -1.0, 0.0]))
    found = metrics.take(ONE_RANK)
    assert (found["zero_signs"], found["signs"]) == (2, 4)


def test_taking_starts_anew_but_for_skipped_steps_in_a_row() -> None:
    metrics = made()
    for found_inf in (0.0, 1.0, 1.0):
        metrics.count_step(torch.tensor(found_inf))
    first = metrics.take(ONE_RANK)
    assert [first[name] for name in OF_STEPS] == [3, 2, 2]
    metrics.count_step(torch.tensor(1.0))
    second = metrics.take(ONE_RANK)
    assert [second[name] for name in OF_STEPS] == [1, 1, 3]
    metrics.count_step(torch.tensor(0.0))
    assert metrics.take(ONE_RANK)["skipped_in_a_row"] == 0


def test_ranks_add_their_rows_and_share_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that counted alike: rows double, steps do not."""
    monkeypatch.setattr(Ranks, "sum_", lambda self, flat: flat.mul_(2))
    metrics = made()
    metrics.count_rows("clean", torch.ones(3), torch.ones(3, dtype=torch.bool))
    metrics.count_step(torch.tensor(0.0))
    totals = dict(zip(METRICS, metrics.of_all_ranks(ONE_RANK).tolist(), strict=True))
    assert (totals["rows_clean"], totals["loss_clean"], totals["steps"]) == (6, 6, 1)
    assert dict(zip(METRICS, metrics.sums.tolist(), strict=True))["rows_clean"] == 3


def test_the_sums_are_one_tensor_that_a_checkpoint_restores() -> None:
    """A restored tensor is what is counted on, not a copy of it."""
    metrics = made()
    metrics.count_step(torch.tensor(0.0))
    saved = metrics.sums.clone()
    other = made()
    other.sums.copy_(saved)
    other.count_step(torch.tensor(0.0))
    assert other.take(ONE_RANK)["steps"] == 2


def test_rates_leave_out_what_was_not_counted() -> None:
    counted = dict.fromkeys(METRICS, 0.0)
    assert rates(counted) == {}
    counted |= {"rows_adv": 4, "loss_adv": 6, "correct_adv": 1, "signs": 8, "zero_signs": 2}
    found = rates(counted)
    assert found == {"zero_signs": 0.25, "loss_adv": 1.5, "acc_adv": 0.25}
    assert all(math.isfinite(value) for value in found.values())
