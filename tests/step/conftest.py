"""Random input is drawn anew in every run; SEED=n repeats one."""

import os
import random

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    value = int(os.environ.get("SEED") or random.SystemRandom().randrange(2**31))
    print(f"SEED={value}")  # shown when the test fails
    torch.manual_seed(value)
    random.seed(value)
    return value
