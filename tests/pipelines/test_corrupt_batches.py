"""Corrupted batches: every image by its own number, in order, also from one reused buffer."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from pipelines import Batch, open_store
from pipelines.corrupt import corrupt
from pipelines.corrupt_batches import build, corrupted
from tests.conftest import photo


def one_buffer(images: np.ndarray, batch: int) -> Iterator[Batch]:
    """Batches in one reused buffer, as loaders give them."""
    buffer = torch.empty(batch, 3, *images.shape[1:3], dtype=torch.uint8)
    for step in range(len(images) // batch):
        rows = images[step * batch : (step + 1) * batch]
        buffer.copy_(torch.from_numpy(rows).permute(0, 3, 1, 2))
        yield Batch(buffer, step)


def test_batches_are_corrupted_by_image_number_in_order() -> None:
    images = np.stack([photo(np.random.default_rng(i), 32, 32) for i in range(100)])
    index = np.arange(100).reshape(5, 20)[:, ::-1] + 1000
    how = {"name": "gaussian_noise", "severity": 4, "seed": 11}
    with ThreadPoolExecutor(3) as pool:
        batches = list(corrupted(one_buffer(images, 20), index, pool=pool, **how))  # type: ignore[arg-type]
    assert [b.step for b in batches] == [0, 1, 2, 3, 4]
    for batch in batches:
        for row in (0, 17, 19):
            image = images[batch.step * 20 + row]
            expected = corrupt(image, index=index[batch.step, row], **how)  # type: ignore[arg-type]
            assert (batch.images[row].permute(1, 2, 0).numpy() == expected).all()


def test_kept_batches_hold_the_rows_with_a_label(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
    rows = torch.from_numpy(images).permute(0, 3, 1, 2)
    batches = [(rows[:4], torch.tensor([2, 0, 1, 2])), (rows[2:], torch.tensor([1, -1, 0, -1]))]
    build(
        batches,
        tmp_path / "kept.beton",
        capacity=8,
        classes=["a", "b", "c"],
        encoding={"made": "for a test"},
    )
    store = open_store(tmp_path / "kept.beton")
    assert store.classes == ("a", "b", "c")
    assert store.labels.tolist() == [2, 0, 1, 2, 1, 0]
    for number, image in enumerate([0, 1, 2, 3, 2, 4]):
        assert (store.read(number).reshape(8, 9, 3) == images[image]).all()
    store.close()
