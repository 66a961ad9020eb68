"""Random input is drawn anew in every run; SEED=n repeats one."""

import pytest


@pytest.fixture(autouse=True)
def fresh_draws(seed: int) -> None:
    """Each test begins with `seed`."""
