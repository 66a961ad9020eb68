"""A checkpoint's model: only what the file holds is built, and it is exported as plain weights."""

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor

from fap import checkpoint
from fap.checkpoint import DamagedCheckpoint, save
from fap.cli.export import main
from fap.config import Config, make_config
from fap.evaluate.load import load_model
from fap.nets.build import build, plain
from fap.nets.dual import norms
from fap.run_meta import run_meta
from pipelines import files
from tests.hostile_meta import valid_meta

MOST_KILOBYTES = 300_000  # more than before; regnet_y_128gf has 2.6 GB


@pytest.fixture(scope="module")
def config() -> Config:
    """Of a small run."""
    model = {"name": "cifar_resnet8", "num_classes": 3}
    return make_config({"name": "r", "model": model, "data": {"size": 32, "resize": 36}})


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The model's tensors in the checkpoint of such a run."""
    return as_saved(build("cifar_resnet8", 3, size=32))


def as_saved(model: torch.nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("field", "value", "message"), [
    ("model.num_classes", 10**9, "num_classes = 1000000000"),
    # some tensor has 64 rows
    ("model.num_classes", 64, "'model.fc.weight' is torch.float32 of shape (3, 64)"),
    ("data.size", 10**6, ""),  # nothing of that size is made: this model takes any
    ("model.name", "cifar_resnet1000000000002", "too few for 'cifar_resnet1000000000002'"),
    ("model.name", "cifar_resnet14", "is none of the model's"),
    ("model.name", "regnet_y_128gf", "is none of the model's"),
    ("model.name", "vit_b_16", "is none of the model's"),
    ("model.name", "timm/nothing", "neither torchvision nor timm"),
])  # fmt: skip
def test_nothing_is_built_that_the_file_does_not_hold(
    config: Config, state: dict[str, Tensor], field: str, value: Any, message: str, tmp_path: Path
) -> None:
    meta = valid_meta(config)
    section, _, name = field.partition(".")
    meta["config"][section][name] = value
    if field == "data.size":
        meta["config"]["data"]["resize"] = value
    save(tmp_path / "c.safetensors", state, meta)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if message:
        with pytest.raises((DamagedCheckpoint, ValueError)) as caught:
            load_model(tmp_path / "c.safetensors")
        assert message in str(caught.value)
        assert "c.safetensors: " in str(caught.value)
    else:
        load_model(tmp_path / "c.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KILOBYTES


def test_tensors_that_are_not_the_models(
    config: Config, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    without = {name: tensor for name, tensor in state.items() if name != "model.conv1.weight"}
    double = torch.ones(3, 64).double()
    wrong = {
        "'model.conv1.weight' is missing": without,
        "'model.more' is none of the model's": state | {"model.more": torch.ones(1)},
        r"'model.fc.weight' is torch.float64 of shape \(3, 64\)": (
            state | {"model.fc.weight": double}
        ),
        r"'model.conv1.weight' is torch.float32 of shape \(\)": (
            state | {"model.conv1.weight": torch.tensor(1.0)}
        ),
        "no tensor has the .* rows of a last layer": {name: torch.ones(5) for name in state},
    }
    for message, tensors in wrong.items():
        save(path, tensors, valid_meta(config))
        with pytest.raises(DamagedCheckpoint, match=message):
            load_model(path)


def test_a_vanilla_run_has_no_auxiliary_norms(tmp_path: Path) -> None:
    model_config = {"name": "cifar_resnet8", "num_classes": 3}
    config = make_config({"model": model_config, "method": {"name": "vanilla"}})
    model = build("cifar_resnet8", 3, aux=False, size=32)
    save(tmp_path / "c", as_saved(model), valid_meta(config))
    assert load_model(tmp_path / "c").model.state_dict().keys() == model.state_dict().keys()


# ---------------------------------------------------------------------- export


def trained(name: str, path: Path) -> tuple[torch.nn.Module, Config, dict[str, Any]]:
    """A checkpoint after 123 steps, with its model, config and metadata."""
    model_config = {"name": name, "num_classes": 7}
    config = make_config({"name": "r", "model": model_config, "data": {"size": 64}})
    model = build(name, 7, size=64).eval()
    for norm in norms(model):  # main and auxiliary statistics differ, and neither is as initialised
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    meta = valid_meta(config, step=123)
    save(path, as_saved(model) | {"momentum.fc.weight": torch.ones(3)}, meta)
    return model, config, meta


def unconverted(name: str) -> torch.nn.Module:
    if name == "resnet50":
        return torchvision.models.resnet50(num_classes=7)
    return timm.create_model("resnet10t", num_classes=7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "timm/resnet10t"])
def test_export_loads_into_the_plain_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.safetensors"
    model, config, meta = trained(name, path)
    x = torch.rand(2, 3, 64, 64)
    loaded = load_model(path)
    assert loaded.config == config
    checked = run_meta("c", meta)
    assert (loaded.step, loaded.classes) == (checked.step, checked.train.classes)
    assert not loaded.model.training
    assert torch.equal(loaded.model(x), model(x))

    out = tmp_path / "plain.safetensors"
    assert main([str(path), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "[0.5, 0.5, 0.5]" in printed
    assert "123 steps" in printed
    weights = safetensors.torch.load_file(out)
    plain_model = unconverted(name)
    plain_model.load_state_dict(weights, strict=True)
    torch.testing.assert_close(plain_model.eval()(x), model(x), rtol=1e-4, atol=1e-4)
    assert {int(v) for k, v in weights.items() if k.endswith("num_batches_tracked")} == {123}
    told = {"model": name, "num_classes": "7", "size": "64", "step": "123", "resize": "74"}
    with safetensors.safe_open(out, "pt") as file:
        assert file.metadata().items() >= told.items()

    before = out.read_bytes()
    again = tmp_path / "again.safetensors"
    assert main([str(path), str(out)]) == 1
    assert "plain.safetensors exists" in capsys.readouterr().err
    assert main([str(out), str(again)]) == 1
    assert main([str(tmp_path / "none"), str(again)]) == 1
    assert out.read_bytes() == before
    assert not again.exists()
    save(tmp_path / "other.safetensors", {}, {"step": 1})
    with pytest.raises(ValueError, match="no checkpoint of a training run"):
        load_model(tmp_path / "other.safetensors")


def test_a_run_is_exported_by_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest checkpoint, or the best one."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    config = make_config({"name": "r", "model": {"name": "cifar_resnet8", "num_classes": 3}})
    for file, step in (("step_00000123", 123), ("best", 45), ("step_00000045", 45)):
        state = as_saved(build("cifar_resnet8", 3, size=32))
        save(folder / f"{file}.safetensors", state, valid_meta(config, step=step))
    for words, step in (([], 123), (["--best"], 45)):
        assert main([str(tmp_path / "run"), str(tmp_path / f"{step}.safetensors"), *words]) == 0
        assert f"after {step} steps" in capsys.readouterr().out
    assert main([str(tmp_path), str(tmp_path / "x.safetensors")]) == 1
    assert "holds the runs run: give one of them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.bin", "x.h5", "x.SAFETENSORS", "x.v1"])
def test_no_other_format_is_written_under_its_name(
    config: Config,
    state: dict[str, Tensor],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(tmp_path / "c.safetensors", state, valid_meta(config))
    assert main([str(tmp_path / "c.safetensors"), str(tmp_path / name)]) == 1
    assert f"no format has the suffix '.{name[2:]}'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_export_says_wrote_only_of_what_is_there_and_loads(
    config: Config,
    state: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "c.safetensors", state, valid_meta(config))
    arguments = ["~/c.safetensors", "~/out.safetensors"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out.safetensors"))

    def without_bias(state: dict[str, Tensor], steps: int, bn: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state.items() if name != "fc.bias"}

    def lost(out: Path, *_: Any, **__: Any) -> None:
        Path(out).write_bytes(b"\0" * 100)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err
    assert printed.out == ""
    with monkeypatch.context() as patch:  # weights that the plain model would not take
        patch.setattr("fap.nets.dual.export", without_bias)
        assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "does not load these weights" in printed.err
    assert printed.out == ""
    with monkeypatch.context() as patch:  # a disk that loses what was written
        patch.setattr(checkpoint, "save", lost)
        assert main(arguments) == 1
    assert "out.safetensors: " in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["c.safetensors"]
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    assert main(["~/c.safetensors", "~/link.safetensors"]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "wrote" in printed.out
    weights = safetensors.torch.load_file(tmp_path / "out.safetensors")
    plain("cifar_resnet8", 3).load_state_dict(weights, strict=True)
