"""Plain weights in a converted model: what does not fit, and files of any origin (`model.init`)."""

from __future__ import annotations

import contextlib
import io
import os
import random
import zipfile
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
from fap.nets.weights.find import find_weights
from fap.nets.weights.torch_file import is_torch_file
from tests.hostile_meta import valid_meta
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


def start(path: Path | str, n_classes: int = 10) -> tuple[nn.Module, list[str]]:
    """A model that starts from the file, and what was said."""
    torch.manual_seed(0)
    model = build("cifar_resnet8", n_classes, size=16)
    weights = find_weights(str(path))
    said = [*weights.notes]
    load_init(model, "ours", weights, n_classes, said.append)
    return model, said


def refusal(path: Path | str) -> str:
    """The message of the ValueError that says why a model cannot start from the file."""
    with pytest.raises(ValueError) as error:
        start(path)
    message = str(error.value)
    where = f"model.init = {str(path)!r}"
    assert message.startswith((f"{where}: ", f"{where} for model.name = 'ours': "))
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


def test_init_from_a_runs_checkpoint_takes_its_average(tmp_path: Path) -> None:
    """As fap-export does, where the run kept one."""
    config = make_config({"name": "r", "model": {"name": "cifar_resnet8", "num_classes": 10}})
    model = build("cifar_resnet8", 10, size=16).state_dict()
    state = {f"model.{name}": tensor for name, tensor in model.items()}
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    file = folder / "step_00000007.safetensors"
    for average, says in (({}, "main norms ("), ({"ema.fc.bias": torch.ones(10)}, "the average")):
        checkpoint.save(file, state | average, valid_meta(config, step=7))
        for path in (tmp_path / "run", folder, file):
            started, said = start(path)
            assert "step 7 of run r, its main norms" in said[0]
            assert says in said[0]
            want = average.get("ema.fc.bias", model["fc.bias"])
            assert torch.equal(started.state_dict()["fc.bias"], want)
            assert torch.equal(started.state_dict()["conv1.weight"], model["conv1.weight"])


# ---------------------------------------------------------------------- files of torch.save


WRAPPERS = {
    "plain": (lambda state: state, []),
    "state_dict": (lambda state: {"state_dict": state, "epoch": 3}, ["its 'state_dict' is taken"]),
    "ema": (
        lambda state: {"state_dict": changed(state, ["fc.bias"]), "state_dict_ema": state},
        ["its 'state_dict_ema' is taken, not its 'state_dict'"],
    ),
    "module": (
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        ["its 'model' is taken", "its names are read without the prefix 'module.'"],
    ),
    "compiled": (
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
        ["its names are read without the prefix 'module._orig_mod.'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("is_zip", [True, False])
def test_init_reads_what_training_scripts_save(name: str, is_zip: bool, tmp_path: Path) -> None:
    source = CifarResNet(8, 10)
    randomise_norms(source)
    state = source.state_dict()
    wrap, says = WRAPPERS[name]
    file = tmp_path / "checkpoint.pth.tar"  # the content counts, not the suffix
    torch.save(wrap(dict(state)), file, _use_new_zipfile_serialization=is_zip)
    model, said = start(file)
    assert said == says
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


class Bomb:
    """What unpickling it would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_init_executes_no_pickle(is_zip: bool, tmp_path: Path) -> None:
    state = {"model": CifarResNet(8, 10).state_dict(), "args": Bomb(tmp_path / "executed")}
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    message = refusal(tmp_path / "x.pth")
    assert "unpickling can run any code" in message
    assert "\n" not in message
    assert not (tmp_path / "executed").exists()


def test_init_of_what_is_in_no_state_dict(tmp_path: Path) -> None:
    for content, says in (
        ({"epoch": 3, "lr": 0.1}, "no state dict under any of its keys (epoch, lr)"),
        ([torch.zeros(1)], "it holds a list and no state dict"),
        ({}, "it is empty"),
        ({"fc.weight": torch.zeros(1).expand(10**9)}, "is larger than it"),
        ({"fc.weight": torch.zeros(1, device="meta")}, "is no plain one"),
    ):
        torch.save(content, tmp_path / "x.pth")
        assert says in refusal(tmp_path / "x.pth")


def test_init_of_a_compressed_or_garbled_file(tmp_path: Path) -> None:
    torch.save(CifarResNet(8, 10).state_dict(), tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as whole,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert "compressed" in refusal(tmp_path / "small.pth")
    content = (tmp_path / "x.pth").read_bytes()
    for _ in range(30):
        broken = bytearray(content)
        for _ in range(random.choice([1, 3, 30])):
            broken[random.randrange(len(broken))] = random.randrange(256)
        end = random.choice([len(broken), random.randrange(len(broken))])
        (tmp_path / "x.pth").write_bytes(broken[:end])
        with contextlib.suppress(ValueError):
            start(tmp_path / "x.pth")


def test_a_header_of_any_length_is_one_of_safetensors() -> None:
    """Its length stands first: its bytes may look like the beginning of another format."""
    for length in (0x80, 0x04034B50, 0x0280, 0x0A8A0280):
        content = length.to_bytes(8, "little") + b'{"x":'
        assert not is_torch_file(content)
    file = io.BytesIO()
    for is_zip in (True, False):
        file.seek(0)
        torch.save({"x": torch.zeros(1)}, file, _use_new_zipfile_serialization=is_zip)
        assert is_torch_file(file.getvalue())


# ---------------------------------------------------------------------- other classes


def test_init_with_other_classes_gets_a_new_head(tmp_path: Path) -> None:
    source = CifarResNet(8, 10)
    randomise_norms(source)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    torch.manual_seed(0)
    untouched = build("cifar_resnet8", 3, size=16).state_dict()
    model, said = start(tmp_path / "x.pth", n_classes=3)
    assert said == [f"model.init = '{tmp_path / 'x.pth'}': head of 10 classes replaced by one of 3"]
    for name, value in export(model.state_dict()).items():
        wanted = untouched if name.startswith("fc.") else source.state_dict()
        assert torch.equal(value, wanted[name]), name


def test_init_without_a_head_gets_one(tmp_path: Path) -> None:
    state = changed(CifarResNet(8, 10).state_dict(), ["fc.weight", "fc.bias"])
    torch.save(state, tmp_path / "x.pth")
    model, said = start(tmp_path / "x.pth")
    assert said[0].endswith("no head in the weights; that of 10 classes is new")
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"])


def test_init_where_more_than_the_class_count_differs_is_refused(tmp_path: Path) -> None:
    state = CifarResNet(8, 10).state_dict()
    for broken, says in (
        (changed(state, fc__weight=torch.zeros(3, 64)), "'fc.weight: (3, 64)"),  # but 10 biases
        (changed(state, ["fc.bias"]), "1 missing ('fc.bias')"),
        (changed(state, fc__weight=torch.zeros(3, 65), fc__bias=torch.zeros(3)), "(3, 65)"),
        (changed(state, conv1__weight=torch.zeros(3, 3, 3, 3)), "'conv1.weight: (3, 3, 3, 3)"),
    ):
        torch.save(broken, tmp_path / "x.pth")
        assert says in refusal(tmp_path / "x.pth")


# ---------------------------------------------------------------------- no file


def test_init_of_what_is_no_file_of_weights(weights: tuple[Path, State], tmp_path: Path) -> None:
    path, state = weights
    assert "no such file" in refusal(tmp_path / "absent.safetensors")
    assert "is no folder of a run" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "named pipe" in refusal(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert "character device" in refusal(tmp_path / "zero")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    assert "bytes" in refusal(tmp_path / "huge")
    (tmp_path / "empty").touch()
    assert "neither a safetensors file" in refusal(tmp_path / "empty")
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
