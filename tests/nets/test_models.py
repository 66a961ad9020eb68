"""Models by name: conversion changes nothing in evaluation, export gives the plain model back, the
stem's gradients.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from fap import checkpoint
from fap.config import make_config
from fap.nets.build import build, plain
from fap.nets.cifar import CifarResNet
from fap.nets.norm import Group, convert, evaluate_with, export, norms, set_groups
from fap.nets.pretrained import load_init, load_plain
from fap.nets.stem import StemConv2d, install_stem, stem_of

pytestmark = pytest.mark.usefixtures("seed")


def randomise_norms(model: nn.Module) -> None:
    """Affine parameters and running statistics as after some training, so that mixing them up
    shows.
    """
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for value, low, high in (
                (m.weight, 0.5, 1.5),
                (m.bias, -0.3, 0.3),
                (m.running_mean, -0.3, 0.3),
                (m.running_var, 0.7, 1.5),
            ):
                nn.init.uniform_(value, low, high)


def fresh(name: str) -> nn.Module:
    """The model as its own library makes it; names with a slash are timm's."""
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"), num_classes=10)
    return torchvision.models.get_model(name, num_classes=10)


SLOW = ("resnet50", "densenet121", "efficientnet_b0", "timm/resnet50d", "timm/efficientnet_b0")
NAMED = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in ("resnet18", "mobilenet_v3_large", "timm/regnety_002", *SLOW)
]


@pytest.mark.parametrize("name", NAMED)
def test_conversion_and_export(name: str) -> None:
    """Eval outputs are equal before and after `convert`; after training-like changes the export
    loads strictly.
    """
    before = fresh(name).eval()
    randomise_norms(before)
    model = convert(copy.deepcopy(before))
    bns = [m for m in before.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms(model)) == len(bns) > 0
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = before(x)
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)
        with evaluate_with(model, "aux"):  # a copy so far
            torch.testing.assert_close(model(x), want, rtol=0, atol=0)
        for norm in norms(model):
            assert norm.aux is not None
            randomise_norms(norm.aux)
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)
        with evaluate_with(model, "aux"):
            aux_out = model(x)
            assert (aux_out - want).abs().max() > 1e-3

    randomise_norms(model)
    other = fresh(name).eval()
    other.load_state_dict(export(model.state_dict(), steps=3), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
        # `load_plain` is the way back: both sides of every norm get the plain values.
        again = convert(fresh(name)).eval()
        load_plain(again, other.state_dict())
        torch.testing.assert_close(again(x), other(x), rtol=0, atol=0)
        with evaluate_with(again, "aux"):
            torch.testing.assert_close(again(x), other(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMED)
def test_training_forward_in_groups(name: str) -> None:
    """Every group's logits are those of the plain model on that group alone, in train mode (dropout
    off).
    """
    before = fresh(name).double()
    for m in before.modules():
        if isinstance(
            m, nn.Dropout | nn.Dropout2d | torchvision.ops.StochasticDepth | timm.layers.DropPath
        ):
            m.eval()
            m.train = lambda mode=True, m=m: m  # type: ignore[method-assign,misc]
    model = convert(copy.deepcopy(before)).double()
    model.load_state_dict(
        {k: before.state_dict()[k.replace(".aux.", ".")] for k in model.state_dict()}
    )
    x = torch.randn(10, 3, 64, 64).double()
    groups = [Group("main", 4, 0, 1), Group("aux", 3, 0, 2), Group("aux", 3, 1, 2)]
    with torch.no_grad():
        set_groups(model, groups)
        out = model(x)
        want = torch.cat([copy.deepcopy(before).train()(part) for part in x.split([4, 3, 3])])
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("aux", [True, False])
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_large", "timm/regnety_002", "cifar_resnet8"]
)
def test_without_groups_a_built_model_trains_like_the_plain_one(name: str, aux: bool) -> None:
    """Bit for bit: outputs, gradients, weights, running statistics and their counter, in ordinary
    training code.
    """
    before = plain(name, 10).to(memory_format=torch.channels_last)
    model = build(name, 10, aux=aux, size=32)
    load_plain(model, before.state_dict())
    own = dict(model.named_parameters())
    optimisers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (before, model)]
    for rows in (5, 3):  # any batch
        x = torch.randn(rows, 3, 32, 32).to(memory_format=torch.channels_last)
        labels, dropout = torch.randint(0, 10, (rows,)), random.randrange(2**31)
        outs = []
        for m, optimiser in zip((before, model), optimisers, strict=True):
            torch.manual_seed(dropout)
            outs.append(m.train()(x))
            optimiser.zero_grad()
            nn.functional.cross_entropy(outs[-1], labels).backward()
        assert torch.equal(*outs)
        for k, p in before.named_parameters():
            assert torch.equal(own[k].grad, p.grad), k  # type: ignore[arg-type]
        for optimiser in optimisers:
            optimiser.step()
    trained, ours = before.state_dict(), export(model.state_dict())
    assert trained.keys() == ours.keys()
    assert [k for k, v in trained.items() if not torch.equal(v, ours[k])] == []
    assert all(v == 2 for k, v in ours.items() if k.endswith("num_batches_tracked"))
    assert torch.equal(before.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    "name", ["resnet18", "timm/regnety_002", "cifar_resnet8", "cifar_resnet18"]
)
def test_build(name: str) -> None:
    model = build(name, 7, size=32)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert isinstance(stem_of(model), StemConv2d)
    assert all(
        p.is_contiguous(memory_format=torch.channels_last)
        for p in model.parameters()
        if p.ndim == 4
    )
    # A reader of the checkpoint sees the plain names, whatever class the stem has.
    plain(name, 7).load_state_dict(export(model.state_dict()), strict=True)


def test_build_without_auxiliary_norms() -> None:
    model = build("cifar_resnet8", 7, aux=False, size=16)
    assert set(model.state_dict()) == set(CifarResNet(8, 7).state_dict())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet51", "did you mean resnet5"),
        ("ResNet50", "did you mean resnet50"),
        ("timm/ResNet50", "did you mean timm/resnet50"),
        ("torchvision/vit_b_16", "did you mean vit_b_16"),
        ("cifar_resnet_18", "did you mean cifar_resnet18"),
        ("convnext-tiny", "convnext_tiny"),
        ("no such model at all", "cifar_resnet18 or cifar_resnetD"),
        ("cifar_resnet9", "6n"),
        ("inception_v33", "did you mean inception_v3"),
        ("x" * 10**6, "1,000,002 characters"),
        ("", "neither torchvision nor timm"),
        ("timm/", "neither torchvision nor timm"),
    ],
)
def test_names_that_nobody_knows(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.name = ") as error:
        plain(name, 10)
    assert says in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("resnet18.a1_in1k", "timm/resnet18"),
        ("timm/resnet50.tv2_in1k", "timm/resnet50"),
        ("resnet50.IMAGENET1K_V2", "timm/resnet50"),
        ("vit_b_16.IMAGENET1K_V1", "vit_b_16"),
        ("timm/resnet18.", "timm/resnet18"),
        ("tf_efficientnet_b0_ns", "timm/tf_efficientnet_b0"),
        ("timm/convnext_tiny_in22k", "timm/convnext_tiny"),
        ("resnet18." + "x" * 10**6, "timm/resnet18"),
    ],
)
def test_a_tag_of_pretrained_weights_is_no_random_initialisation(name: str, write: str) -> None:
    with pytest.raises(ValueError, match="pretrained") as error:
        plain(name, 10)
    assert f"model.name={write}," in str(error.value)
    assert "model.init=FILE.safetensors" in str(error.value)
    assert len(str(error.value)) < 700


def test_timm_prefix_picks_timm() -> None:
    assert type(plain("resnet18", 3)).__module__.startswith("torchvision")
    assert type(plain("timm/resnet18", 3)).__module__.startswith("timm")


def test_an_image_size_that_the_model_refuses() -> None:
    with pytest.raises(ValueError, match=r"data.size = 8"):
        build("inception_v3", 10, size=8)


def changed(
    state: dict[str, Tensor], drop: Sequence[str] = (), **more: Tensor
) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k not in drop} | {
        k.replace("__", "."): v for k, v in more.items()
    }


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
        ({}, "56 missing ('conv1.weight', 'bn1.weight', 'bn1.bias' and 53 more)"),
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
        return nn.ModuleDict(
            {"aux": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "fc": nn.Linear(4, 2)}
        )

    state = net().state_dict()
    model = convert(net())
    load_plain(model, state)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert torch.equal(model.state_dict()["aux.1.aux.weight"], state["aux.1.weight"])
    with pytest.raises(ValueError, match=r"1 missing \('aux\.0\.weight'\)"):
        load_plain(model, changed(state, ["aux.0.weight"]))


# ------------------------------------------------------------------ model.init


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
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
    said: list[str] = []
    load_init(
        model,
        str(path),
        make_config({"model": {"name": "cifar_resnet8", "num_classes": 10}, "data": data}),
        said.append,
    )
    return model, said


def test_init_reads_what_export_writes(weights: tuple[Path, dict[str, Tensor]]) -> None:
    path, state = weights
    model, said = start(path)
    assert said == []
    plain_again = export(model.state_dict())
    assert all(torch.equal(plain_again[k], v) for k, v in state.items())
    assert all(
        torch.equal(model.state_dict()[k], state[k.replace(".aux.", ".")])
        for k in model.state_dict()
    )


def test_init_reads_what_others_write(tmp_path: Path) -> None:
    """Without a header, and in another precision."""
    state = CifarResNet(8, 10).state_dict()
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors", {"format": "pt"})
    for name, want in (("plain", state), ("half", half)):
        model, said = start(tmp_path / f"{name}.safetensors")
        assert said == []
        assert all(
            torch.equal(model.state_dict()[k], v.to(model.state_dict()[k])) for k, v in want.items()
        )


def test_init_in_the_home_folder(
    weights: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(weights[0].parent))
    assert start("~/weights.safetensors")[1] == []


def test_init_in_the_home_of_nobody() -> None:
    assert "no such file" in refusal("~no_such_user/weights.safetensors")


def test_init_with_an_empty_header(tmp_path: Path) -> None:
    blob = safetensors.torch.save(state := CifarResNet(8, 10).state_dict())
    end = 8 + int.from_bytes(blob[:8], "little")
    header = blob[8:end].rstrip().replace(b"{", b'{"__metadata__":null,', 1)
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + blob[end:])
    with contextlib.suppress(ValueError):  # one short message is as good
        assert torch.equal(start(tmp_path / "x")[0].state_dict()["fc.bias"], state["fc.bias"])


def test_init_weights_of_other_inputs_are_said(weights: tuple[Path, dict[str, Tensor]]) -> None:
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


def refusal(path: Path | str) -> str:
    with pytest.raises(ValueError) as error:
        start(path)
    message = str(error.value)
    assert message.startswith(f"model.init = {str(path)!r}: ")
    assert len(message) < 1000
    return message


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


def test_init_of_what_is_no_file_of_weights(
    weights: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
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
    checkpoint.save(
        tmp_path / "step",
        {f"model.{k}": v for k, v in state.items()} | {"momentum.x": torch.zeros(1)},
        {},
    )
    assert "fap-export" in refusal(tmp_path / "step")
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 4  # inside a weight: only the checksum can tell
    path.write_bytes(damaged)
    assert "wrong checksum" in refusal(path)


def test_init_of_a_garbled_file_is_one_message(tmp_path: Path) -> None:
    """Whatever happens to a file without checksum: loaded, or one short ValueError."""
    safetensors.torch.save_file(
        CifarResNet(8, 10).state_dict(), path := tmp_path / "x.safetensors", {"mean": "[0, 0, 0]"}
    )
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(random.choice([1, 3])):
            content[random.randrange(random.choice([8, end]))] = random.randrange(256)
        path.write_bytes(content[: random.choice([len(content), random.randrange(len(content))])])
        with contextlib.suppress(ValueError):
            start(path)


CONVOLUTIONS: list[dict[str, object]] = [
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": 7, "stride": 2, "padding": 3, "bias": True},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": 2, "bias": True},
    {"kernel_size": 3, "groups": 3, "bias": False},
]


def stem_net(conv: nn.Conv2d) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU())


@pytest.mark.parametrize("kwargs", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("rows", [(0, 4), (3, 7), (5, 9), (0, 9)])
def test_stem_gradients_equal_autograd(kwargs: dict[str, object], rows: tuple[int, int]) -> None:
    """Output, weight and bias gradients over all rows, data gradient of the probed rows; twin:
    plain autograd.
    """
    first, stop = rows
    model = stem_net(nn.Conv2d(3, 6, **kwargs)).double()  # type: ignore[arg-type]
    twin = copy.deepcopy(model)[0]
    install_stem(model.float(), 12)
    model.double().to(memory_format=torch.channels_last)
    stem = stem_of(model)
    assert stem is not None
    stem.load_state_dict(twin.state_dict())
    x = torch.randn(9, 3, 12, 12).double()
    whole = x.clone().requires_grad_()
    want = twin(whole)
    gy = torch.randn_like(want)
    want.backward(gy)

    static = x.clone(memory_format=torch.channels_last)
    stem.probe, stem.first = static[first:stop].detach().requires_grad_(), first
    out = stem(static)
    out.backward(gy)
    stem.probe, probe = None, stem.probe
    assert probe.grad is not None
    assert whole.grad is not None
    assert probe.grad.shape == probe.shape
    for fast, slow in (
        (out.detach(), want.detach()),
        (probe.grad, whole.grad[first:stop]),
        *((a.grad, b.grad) for a, b in zip(stem.parameters(), twin.parameters(), strict=True)),
    ):
        torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-12)
    stem.zero_grad()
    stem(static).backward(gy)  # without a probe, and in evaluation, it is a plain convolution
    torch.testing.assert_close(stem.weight.grad, twin.weight.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("full_precision", [False, True])
def test_stem_under_autocast(dtype: torch.dtype, full_precision: bool) -> None:
    model = stem_net(nn.Conv2d(3, 6, 3, padding=1, bias=True))
    install_stem(model, 12)
    stem = stem_of(model)
    assert stem is not None
    stem.full_precision = full_precision
    x = torch.randn(4, 3, 12, 12)
    whole = x.clone().requires_grad_()
    want = nn.functional.conv2d(whole, stem.weight, stem.bias, padding=1)
    gy = torch.randn_like(want).to(dtype)
    gw, gx = torch.autograd.grad(want, (stem.weight, whole), gy.float())
    stem.probe, stem.first = x[1:3].detach().requires_grad_(), 1
    with torch.autocast("cpu", dtype):
        out = stem(x)
    assert out.dtype == dtype
    out.backward(gy)
    assert stem.probe.grad is not None
    assert stem.weight.grad is not None
    assert stem.probe.grad.dtype == stem.weight.grad.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    for fast, slow, factor in (
        (out, want, 4),
        (stem.probe.grad, gx[1:3], 4),
        (stem.weight.grad, gw, 4),
    ):
        assert (fast.float() - slow).abs().max() <= factor * eps * slow.abs().max()
    if full_precision:  # only the result is rounded
        assert torch.equal(
            out, nn.functional.conv2d(x, stem.weight, stem.bias, padding=1).to(dtype)
        )
        torch.testing.assert_close(stem.weight.grad, gw, rtol=1e-4, atol=1e-4)


class Twice(nn.Module):
    """Two modules read the image: a stem's gradient would be half of the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x) + self.b(x))


class Scaled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


class Residual(nn.Module):
    """The image also reaches the output past the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x


@pytest.mark.parametrize(
    "model",
    [
        Twice(),
        Scaled(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
        Residual(),
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
        stem_net(nn.Conv2d(3, 6, 3, padding="same")),
        stem_net(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")),
    ],
    ids=[
        "two readers",
        "not first",
        "image bypasses it",
        "norm first",
        "string padding",
        "reflect padding",
    ],
)
def test_no_stem_where_its_gradient_would_be_wrong(model: nn.Module) -> None:
    install_stem(model, 12)
    assert stem_of(model) is None
