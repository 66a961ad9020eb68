"""`fap-export` by the name of what is written: whole or absent, compared, and loaded by others."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from fap.checkpoint import load, save
from fap.cli.export import main
from fap.config import make_config
from fap.evaluate.load import load_model
from fap.export import onnx_file
from fap.export.facts import constructor
from fap.export.hub_folder import crop_pct
from fap.nets.build import build, plain
from fap.nets.dual import evaluate_with, norms
from fap.nets.weights.find import find_weights
from pipelines import files
from tests.hostile_meta import valid_meta

Capture = pytest.CaptureFixture[str]
CLASSES = ["a", "b", "c|d"]
MEAN = (0.1, 0.2, 0.3)
STD = (0.4, 0.5, 0.6)


def checkpoint(folder: Path, name: str = "cifar_resnet8", size: int = 32) -> Path:
    """Of a run whose main and auxiliary statistics differ, and are not as initialised."""
    torch.manual_seed(0)
    model = build(name, 3, size=size)
    for norm in norms(model):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    config = make_config({
        "name": "r", "model": {"name": name, "num_classes": 3, "init": "timm:x"},
        "data": {"size": size, "resize": size + 4, "mean": MEAN, "std": STD,
                 "eval_filter": "bicubic"},
    })  # fmt: skip
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save(folder / "c.safetensors", state, valid_meta(config, CLASSES, step=123))
    return folder / "c.safetensors"


def main_weights(path: Path) -> dict[str, Tensor]:
    return dict(find_weights(str(path)).state)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], v) for k, v in other.items())


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_a_file_of_torch_save_holds_a_plain_state_dict(
    tmp_path: Path, capsys: Capture, suffix: str
) -> None:
    path = checkpoint(tmp_path)
    out = tmp_path / f"x{suffix}"
    assert main([str(path), str(out)]) == 0
    said = capsys.readouterr().out
    assert "after 123 steps of run r" in said
    state = torch.load(out, weights_only=True)
    model = plain("cifar_resnet8", 3).eval()
    model.load_state_dict(state, strict=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        want = load_model(path).model(images)
        torch.testing.assert_close(model(images), want, rtol=1e-4, atol=1e-5)
    assert equal(state, main_weights(path))
    # What is said to load it does.
    lines = [line[7:] for line in said.splitlines() if " = " in line or "load_state" in line]
    scope: dict[str, Any] = {}
    exec("import torch, fap.nets.build\n" + "\n".join(lines), scope)
    assert equal(scope["model"].state_dict(), state)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x"])
def test_a_model_is_exported_with_its_auxiliary_norms(
    tmp_path: Path, capsys: Capture, name: str
) -> None:
    path = checkpoint(tmp_path)
    assert main([str(path), str(tmp_path / name), "--bn", "aux"]) == 0
    assert "through its auxiliary norms" in capsys.readouterr().out
    model = plain("cifar_resnet8", 3).eval()
    model.load_state_dict(main_weights(tmp_path / name), strict=True)
    images = torch.rand(2, 3, 32, 32)
    converted = load_model(path).model
    with torch.inference_mode():
        through_main = converted(images)
        with evaluate_with(converted, "aux"):
            want = converted(images)
        torch.testing.assert_close(model(images), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(want, through_main, rtol=1e-2)
    if name == "x":
        card = (tmp_path / name / "README.md").read_text()
        assert "that of the auxiliary norms" in card
        assert "| norms | auxiliary, trained on adversarial images; the numbers are of" in card


@pytest.mark.parametrize("name", ["x.pth", "x.onnx", "x", "x/"])
def test_nothing_is_overwritten(tmp_path: Path, capsys: Capture, name: str) -> None:
    path = checkpoint(tmp_path)
    place = tmp_path / name.rstrip("/")
    place.mkdir()
    assert main([str(path), str(tmp_path / name) + "/" * name.endswith("/")]) == 1
    assert "exists; choose another name" in capsys.readouterr().err
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", ["x.pth", "x"])
def test_a_failure_leaves_nothing(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = checkpoint(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert main([str(path), str(tmp_path / name)]) == 1
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err
    assert printed.out == ""
    assert os.listdir(tmp_path) == ["c.safetensors"]

    def other(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v + 1 for k, v in found.items()}

    def lost(*_: Any) -> bool:
        return False

    for module in ("tensors", "hub_folder"):
        monkeypatch.setattr(f"fap.export.{module}.same", lost)
    assert main([str(path), str(tmp_path / name)]) == 1
    assert "what was written is not what is there" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_normalise_is_for_onnx(tmp_path: Path, capsys: Capture) -> None:
    path = checkpoint(tmp_path)
    assert main([str(path), str(tmp_path / "x.pth"), "--normalise"]) == 1
    assert "--normalise is for .onnx" in capsys.readouterr().err


# ---------------------------------------------------------------------- ONNX


def test_the_extra_is_named(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert main([str(path), str(tmp_path / "x.onnx")]) == 1
    assert "pip install 'fap[onnx]'" in capsys.readouterr().err


@pytest.mark.slow
def test_onnx_gives_what_torch_gives_for_any_batch(tmp_path: Path, capsys: Capture) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = checkpoint(tmp_path)
    model = load_model(path).model
    for name, words in (("raw.onnx", []), ("inside.onnx", ["--normalise"])):
        out = tmp_path / name
        assert main([str(path), str(out), *words]) == 0
        assert "ONNX, opset 18: images float32 (batch, 3, 32, 32)" in capsys.readouterr().out
        session = onnxruntime.InferenceSession(str(out))
        told = session.get_modelmeta().custom_metadata_map
        assert json.loads(told["mean"]) == list(MEAN)
        assert ("minus mean" in told["input"]) == (not words)
        for n in (1, 7):
            images = torch.rand(n, 3, 32, 32)
            scaled = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            given = images if words else scaled
            (found,) = session.run(None, {"images": given.numpy()})
            with torch.inference_mode():
                want = model(scaled)
            np.testing.assert_allclose(found, want.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_onnx_that_computes_something_else_is_not_written(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    path = checkpoint(tmp_path)
    exported = onnx_file._exported

    def wrong(model: nn.Module, images: Tensor, output: str) -> Any:
        with torch.no_grad():
            proto = exported(model, images, output)
            for parameter in model.parameters():
                parameter.mul_(1.01)
        return proto

    monkeypatch.setattr(onnx_file, "_exported", wrong)
    assert main([str(path), str(tmp_path / "x.onnx")]) == 1
    assert "onnxruntime's outputs differ from torch's by" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_a_model_that_cannot_be_traced_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 0:
                return x
            return x + 1

    with pytest.raises(ValueError, match="cannot be exported to ONNX") as error:
        onnx_file._exported(Odd(), torch.rand(2, 3, 4, 4), "logits")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- a folder for the Hub


def test_timm_loads_the_folder_of_a_model_of_its_own(tmp_path: Path, capsys: Capture) -> None:
    path = checkpoint(tmp_path, "timm/test_resnet", 64)
    out = tmp_path / "mine"
    assert main([str(path), f"{out}/"]) == 0
    assert f"timm.create_model('local-dir:{out}', pretrained=True)" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        want = load_model(path).model(images)
        torch.testing.assert_close(model(images), want, rtol=1e-4, atol=1e-5)
    data = timm.data.resolve_model_data_config(model)
    assert list(data["input_size"]) == [3, 64, 64]
    assert (data["mean"], data["std"], data["interpolation"]) == (list(MEAN), list(STD), "bicubic")
    transforms = timm.data.create_transform(**data, is_training=False).transforms
    assert (transforms[0].size, list(transforms[1].size)) == (68, [64, 64])
    assert model.pretrained_cfg["label_names"] == CLASSES
    # And so do we, with all that it says.
    about = find_weights(str(out)).about
    assert (about.architecture, about.num_classes) == ("timm/test_resnet", 3)
    assert (about.size, about.resize, about.interpolation) == (64, 68, "bicubic")
    assert (about.mean, about.std) == (MEAN, STD)


def test_a_folder_of_another_librarys_model_says_so(tmp_path: Path, capsys: Capture) -> None:
    path = checkpoint(tmp_path)
    assert main([str(path), str(tmp_path / "mine")]) == 0
    assert "which timm.create_model cannot load" in capsys.readouterr().out
    weights = find_weights(str(tmp_path / "mine"))
    assert weights.about.architecture == "cifar_resnet8"
    assert equal(dict(weights.state), main_weights(path))


def test_the_model_card_tells_the_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "timm/test_resnet", 64)
    assert main([str(path), str(tmp_path / "mine")]) == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: timm" in front
    assert "- image-classification" in front
    for part in (
        "| run | r, seed 0, 123 steps", "| method | fast_advprop |", "| attack | eps 1/255 |",
        "| started from | `timm:x` |", "64 px, mean [0.1, 0.2, 0.3]", "shorter side 68 px, bicubic",
        "timm.create_model('local-dir:mine', pretrained=True)",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("last_step", "said"),
    [(123, "validation |"), (100, "validation, after step 100 |"), (None, "last evaluated |")],
)
def test_the_model_card_says_whose_number_it_is(
    tmp_path: Path, last_step: int | None, said: str
) -> None:
    """That of these weights, or of an earlier step, if a run stopped between two evaluations."""
    path = checkpoint(tmp_path, "timm/test_resnet", 64)
    tensors, meta = load(path)
    save(path, tensors, meta | {"last": {"top1": 0.9}, "last_step": last_step})
    assert main([str(path), str(tmp_path / "mine")]) == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if line.startswith("| top-1 |")]
    assert "90.00%" in row
    assert row.endswith(said)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["googlenet", "inception_v3", "vit_b_16", "timm/levit_128s", "timm/vit_tiny_patch16_224"],
)
def test_the_constructor_that_is_printed_takes_the_weights(name: str) -> None:
    size = 64 if name.endswith(("16", "224")) else 224
    data = {"size": size, "resize": 256}
    config = make_config({"model": {"name": name, "num_classes": 5}, "data": data})
    weights = plain(name, 5, size).state_dict()
    model = eval(constructor(config), {"timm": timm, "torchvision": torchvision})
    model.load_state_dict(weights, strict=True)


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (224, 235), (32, 36), (299, 342), (7, 7)])
def test_timm_computes_the_same_shorter_side(size: int, resize: int) -> None:
    assert int(np.floor(size / crop_pct(size, resize))) == resize
