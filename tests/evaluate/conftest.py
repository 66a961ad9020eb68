"""The world that `fap-eval` is tried on; see world.py."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.corrupt import corrupt
from tests.evaluate.world import CHECKPOINT, WNIDS, write_checkpoint, write_folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint and one small folder of each benchmark's layout."""
    at = tmp_path_factory.mktemp("eval")
    write_folder(at / "val", WNIDS, 3, (40, 36))
    for severity in (1, 2):

        def foggy(image: np.ndarray, severity: int = severity) -> np.ndarray:
            return corrupt(image, "fog", severity)

        write_folder(at / "c" / "fog" / str(severity), WNIDS, 2, (32, 32), foggy)
    write_folder(at / "r", ["n02", "n05"], 4, (50, 33))
    write_folder(at / "stylized", WNIDS, 1, (32, 32))
    (at / "cifar").mkdir()
    rng = np.random.default_rng(3)
    np.save(at / "cifar" / "contrast.npy", rng.integers(0, 256, (35, 32, 32, 3), dtype=np.uint8))
    np.save(at / "cifar" / "labels.npy", np.tile(np.arange(7), 5).astype(np.uint8))
    write_checkpoint(at / CHECKPOINT, WNIDS)
    return at
