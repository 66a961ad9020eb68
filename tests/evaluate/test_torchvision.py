"""Weights of torchvision score here what torchvision's own loop gives, on real photographs."""

from __future__ import annotations

import io
import json
import re
import zipfile
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from bench import jpegs
from fap import checkpoint
from fap.cli import eval as cli
from fap.config import make_config
from fap.evaluate import evaluation, exact, report
from fap.nets.build import prepare
from fap.tasks.base import Evaluator
from pipelines.convert_images import convert_images
from tests.evaluate.world import no_plot
from tests.hostile_meta import valid_meta

MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]
LABELLED = re.compile(r"foolbox/data/imagenet_\d+_(\d+)\.jpg")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """ImageNet-labelled photographs: as torchvision's ImageFolder reads them, and as a `.beton`.

    Half of them are cut, so that they are no squares.
    """
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for wheel in jpegs.wheels():
        with zipfile.ZipFile(wheel) as archive:
            for number, member in enumerate(jpegs.members(archive)):
                label = LABELLED.fullmatch(member)
                if label is None:
                    continue
                file = root / "val" / f"class{int(label[1]):03}" / f"{number:02}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                data = archive.read(member)
                if number % 2:
                    width, height = rng.integers(240, 512, 2).tolist()
                    cut = io.BytesIO()
                    Image.open(io.BytesIO(data)).crop((0, 0, width, height)).save(
                        cut, "JPEG", quality=93
                    )
                    data = cut.getvalue()
                file.write_bytes(data)
    convert_images(root / "val", root / "val.beton")
    return root / "val", root / "val.beton"


def torchvisions_loop(
    model: nn.Module, folder: Path, resize: int = 256
) -> tuple[Tensor, Tensor]:  # logits (N, classes), labels (N,)
    """As torchvision's references/classification evaluates a model."""
    transform = v2.Compose(
        [
            v2.Resize(resize),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    data = torchvision.datasets.ImageFolder(str(folder), transform)
    loader = torch.utils.data.DataLoader(data, batch_size=5)
    with torch.inference_mode():
        batches = [(model(images), labels) for images, labels in loader]
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits), torch.cat(labels)


def published(folder: Path, n_classes: int) -> nn.Module:
    """A ResNet-18 of random weights whose batch norms know the images, as trained ones do."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=n_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    model.train()
    for _ in range(3):
        torchvisions_loop(model, folder)
    return model.eval()


def write_checkpoint(path: Path, plain: nn.Module, classes: list[str]) -> None:
    """A run's, with these weights."""
    settings = {
        "name": "published",
        "model": {"name": "resnet18", "num_classes": len(classes)},
        "data": {"mean": MEAN, "std": STD},
    }
    state = prepare(deepcopy(plain), aux=True, size=224).state_dict()
    named = {f"model.{name}": tensor for name, tensor in state.items()}
    checkpoint.save(path, named, valid_meta(make_config(settings), classes))


class Recorder:
    """An evaluator that keeps what it is shown."""

    def __init__(self, inner: Evaluator) -> None:
        self.inner = inner
        self.seen: list[tuple[Tensor, Tensor]] = []

    def update(self, outputs: Tensor, references: Tensor) -> None:
        self.seen.append((outputs.clone(), references.clone()))
        self.inner.update(outputs, references)

    def result(self) -> dict[str, float]:
        return self.inner.result()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "as_folder", "tolerance", "is_plain"),
    [
        ("reference", True, 1e-3, False),
        ("ffcv", False, 1e-3, False),
        ("turbojpeg", False, 1e-3, True),
        # Of some 0.2% of the values, which DALI rounds to the next grey level: 1.1e-3 at most.
        ("dali", False, 5e-3, True),
    ],
)
def test_weights_score_what_torchvisions_loop_gives(
    pipeline: str,
    as_folder: bool,
    tolerance: float,
    is_plain: bool,  # the weights as torchvision has them, or a run's checkpoint
    photos: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = {"ffcv": "ffcv", "dali": "nvidia.dali"}.get(pipeline, "torch")
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    folder, beton = photos
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    plain = published(folder, len(classes))
    want, labels = torchvisions_loop(plain, folder)

    file, more = tmp_path / "published.safetensors", []
    if is_plain:
        safetensors.torch.save_file(dict(plain.state_dict()), file)
        (tmp_path / "names.txt").write_text("\n".join(classes))
        more = ["--plain", "model.name=resnet18", "--classes", str(tmp_path / "names.txt")]
    else:
        write_checkpoint(file, plain, classes)

    recorders = []

    def watched(model: nn.Module, batches: Any, evaluator: Evaluator, **options: Any) -> Any:
        recorders.append(Recorder(evaluator))
        return exact.evaluate(model, batches, recorders[-1], **options)

    monkeypatch.setattr(evaluation, "evaluate", watched)
    monkeypatch.setattr(report, "_plot", no_plot)
    data = folder if as_folder else beton
    words = ["--data", str(data), "--device", "cpu", "--pipeline", pipeline, "--batch", "8"]
    assert cli.main([str(file), *words, *more, "--out", str(tmp_path / "out")]) == 0

    (recorder,) = recorders
    logits, seen = (torch.cat(part)[: len(labels)] for part in zip(*recorder.seen, strict=True))
    assert seen.tolist() == labels.tolist()
    assert want.std() > 0.1, "logits that say nothing would be equal too"
    torch.testing.assert_close(logits, want, rtol=0, atol=tolerance)
    ((found,),) = [json.loads((tmp_path / "out" / "report.json").read_text())]
    clean = found["results"]["clean"]
    assert clean["count"] == len(labels) >= 20
    loss = F.cross_entropy(want.double(), labels).item()
    assert clean["loss"] == pytest.approx(loss, abs=tolerance)
    first, second = want.topk(2).values.T
    if (first - second > 2 * tolerance).all():  # else a guess may be another one
        assert clean["top1"] == (want.argmax(1) == labels).double().mean().item()
    else:
        assert pipeline == "dali"


@pytest.mark.slow
def test_models_of_every_kind_side_by_side_score_what_torchvisions_loop_gives(
    photos: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's checkpoint, a name of torchvision's and a file, each with its own resize."""
    folder, _ = photos
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    ours = published(folder, len(classes))
    theirs = published(folder, 1000)
    write_checkpoint(tmp_path / "run.safetensors", ours, classes)
    torch.save(ours.state_dict(), tmp_path / "file.pth")
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(theirs.state_dict(), cache / "resnet18-f37072fd.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "names.txt").write_text("\n".join(classes))
    others = [f"other {i}" for i in range(1000 - len(classes))]
    (tmp_path / "thousand.txt").write_text("\n".join([*classes, *others]))

    recorders = []

    def watched(model: nn.Module, batches: Any, evaluator: Evaluator, **options: Any) -> Any:
        recorders.append(Recorder(evaluator))
        return exact.evaluate(model, batches, recorders[-1], **options)

    monkeypatch.setattr(evaluation, "evaluate", watched)
    monkeypatch.setattr(report, "_plot", no_plot)
    words = [str(tmp_path / "run.safetensors"), "--out", str(tmp_path / "out")]
    words += ["--data", str(folder), "--device", "cpu", "--pipeline", "reference", "--batch", "8"]
    words += ["--model", "torchvision:resnet18", f"classes={tmp_path / 'thousand.txt'}"]
    words += ["--model", str(tmp_path / "file.pth"), "model.name=resnet18", "data.resize=288"]
    assert cli.main([*words, f"classes={tmp_path / 'names.txt'}"]) == 0

    loops = [(ours, 256), (theirs, 256), (ours, 288)]
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    for (model, resize), recorder, report_ in zip(loops, recorders, found, strict=True):
        want, labels = torchvisions_loop(model, folder, resize)
        logits = torch.cat([outputs for outputs, _ in recorder.seen])[: len(labels)]
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-3)
        top1 = (want.argmax(1) == labels).double().mean().item()
        assert report_["results"]["clean"]["top1"] == top1
    assert not torch.allclose(recorders[0].seen[0][0], recorders[2].seen[0][0], atol=1e-2)
