"""Real JPEGs of ImageNet's size through every pipeline: CIFAR alone would never decode one."""

from pathlib import Path

import pytest

from bench import jpegs
from fap.config import load_config
from fap.run.train import Run
from pipelines import convert


@pytest.fixture(scope="session")
def photos_beton(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """200 photos of about 500x375 as an image folder in ImageNet's layout and as a `.beton` of the
    same bytes.
    """
    root = tmp_path_factory.mktemp("photos")
    jpegs.make(root / "train", 200, seed=0)
    convert.convert_folder(root / "train", root / "train.beton")
    jpegs.make(root / "val", len(jpegs.photos()), seed=1)  # one of each class
    return root / "train", root / "train.beton"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "folder"), [("ffcv", False), ("dali", False), ("dali", True), ("reference", False)]
)
def test_resnet18_trains_on_real_jpegs(
    photos_beton: tuple[Path, Path], tmp_path: Path, pipeline: str, folder: bool
) -> None:
    data = photos_beton[0] if folder else photos_beton[1]
    config = load_config(
        None,
        [
            f"data.train={data}", f"data.val={photos_beton[0].parent / 'val'}", f"data.pipeline={pipeline}",
            "data.threads=2", "model.name=resnet18",
            "optim.clean_batch=8", "method.group_rows=4", "method.p_adv=1/3", "run.max_steps=10", "run.device=cpu",
            f"run.dir={tmp_path}", "run.log_every=1", "run.eval_batch=50",
        ],
    )  # fmt: skip
    training = Run(config)
    result = training.train()
    assert result["steps"] == 10
    losses = [
        line
        for line in (training.folder / "metrics.jsonl").read_text().splitlines()
        if '"lr"' in line
    ]
    assert len(losses) == 10
    assert 0 < result["last"]["loss"] < 20
