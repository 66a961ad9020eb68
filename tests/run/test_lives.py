"""Runs that live through what happens to runs: see lives.py for the events and the two rules."""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import write_beton
from tests.run.lives import Life
from tests.run.runs import command, environment, final_state, words
from tests.test_soak import record

LIVES, EVENTS = 40, 8  # of the soak


@pytest.fixture(scope="module")
def other_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other pixels than `tiny_beton`'s, of the same shape and labels: every table of the file is
    the same.
    """
    rng = np.random.default_rng(2)
    images = list(rng.integers(0, 256, (96, 32, 32, 3), dtype=np.uint8))
    return write_beton(
        tmp_path_factory.mktemp("other") / "train.beton", images, [i % 10 for i in range(96)]
    )


@pytest.fixture(scope="module")
def undisturbed(
    tiny_beton: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(
        command(*words(tiny_beton, folder)),
        env=environment(),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return final_state(folder / "fast_advprop" / "seed0")


def live(
    seed: int, events: int, data: Path, other: Path, folder: Path, expected: dict[str, torch.Tensor]
) -> list[str]:
    life = Life(seed, data, other, folder)
    try:
        life.live(events, expected)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {' | '.join(life.story)}\n{error}") from error
    return life.story


@pytest.mark.slow
def test_a_random_life(
    tiny_beton: Path, other_beton: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    live(secrets.randbelow(1 << 30), 4, tiny_beton, other_beton, tmp_path, undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("event", Life.EVENTS, ids=lambda event: event.__name__)
def test_each_event_alone(
    event: object,
    tiny_beton: Path,
    other_beton: Path,
    tmp_path: Path,
    undisturbed: dict[str, torch.Tensor],
) -> None:
    """After a few steps, so that there is something to lose."""
    life = Life(secrets.randbelow(1 << 30), tiny_beton, other_beton, tmp_path)
    life.ends(life.start("run.max_steps=4"), 0)
    life.EVENTS = (event,)  # type: ignore[assignment]
    life.live(1, undisturbed)


@pytest.mark.soak
def test_lives(
    tiny_beton: Path, other_beton: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    first = secrets.randbelow(1 << 30)
    events: dict[str, int] = {}
    for seed in range(first, first + LIVES):
        for line in live(seed, EVENTS, tiny_beton, other_beton, tmp_path / str(seed), undisturbed):
            name = line.partition(" ")[0]
            events[name] = events.get(name, 0) + 1
    record("lives", {"first_seed": first, "lives": LIVES, "events": events, "bit_equal": LIVES})
