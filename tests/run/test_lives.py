"""Runs that live through what happens to runs: see lives.py for the events and the two rules."""

from __future__ import annotations

import secrets
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.conftest import noise_beton
from tests.run.lives import Life
from tests.soak_results import record

LIVES = 40  # of the soak
EVENTS = 8  # of each
SEEDS = 1 << 30


@pytest.fixture(scope="module")
def other_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other pixels than `tiny_beton`'s; every table of the file is the same."""
    return noise_beton(tmp_path_factory.mktemp("other") / "train.beton", seed=2, count=96)


def live(
    seed: int, events: int, data: Path, other: Path, folder: Path, expected: dict[str, torch.Tensor]
) -> list[str]:
    """A life's story. What goes wrong tells the seed and the story so far."""
    life = Life(seed, data, other, folder)
    try:
        life.live(events, expected)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {' | '.join(life.story)}\n{error}") from error
    return life.story


@pytest.mark.slow
def test_a_random_life(
    tiny_beton: Path, other_beton: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    live(secrets.randbelow(SEEDS), 4, tiny_beton, other_beton, tmp_path, uninterrupted)


@pytest.mark.soak
@pytest.mark.parametrize("event", Life.EVENTS, ids=lambda event: event.__name__)
def test_each_event_alone(
    event: object,
    tiny_beton: Path,
    other_beton: Path,
    tmp_path: Path,
    uninterrupted: dict[str, torch.Tensor],
) -> None:
    """After a few steps, so that there is something to lose."""
    life = Life(secrets.randbelow(SEEDS), tiny_beton, other_beton, tmp_path)
    life.ends(life.start("run.max_steps=4"), 0)
    life.EVENTS = (event,)  # type: ignore[assignment]
    life.live(1, uninterrupted)


@pytest.mark.soak
def test_lives(
    tiny_beton: Path, other_beton: Path, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    first = secrets.randbelow(SEEDS)
    events = Counter[str]()
    for seed in range(first, first + LIVES):
        folder = tmp_path / str(seed)
        story = live(seed, EVENTS, tiny_beton, other_beton, folder, uninterrupted)
        events.update(line.partition(" ")[0] for line in story)
    record("lives", {"first_seed": first, "lives": LIVES, "events": events, "bit_equal": LIVES})
