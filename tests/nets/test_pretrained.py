"""Plain weights in a converted model: what does not fit, and files of any origin (`model.init`)."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fap import checkpoint
from fap.config import make_config
from fap.nets.build import build
from fap.nets.cifar import CifarResNet
from fap.nets.dual import convert, export
from fap.nets.pretrained import load_init, load_plain
from tests.nets.conftest import randomise_norms

State = dict[str, Tensor]


def changed(state: State, drop: Sequence[str] = (), **more: Tensor) -> State:
    """Without the names of `drop`, and with `more`, in whose names `__` stands for a dot."""
    kept = {k: v for k, v in state.items() if k not in drop}
    return kept | {k.replace("__", "."): v for k, v in more.items()}


@pytest.mark.parametrize("aux", [True, False])
def test_plain_weights_that_do_not_fit_change_nothing(aux: bool) -> None:
    model = convert(CifarResNet(8, 10), aux=aux)
    state = CifarResNet(8, 10).state_dict()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for broken, says in (
        (changed(state, ["fc.bias"]), "1 missing ('fc.bias')"),
        (changed(state, head__weight=torch.zeros(1)), "1 unknown to the model ('head.weight')"),
        (
            changed(state, bn1__aux__weight=torch.zeros(16)),
            "1 unknown to the model ('bn1.aux.weight')",
        ),
        (
            CifarResNet(8, 3).state_dict(),
            "2 of another shape or type ('fc.bias: (3,) instead of (10,)', 'fc.weight: (3, 64)",
        ),
        (
            changed(state, fc__bias=torch.zeros(10, dtype=torch.int8)),
            "'fc.bias: torch.int8 instead of torch.float32'",
        ),
        ({}, "47 missing ('conv1.weight', 'bn1.weight', 'bn1.bias' and 44 more)"),
        (changed(state, **{"x" * 10**6: torch.zeros(1)}), "1,000,002 characters"),
    ):
        with pytest.raises(ValueError) as error:
            load_plain(model, broken)
        assert str(error.value).startswith("the weights do not fit the model: tensors: ")
        assert says in str(error.value)
        assert len(str(error.value)) < 600
        assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_a_modules_own_child_called_aux_is_no_auxiliary_norm() -> None:
    def net() -> nn.Module:
        aux = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        return nn.ModuleDict({"aux": aux, "fc": nn.Linear(4, 2)})

    state = net().state_dict()
    model = convert(net())
    load_plain(model, state)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert torch.equal(model.state_dict()["aux.1.aux.weight"], state["aux.1.weight"])
    with pytest.raises(ValueError, match=r"1 missing \('aux\.0\.weight'\)"):
        load_plain(model, changed(state, ["aux.0.weight"]))


# ---------------------------------------------------------------------- model.init


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, State]:
    """A file as fap-export writes it, of weights that no fresh model has."""
    source = CifarResNet(8, 10)
    randomise_norms(source)
    path = tmp_path / "weights.safetensors"
    header = {"model": "cifar_resnet8", "run": "x", "num_classes": "10", "size": "32", "step": "7"}
    header |= {"mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]"}
    checkpoint.save(path, source.state_dict(), {}, **header)
    return path, source.state_dict()


def start(path: Path | str, **data: Any) -> tuple[nn.Module, list[str]]:
    """A model that starts from the file, and what was said."""
    model = build("cifar_resnet8", 10, size=16)
    config = make_config({"model": {"name": "cifar_resnet8", "num_classes": 10}, "data": data})
    said: list[str] = []
    load_init(model, str(path), config, said.append)
    return model, said


def refusal(path: Path | str) -> str:
    """The message of the ValueError that says why a model cannot start from the file."""
    with pytest.raises(ValueError) as error:
        start(path)
    message = str(error.value)
    assert message.startswith(f"model.init = {str(path)!r}: ")
    assert len(message) < 1000
    return message


def test_init_reads_what_export_writes(weights: tuple[Path, State]) -> None:
    path, state = weights
    model, said = start(path)
    assert said == []
    plain_again = export(model.state_dict())
    assert all(torch.equal(plain_again[k], v) for k, v in state.items())
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k.replace(".aux.", ".")]), k


def test_init_reads_what_others_write(tmp_path: Path) -> None:
    """Without a header, and in another precision."""
    state = CifarResNet(8, 10).state_dict()
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors", {"format": "pt"})
    for name, want in (("plain", state), ("half", half)):
        model, said = start(tmp_path / f"{name}.safetensors")
        assert said == []
        got = model.state_dict()
        assert all(torch.equal(got[k], v.to(got[k])) for k, v in want.items())


def test_init_in_the_home_folder(
    weights: tuple[Path, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(weights[0].parent))
    assert start("~/weights.safetensors")[1] == []


def test_init_in_the_home_of_nobody() -> None:
    assert "no such file" in refusal("~no_such_user/weights.safetensors")


def test_init_with_an_empty_header(tmp_path: Path) -> None:
    state = CifarResNet(8, 10).state_dict()
    blob = safetensors.torch.save(state)
    end = 8 + int.from_bytes(blob[:8], "little")
    header = blob[8:end].rstrip().replace(b"{", b'{"__metadata__":null,', 1)
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + blob[end:])
    with contextlib.suppress(ValueError):  # one short message is as good
        assert torch.equal(start(tmp_path / "x")[0].state_dict()["fc.bias"], state["fc.bias"])


def test_init_weights_of_other_inputs_are_said(weights: tuple[Path, State]) -> None:
    path, state = weights
    _, said = start(path, mean=(0.485, 0.456, 0.406))
    assert len(said) == 1
    for part in (
        "warning",
        str(path),
        "mean = [0.5, 0.5, 0.5]",
        "data.mean = [0.485, 0.456, 0.406]",
    ):
        assert part in said[0]
    _, said = start(path, std=(0.229, 0.224, 0.225))
    assert len(said) == 1
    assert "std = [0.5, 0.5, 0.5], but data.std = [0.229" in said[0]
    for text in ("garbage", "[" * 10_000, "NaN", "[0.5, 0.5]", '"' + "x" * 10**6 + '"'):
        checkpoint.save(path, state, {}, mean=text)
        _, said = start(path)
        assert len(said) == 1
        assert len(said[0]) < 700
    checkpoint.save(path, state, {}, model="cifar_resnet20")
    assert "weights of 'cifar_resnet20', but model.name = 'cifar_resnet8'" in start(path)[1][0]


def test_init_of_a_pickle_says_how_to_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = CifarResNet(8, 10).state_dict()
    for name in ("new.pth", "old.safetensors"):  # the content counts, not the suffix
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=name == "new.pth")
        message = refusal(tmp_path / name)
        assert "no safetensors file" in message
    message = refusal(tmp_path / "new.pth")
    monkeypatch.chdir(tmp_path)
    exec(message.partition('python -c "')[2].rstrip('"'), {})  # the advice works
    model, _ = start(tmp_path / "new.safetensors")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_init_of_what_is_no_file_of_weights(weights: tuple[Path, State], tmp_path: Path) -> None:
    path, state = weights
    assert "no such file" in refusal(tmp_path / "absent.safetensors")
    assert "a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "named pipe" in refusal(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert "character device" in refusal(tmp_path / "zero")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    assert "bytes" in refusal(tmp_path / "huge")
    (tmp_path / "empty").touch()
    assert "no safetensors file" in refusal(tmp_path / "empty")
    of_a_run = {f"model.{k}": v for k, v in state.items()} | {"momentum.x": torch.zeros(1)}
    checkpoint.save(tmp_path / "step", of_a_run, {})
    assert "fap-export" in refusal(tmp_path / "step")
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 4  # inside a weight: only the checksum can tell
    path.write_bytes(damaged)
    assert "wrong checksum" in refusal(path)


def test_init_of_a_garbled_file_is_one_message(tmp_path: Path) -> None:
    """Whatever happens to a file without checksum: loaded, or one short ValueError."""
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(CifarResNet(8, 10).state_dict(), path, {"mean": "[0, 0, 0]"})
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(random.choice([1, 3])):
            content[random.randrange(random.choice([8, end]))] = random.randrange(256)
        path.write_bytes(content[: random.choice([len(content), random.randrange(len(content))])])
        with contextlib.suppress(ValueError):
            start(path)
