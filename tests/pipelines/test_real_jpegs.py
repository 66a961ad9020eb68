"""Real JPEGs of ImageNet's size through every pipeline: CIFAR alone would never decode one."""

from pathlib import Path

import pytest

from bench import jpegs
from fap.config import load_config
from fap.run.train import Run
from pipelines.convert_images import convert_images


@pytest.fixture(scope="session")
def photos_beton(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """200 photos of about 500x375: a folder in ImageNet's layout, a `.beton` of the same bytes."""
    root = tmp_path_factory.mktemp("photos")
    jpegs.make(root / "train", 200, seed=0)
    convert_images(root / "train", root / "train.beton")
    jpegs.make(root / "val", len(jpegs.photos()), seed=1)  # one of each class
    return root / "train", root / "train.beton"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "folder"), [("ffcv", False), ("dali", False), ("dali", True), ("reference", False)]
)
def test_resnet18_trains_on_real_jpegs(
    photos_beton: tuple[Path, Path], tmp_path: Path, pipeline: str, folder: bool
) -> None:
    as_folder, as_beton = photos_beton  # decoded whole, and shown small
    data = as_folder if folder else as_beton
    settings = (
        f"data.train={data} data.val={as_folder.parent / 'val'} data.pipeline={pipeline}"
        " data.threads=2 data.size=64 data.resize=72 model.name=resnet18"
        " optim.clean_batch=8 method.group_rows=4 method.p_adv=1/3"
        f" run.max_steps=10 run.device=cpu run.dir={tmp_path} run.log_every=1 run.eval_batch=50"
    )
    config = load_config(None, settings.split())
    training = Run(config)
    result = training.train()
    assert result["steps"] == 10
    metrics = (training.folder / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in metrics if '"lr"' in line]) == 10
    assert 0 < result["last"]["loss"] < 20
