"""Plain weights in `fap-eval`: as torchvision and timm publish them, without a run's checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from fap.class_maps import imagenet
from fap.cli import eval as cli
from fap.cli.export import main as export
from fap.config import load_config
from fap.evaluate import report
from fap.evaluate.plain_weights import load_weights
from fap.nets.build import build
from tests.evaluate.world import CHECKPOINT, WNIDS, counted, no_plot, refused, run

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
    plain = ["--plain", "data.resize=36"]  # it knows the names of its classes too
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


def test_a_file_of_torch_save_scores_the_same(place: Path) -> None:
    save_file(bare_weights(), place / "other.safetensors")
    torch.save({"model": bare_weights(), "epoch": 3}, place / "other.pth")
    words = ["--plain", *MODEL, *named(place)]
    safe, _ = run(place, *words, model="other.safetensors", out="safe")
    pickled, _ = run(place, *words, model="other.pth", out="pickled")
    assert pickled["results"] == safe["results"]


def in_hub(place: Path, repository: str, model: nn.Module) -> Path:
    """Put a model's weights into a cache of the Hub; the folder of its files."""
    folder = place / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / "0123").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")
    save_file(dict(model.state_dict()), folder / "snapshots" / "0123" / "model.safetensors")
    return folder / "snapshots" / "0123"


@pytest.fixture
def hub(place: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model that the cache of the Hugging Face Hub holds as me/mine; there is no network."""
    model = timm.create_model("test_resnet", num_classes=6)
    files = in_hub(place, "me/mine", model)
    cfg = {"input_size": [3, 40, 40], "crop_pct": 0.8, "mean": [0.1, 0.2, 0.3],
           "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}  # fmt: skip
    config = {"architecture": "test_resnet", "num_classes": 6, "pretrained_cfg": cfg}
    (files / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    return model.eval()


def of_published(place: Path, *words: str) -> int:
    fixed = ["--data", str(place / "val"), "--device", "cpu", "--batch", "4"]
    return cli.main([*words, *fixed, "--out", str(place / "out")])


def test_published_weights_are_evaluated_as_they_want_it(
    place: Path, hub: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their name alone: the model, its size, its mean and std, its filter."""
    monkeypatch.setattr(report, "_plot", no_plot)
    calls = counted(monkeypatch)
    assert of_published(place, "hf-hub:me/mine", *named(place), "--plain") == 0
    assert (calls[0]["mean"], calls[0]["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert list((place / "out" / "results").glob("hf-hub-me-mine-clean*"))
    images = torch.zeros(1, 3, 40, 40)
    loaded = load_weights("hf-hub:me/mine", [])
    data = loaded.config.data
    assert (data.size, data.resize, data.eval_filter) == (40, 50, "bicubic")
    with torch.inference_mode():
        assert torch.equal(loaded.model(images), hub(images))
    smaller = load_weights("hf-hub:me/mine", ["data.size=32"]).config.data
    assert (smaller.size, smaller.resize) == (32, 40)
    other = load_weights("hf-hub:me/mine", ["data.mean=[0.5,0.5,0.5]"])
    assert other.config.data.mean == (0.5, 0.5, 0.5)
    assert other.content != loaded.content


def test_published_weights_of_imagenet_know_its_classes(place: Path, hub: nn.Module) -> None:
    """So sets of class folders need no --classes; other names still come first."""
    in_hub(place, "timm/test_resnet.r160_in1k", timm.create_model("test_resnet"))
    assert load_weights("timm:test_resnet", []).classes == imagenet()
    others = tuple(f"class {number}" for number in range(1000))
    assert load_weights("timm:test_resnet", [], others).classes == others
    assert load_weights("hf-hub:me/mine", []).classes is None  # six outputs of somebody's


def test_what_was_chosen_of_the_weights_is_told(place: Path, capsys: Capture) -> None:
    torch.save({"model": bare_weights(), "epoch": 3}, place / "other.pth")
    run(place, "--plain", *MODEL, *named(place), model="other.pth")
    assert f"{place / 'other.pth'}: its 'model' is taken" in capsys.readouterr().err


def test_names_of_weights_that_are_not_there(
    place: Path, hub: nn.Module, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    for name, says in (
        ("torchvision:resnet18", "cannot be fetched (no network)"),
        ("timm:test_resnet", "cannot be fetched"),
        ("timm:nobody", "timm has no model 'nobody'"),
    ):
        assert of_published(place, name, "--plain") == 1
        line = capsys.readouterr().err
        assert line.startswith(f"fap-eval: {name}: ")
        assert says in line
        assert line.count("\n") == 1


def no_network(*_: object, **__: object) -> None:
    raise OSError("no network")


def test_without_names_labels_go_by_position(place: Path, capsys: Capture) -> None:
    save_file(bare_weights(), place / "bare.safetensors")
    words = ["--plain", *MODEL, "model.num_classes=6"]
    said = refused(capsys, place, *words, model="bare.safetensors")
    assert "--classes FILE, or --labels-by-position" in said
    found, _ = run(place, *words, "--labels-by-position", model="bare.safetensors")
    assert found["labels"]["clean"].startswith("by position (allowed by --labels-by-position")


def test_mistakes_are_one_line(place: Path, capsys: Capture) -> None:
    def said(*words: str, model: str = "plain.safetensors") -> str:
        return refused(capsys, place, "--plain", *words, model=model)

    assert "--plain: 'fog' is no KEY=VALUE" in said("model.name=x", "fog")

    bare = bare_weights()
    save_file(bare, place / "bare.safetensors")
    assert "say which model these weights are of: --plain model.name=NAME" in said(
        model="bare.safetensors"
    )
    assert "model.name = 'resnet0'" in said("model.name=resnet0")
    assert "the weights do not fit the model" in said("model.num_classes=7")
    assert "the weights do not fit the model" in said("model.name=cifar_resnet14")
    assert "data.size" in said("data.size=big")
    for n in (5, 7):
        names = place / "other.txt"
        names.write_text("".join(f"class {i}\n" for i in range(n)))
        expected = f"--classes: {n} names, but "
        more = ("--classes", str(names))
        assert expected in said(*MODEL, "model.num_classes=6", *more)
    assert "a run's checkpoint is none" in said(*MODEL, model=CHECKPOINT)
    assert "no such file" in said(model="none.safetensors")
    (place / "none.pth").write_bytes(b"nothing")
    assert "neither a safetensors file" in said(*MODEL, model="none.pth")
    assert "--plain" in refused(capsys, place, model="bare.safetensors")
    assert "--classes is about plain weights" in refused(capsys, place, *named(place))


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


@pytest.mark.parametrize("out", ["named.safetensors", "named"])
def test_names_of_classes_travel_with_what_is_exported(place: Path, out: str) -> None:
    """A file's header has them, or the folder's config.json; a list of one's own comes first."""
    assert export([str(place / CHECKPOINT), str(place / out)]) == 0
    loaded = load_weights(str(place / out), ["data.size=32"])
    assert loaded.classes == tuple(WNIDS)
    others = tuple(f"class {i}" for i in range(len(WNIDS)))
    assert load_weights(str(place / out), ["data.size=32"], others).classes == others
