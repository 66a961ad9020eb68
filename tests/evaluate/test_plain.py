"""`fap-eval --plain`: weights as torchvision and timm publish them, without a run's checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fap.cli import eval as cli
from fap.cli.export import main as export
from fap.config import load_config
from fap.evaluate.load import load_weights
from fap.nets.build import build
from tests.evaluate.world import CHECKPOINT, WNIDS, counted, refused, run

Capture = pytest.CaptureFixture[str]
MODEL = ("model.name=cifar_resnet8", "data.size=32", "data.resize=36")


@pytest.fixture
def place(world: Path, tmp_path: Path) -> Path:
    """Folders to evaluate on, the checkpoint, its plain weights, and the names of its classes."""
    for folder in ("val", "r"):
        shutil.copytree(world / folder, tmp_path / folder)
    shutil.copy(world / CHECKPOINT, tmp_path)
    assert export([str(tmp_path / CHECKPOINT), str(tmp_path / "plain.safetensors")]) == 0
    (tmp_path / "names.txt").write_text("\n".join(WNIDS))
    return tmp_path


def bare_weights() -> dict[str, torch.Tensor]:
    """Without a word on what they are."""
    torch.manual_seed(0)
    model = build("cifar_resnet8", 6, aux=False, size=32)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def named(place: Path) -> tuple[str, str]:
    return "--classes", str(place / "names.txt")


def test_an_exported_model_scores_what_its_checkpoint_scores(place: Path) -> None:
    """What fap-export wrote says which model it is, and how it wants its images."""
    words = ["--imagenet-r", str(place / "r")]
    of_run, _ = run(place, *words, out="run")
    plain = ["--plain", "data.resize=36", *named(place)]
    of_weights, _ = run(place, *words, *plain, out="plain", model="plain.safetensors")
    for key in ("clean", "imagenet_r"):
        assert of_weights["results"][key] == of_run["results"][key]
    assert (of_weights["name"], of_weights["step"]) == ("plain", 0)


def test_words_say_what_a_file_does_not(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(bare_weights(), place / "other.safetensors")
    calls = counted(monkeypatch)
    words = ["--plain", *MODEL, *named(place)]
    first, _ = run(place, *words, model="other.safetensors")
    assert len(calls) == 1
    assert (tuple(calls[0]["mean"]), tuple(calls[0]["std"])) == (
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    again, _ = run(place, *words, model="other.safetensors")
    assert len(calls) == 1  # kept
    assert again["results"] == first["results"]
    # Kept for this config only.
    scaled = [*words[:4], "data.mean=[0.5,0.5,0.5]", *words[4:]]
    run(place, *scaled, model="other.safetensors")
    assert len(calls) == 2
    assert tuple(calls[1]["mean"]) == (0.5, 0.5, 0.5)


def test_without_names_labels_go_by_position(place: Path, capsys: Capture) -> None:
    words = ["--plain", *MODEL, "model.num_classes=6"]
    assert "--labels-by-position" in refused(capsys, place, *words, model="plain.safetensors")
    found, _ = run(place, *words, "--labels-by-position", model="plain.safetensors")
    assert found["labels"]["clean"].startswith("by position (allowed by --labels-by-position")


def test_mistakes_are_one_line(place: Path, capsys: Capture) -> None:
    def said(*words: str, model: str = "plain.safetensors") -> str:
        return refused(capsys, place, "--plain", *words, model=model)

    bare = bare_weights()
    save_file(bare, place / "bare.safetensors")
    assert "say which model these weights are of: --plain model.name=NAME" in said(
        model="bare.safetensors"
    )
    assert "model.name = 'resnet0'" in said("model.name=resnet0")
    assert "the weights do not fit the model" in said("model.num_classes=7")
    assert "the weights do not fit the model" in said("model.name=cifar_resnet14")
    assert "data.size" in said("data.size=big")
    assert "the weights do not fit the model" in said(*MODEL, model=CHECKPOINT)
    assert "No such file" in said(model="none.safetensors")
    torch.save(bare, place / "pickle.pth")
    assert "no safetensors file" in said(*MODEL, model="pickle.pth")
    assert "--plain" in refused(capsys, place, model="bare.safetensors")
    with pytest.raises(SystemExit):
        cli.main([str(place / CHECKPOINT), "--data", "x", *named(place)])
    assert "--classes is about --plain" in capsys.readouterr().err


def test_the_defaults_are_torchvisions(tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    save_file(dict(model.state_dict()), tmp_path / "resnet18-f37072fd.safetensors")
    loaded = load_weights(tmp_path / "resnet18-f37072fd.safetensors", ["model.name=resnet18"])
    data = loaded.config.data
    assert (data.size, data.resize, data.eval_crop) == (224, 256, "center")
    assert loaded.config.name == "resnet18-f37072fd"
    assert (loaded.task.n_classes, loaded.classes, loaded.step) == (1000, None, 0)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(images), model.eval()(images))
    assert load_config(None, ["model.name=resnet18"]).data.mean != data.mean  # not ours
