"""Target: damaged files of weights, as torch.save and safetensors write them, under any name."""

# ruff: noqa: PT017  # an error is judged where it is met; not every input must raise one

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from fap.nets.build import build
from fap.nets.cifar import CifarResNet
from fap.nets.pretrained import load_init
from fap.nets.weights.find import find_weights
from tests.fuzzing.damage import mutate

LONGEST_MESSAGE = 1500  # characters


def fuzz_weights(rng: np.random.Generator, folder: Path) -> str:
    """Loaded whole, or one line that names the file."""
    state = CifarResNet(8, 3).state_dict()
    if rng.random() < 0.3:
        good = safetensors.torch.save(state, {"mean": "[0.1, 0.2, 0.3]"})
        # Damage of a header is met more often than that of numbers, which nothing can notice.
        end = 8 + int.from_bytes(good[:8], "little")
    else:
        file = io.BytesIO()
        wrapped = {"state_dict": state, "epoch": 3} if rng.random() < 0.5 else state
        torch.save(wrapped, file, _use_new_zipfile_serialization=bool(rng.random() < 0.7))
        good = file.getvalue()
        end = len(good) if rng.random() < 0.5 else 4000  # where the pickle lies
    bad, how = mutate(rng, good, 0, end)
    path = folder / str(rng.choice(["x.pth", "x.safetensors", "x.bin"]))
    path.write_bytes(bad)
    try:
        weights = find_weights(str(path))
        load_init(build("cifar_resnet8", 3, size=16), "cifar_resnet8", weights, 3, str)
    except ValueError as error:
        assert path.name in str(error), repr(error)
        assert "\n" not in str(error), repr(error)
        assert len(str(error)) < LONGEST_MESSAGE, str(error)[:3000]
        return f"{how}: {str(error)[-150:]}"
    return f"{how}: loaded"
