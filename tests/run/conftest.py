"""Data and settings for tiny runs in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fap.nets.build import plain
from fap.tasks import TASKS
from tests.run.wiring import CLASSES, beton


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tensors of a few kilobytes; a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def doubled() -> Iterator[None]:
    """Another task, by a name of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "doubled", "tests.run.wiring:Doubled")
        yield


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, one_thread: None, doubled: None
) -> dict[str, Path]:
    """What the words of tests.run.wiring name in braces."""
    folder = tmp_path_factory.mktemp("wiring")
    torch.manual_seed(99)
    state = plain("cifar_resnet8", CLASSES).state_dict()
    safetensors.torch.save_file(state, folder / "weights.safetensors")
    return {
        "data": beton(folder / "data.beton", 0, CLASSES),
        "other": beton(folder / "other.beton", 1, CLASSES),
        "five": beton(folder / "five.beton", 2, 5),
        "weights": folder / "weights.safetensors",
    }
