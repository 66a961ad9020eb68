"""The weights of rows and norms: the paper's numbers, and both ways of adding in plain sums."""

import random

import pytest

from fap.methods import KINDS
from fap.sections import MethodConfig
from fap.step.passes import rows_of
from fap.step.weights import weights_of

FAST = {"name": "fast_advprop", "p_adv": "1/5"}


def test_the_authors_numbers() -> None:
    """64 clean rows at 1, 16 noise and 16 adversarial ones at 1/2: 80 in all (section 3.2.2)."""
    method = MethodConfig.model_validate(FAST)
    weights = weights_of(method, rows_of(method, 64), world=1)
    assert weights.of_row == {"clean": 1 / 80, "noise": 0.5 / 80, "adv": 0.5 / 80}
    assert (weights.main, weights.aux) == (80 / 64, 80 / 16)


@pytest.mark.parametrize(("weights", "total"), [((0.5, 0.5), 80), ((1.0, 1.0), 96)])
def test_without_sync_everything_is_divided_by_the_sum(
    weights: tuple[float, float], total: int
) -> None:
    noise, adv = weights
    method = MethodConfig.model_validate(
        FAST | {"sync": False, "weight_noise": noise, "weight_adv": adv}
    )
    found = weights_of(method, rows_of(method, 64), world=1)
    assert found.of_row["clean"] == 1 / total
    assert (found.main, found.aux) == (1, 1)


@pytest.mark.parametrize("name", ["vanilla", "advprop", "decoupled", "adversarial_training"])
def test_other_methods_divide_by_their_rows(name: str) -> None:
    method = MethodConfig.model_validate({"name": name})
    n_rows = rows_of(method, 128)
    found = weights_of(method, n_rows, world=2)
    total = 2 * sum(n_rows.values())
    assert all(found.of_row[kind] == 1 / total for kind in KINDS if n_rows[kind])
    assert (found.main, found.aux) == (1, 1)


def test_means_of_each_kind_are_added_with_their_weights() -> None:
    """Algorithm 1, for random losses over two ranks."""
    method = MethodConfig.model_validate(FAST | {"combine": "mean", "weight_noise": 0.25})
    n_rows = rows_of(method, 64)
    found = weights_of(method, n_rows, world=2)
    losses = {kind: [random.random() for _ in range(2 * n_rows[kind])] for kind in KINDS}
    loss = sum(found.of_row[kind] * sum(losses[kind]) for kind in KINDS)
    mean = {kind: sum(losses[kind]) / len(losses[kind]) for kind in KINDS}
    assert loss == pytest.approx(mean["clean"] + 0.25 * mean["noise"] + 0.5 * mean["adv"])


def test_more_ranks_are_more_rows() -> None:
    method = MethodConfig.model_validate(FAST)
    one = weights_of(method, rows_of(method, 256), world=1)
    four = weights_of(method, rows_of(method, 64), world=4)
    assert one == four
