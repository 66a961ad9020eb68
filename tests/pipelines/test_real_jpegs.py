"""Real JPEGs of ImageNet's size through every pipeline: CIFAR alone would never decode one."""

from pathlib import Path

import pytest

from bench import jpegs
from bench.loaders import make_planes, planes_file
from fap.config import load_config
from fap.run.train import Run
from pipelines.convert_images import convert_images


@pytest.fixture(scope="session")
def photos_beton(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """200 photos of about 500x375.

    A folder in ImageNet's layout, a `.beton` of the same bytes, one of decoded planes.
    """
    root = tmp_path_factory.mktemp("photos")
    jpegs.make(root / "train", 200, seed=0)
    convert_images(root / "train", root / "train.beton")
    jpegs.make(root / "val", len(jpegs.photos()), seed=1)  # one of each class
    beton = root / "train.beton"
    make_planes(beton)
    return {"folder": root / "train", "beton": beton, "planes": planes_file(beton)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "form"),
    [
        ("ffcv", "beton"),
        ("ffcv", "planes"),
        ("turbojpeg", "beton"),
        ("turbojpeg", "folder"),
        ("turbojpeg", "planes"),
        ("dali", "beton"),
        ("dali", "folder"),
        ("reference", "beton"),
    ],
)
def test_resnet18_trains_on_real_jpegs(
    photos_beton: dict[str, Path], tmp_path: Path, pipeline: str, form: str
) -> None:
    data = photos_beton[form]  # decoded whole, and shown small
    settings = (
        f"data.train={data} data.val={data.parent / 'val'} data.pipeline={pipeline}"
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
