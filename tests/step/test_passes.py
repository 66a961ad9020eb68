"""Passes, blocks and groups against plain loops, and what fixes them for a run."""

import random
from fractions import Fraction
from typing import Any

import pytest

from fap.methods import METHODS
from fap.nets.norm import momentum_of
from fap.sections import MethodConfig
from fap.step.passes import passes_of, rows_of

SCHEDULES = ("sequential", "fused", "pipelined", "parallel")


def any_method() -> tuple[MethodConfig, int]:
    """A random method with its clean rows."""
    name = random.choice(list(METHODS))
    given: dict[str, Any] = {"name": name, "group_rows": random.choice([4, 8, 12])}
    if "p_adv" in METHODS[name].defaults:
        given["p_adv"] = random.choice([Fraction(1, 5), Fraction(1, 3), Fraction(1, 2)])
        if given["group_rows"] * given["p_adv"] / (1 - given["p_adv"]) < 2:
            given["p_adv"] = Fraction(1, 2)
    if "schedule" in METHODS[name].defaults:
        given["schedule"] = random.choice(SCHEDULES)
    method = MethodConfig.model_validate(given)
    return method, method.group_rows * random.randrange(1, 6)


def test_every_row_is_trained_once_in_its_place() -> None:
    for _ in range(300):
        method, n_clean = any_method()
        trained: dict[str, list[int]] = {}
        for one in passes_of(method, n_clean):
            place = 0
            for block in one.blocks:
                assert block.rows == slice(place, place + block.n_rows)
                place += block.n_rows
                trained.setdefault(block.kind, []).extend(range(block.start, block.stop))
            assert place == one.n_rows
            assert sum(group.rows for group in one.groups) == one.n_rows
        n_rows = rows_of(method, n_clean)
        expected = {kind: list(range(n)) for kind, n in n_rows.items() if n}
        if method.schedule == "pipelined":
            both = n_rows["noise"] + n_rows["adv"]
            expected = {"clean": expected["clean"], "joined": list(range(both))}
        assert {kind: sorted(rows) for kind, rows in trained.items()} == expected


def test_groups_of_one_kind_make_one_average() -> None:
    """However the passes divide them: r <- 0.9 r + 0.1 mean, once for each kind."""
    for _ in range(300):
        method, n_clean = any_method()
        calls: dict[str, list[tuple[int, int]]] = {}
        for one in passes_of(method, n_clean):
            for block in one.blocks:
                norms = {group.bn for group in block.groups}
                kind = "adv" if block.kind == "joined" else block.kind
                assert norms == {method.entry.norms[kind]}
                found = [(group.call, group.calls) for group in block.groups]
                calls.setdefault(block.kind, []).extend(found)
        for numbers in calls.values():
            n = len(numbers)
            assert numbers == [(call, n) for call in range(n)]


def test_the_momenta_of_a_kind_are_one_exponential_average() -> None:
    for n_groups in (1, 3, 5):
        method = MethodConfig.model_validate({"group_rows": 4, "p_adv": "1/3"})
        running = 7.0
        statistics = [random.random() for _ in range(n_groups)]
        groups = [
            group
            for one in passes_of(method, 4 * n_groups)
            for block in one.blocks
            for group in block.groups
            if block.kind == "clean"
        ]
        for group, statistic in zip(groups, statistics, strict=True):
            running += momentum_of(0.1, group) * (statistic - running)
        assert running == pytest.approx(0.9 * 7.0 + 0.1 * sum(statistics) / n_groups)


@pytest.mark.parametrize(
    ("n_groups", "first", "second"), [(1, 64, 0), (2, 64, 64), (3, 128, 64), (4, 128, 128)]
)
def test_fused_divides_the_clean_groups(n_groups: int, first: int, second: int) -> None:
    one, two = passes_of(MethodConfig.model_validate({}), 64 * n_groups)
    assert [block.kind for block in one.blocks] == ["clean", "noise"]
    assert one.blocks[0].n_rows == first
    assert [block.kind for block in two.blocks] == ["clean", "adv"][second == 0 :]
    assert two.n_rows == second + 16 * n_groups


@pytest.mark.parametrize("name", METHODS)
def test_only_a_pass_that_trains_noise_crafts(name: str) -> None:
    passes = passes_of(MethodConfig.model_validate({"name": name}), 128)
    crafting = [one.crafting.kind for one in passes if one.crafting is not None]
    assert crafting == (["noise"] if METHODS[name].recycles else [])
