"""Data and settings for tiny runs in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fap.nets.build import plain
from fap.tasks import TASKS
from tests.run.detections import write_boxes
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


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, Path]:
    """Data with boxes, by the names of tests.run.wiring and by what is odd about them."""
    folder = tmp_path_factory.mktemp("boxes")
    return {
        "data": write_boxes(folder / "data.beton", 0),
        "other": write_boxes(folder / "other.beton", 1),
        "moved": write_boxes(folder / "moved.beton", 0, moved=2),
        "single": write_boxes(folder / "single.beton", 0, ("disc",)),
        "strange": write_boxes(folder / "strange.beton", 0, ("disc", "frame", "wheel")),
        "crowds": write_boxes(folder / "crowds.beton", 0, all_crowds=True),
    }
