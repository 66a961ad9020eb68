"""Published weights by name (`model.init`): names, caches made by hand, and no network at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from torch import Tensor

from fap.class_maps import imagenet
from fap.config import Config, load_config
from fap.nets.build import plain
from fap.nets.pretrained import load_init, load_strictly
from fap.nets.weights.about import About
from fap.nets.weights.find import find_weights
from fap.nets.weights.of_timm import with_imagenets_names
from fap.nets.weights.settle import Start, start_of
from tests.nets.conftest import randomise_norms

NOBODY = "http://127.0.0.1:9"  # where no server answers
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESNET18 = torchvision.models.ResNet18_Weights.IMAGENET1K_V1


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and a network that refuses every connection."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.setenv(name, NOBODY)
    monkeypatch.setenv("no_proxy", "")
    return tmp_path


def put_torch(caches: Path, name: str, state: Mapping[str, Tensor]) -> None:
    folder = caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), folder / name)


def put_hub(caches: Path, repository: str, state: Mapping[str, Tensor], config: Any = None) -> None:
    """As the Hub's own client leaves it."""
    folder = caches / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    safetensors.torch.save_file(dict(state), snapshot / "model.safetensors")
    if config is not None:
        (snapshot / "config.json").write_text(json.dumps(config))


def random_state(name: str, n_classes: int = 1000, **options: Any) -> dict[str, Tensor]:
    """Of a model of timm or torchvision, with norms that no fresh model has."""
    if name.startswith("timm/"):
        model = timm.create_model(name.removeprefix("timm/"), num_classes=n_classes, **options)
    else:
        model = torchvision.models.get_model(name, num_classes=n_classes, **options)
    randomise_norms(model)
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def refusal(init: str, name: str | None = None) -> str:
    """The one line that says why there are no such weights."""
    with pytest.raises(ValueError) as error:
        find_weights(init, name)
    message = str(error.value)
    assert message.startswith(f"model.init = {init!r}: ")
    assert "\n" not in message
    assert len(message) < 1200
    return message


# ---------------------------------------------------------------------- torchvision


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("ResNet18_Weights.IMAGENET1K_V1", None),
        ("resnet18", None),
        ("resnet18.DEFAULT", None),
        ("IMAGENET1K_V1", "resnet18"),
        ("DEFAULT", "torchvision:resnet18"),
    ],
)
def test_weights_of_torchvision(caches: Path, asked: str, name: str | None) -> None:
    state = random_state("resnet18")
    put_torch(caches, "resnet18-f37072fd.pth", state)
    weights = find_weights(f"torchvision:{asked}", name)
    about = weights.about
    assert (about.architecture, about.num_classes) == ("resnet18", 1000)
    assert (about.size, about.resize, about.interpolation) == (224, 256, "bilinear")
    assert about.mean == (0.485, 0.456, 0.406)
    assert about.std == (0.229, 0.224, 0.225)
    assert all(torch.equal(weights.state[k], v) for k, v in state.items())
    assert about.classes == imagenet()
    is_whole = asked == repr(RESNET18)
    assert weights.notes == (() if is_whole else (f"these are {RESNET18!r}",))


def test_weights_of_torchvision_that_are_not_there(caches: Path) -> None:
    message = refusal("torchvision:ResNet18_Weights.IMAGENET1K_V1")
    cached = caches / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    for part in ("cannot be fetched", RESNET18.url, str(cached), f"curl -LO {RESNET18.url}"):
        assert part in message
    cached.write_bytes(b"half of it")
    message = refusal("torchvision:ResNet18_Weights.IMAGENET1K_V1")
    assert f"{cached} is damaged" in message
    assert "remove it" in message


def test_a_pickle_in_torchs_cache_is_not_executed(caches: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (caches / "executed",)

    put_torch(caches, "resnet18-f37072fd.pth", {"x": Bomb()})  # type: ignore[dict-item]
    assert "no file of tensors" in refusal("torchvision:resnet18")
    assert not (caches / "executed").exists()


def test_names_that_torchvision_does_not_have() -> None:
    assert "there are: IMAGENET1K_V1" in refusal("torchvision:ResNet18_Weights.IMAGENET1K_V9")
    assert "did you mean ResNet18_Weights" in refusal("torchvision:ResNet18_Weight.IMAGENET1K_V1")
    assert "with model.name" in refusal("torchvision:DEFAULT")
    assert "with model.name" in refusal("torchvision:DEFAULT", "timm/resnet18")
    assert "no weights of this name" in refusal("torchvision:ResNet50_QuantizedWeights.DEFAULT")


@pytest.mark.slow
def test_old_names_and_heads_that_are_not_trained_here(caches: Path) -> None:
    """Published DenseNets have norm.1 for norm1, Inception an auxiliary head and another input."""
    state = random_state("densenet121")
    old = {k.replace("norm1.", "norm.1.").replace("conv1.", "conv.1."): v for k, v in state.items()}
    assert old.keys() != state.keys()
    put_torch(caches, "densenet121-a639ec97.pth", old)
    weights = find_weights("torchvision:densenet121")
    model = plain("densenet121", 1000)
    load_strictly(model, weights)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())

    source = torchvision.models.googlenet(init_weights=False, transform_input=True).eval()
    put_torch(caches, "googlenet-1378be20.pth", source.state_dict())
    weights = find_weights("torchvision:googlenet")
    assert weights.about.mean == weights.about.std == (0.5, 0.5, 0.5)
    assert "normalises its input a second time" in " ".join(weights.notes)
    model = plain("googlenet", 1000).eval()
    load_strictly(model, weights)
    images = torch.rand(1, 3, 64, 64)  # 0..1
    for_torchvision = torchvision.transforms.functional.normalize(
        images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    with torch.inference_mode():
        torch.testing.assert_close(
            model((images - 0.5) / 0.5), source(for_torchvision), rtol=1e-4, atol=1e-5
        )


# ---------------------------------------------------------------------- timm


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("test_resnet.r160_in1k", None),
        ("test_resnet", None),
        ("r160_in1k", "timm/test_resnet"),
        ("r160_in1k", "timm:test_resnet"),
    ],
)
def test_weights_of_timm(caches: Path, asked: str, name: str | None) -> None:
    state = random_state("timm/test_resnet")
    put_hub(caches, "timm/test_resnet.r160_in1k", state)
    weights = find_weights(f"timm:{asked}", name)
    about = weights.about
    assert (about.architecture, about.num_classes) == ("timm/test_resnet", 1000)
    assert (about.size, about.resize, about.interpolation) == (160, 168, "bilinear")
    assert about.mean == about.std == (0.5, 0.5, 0.5)
    assert about.classes == imagenet()
    assert all(torch.equal(weights.state[k], v) for k, v in state.items())
    assert ("these are test_resnet.r160_in1k" in weights.notes) == (
        asked != "test_resnet.r160_in1k"
    )


@pytest.mark.parametrize(("tag", "n_classes", "known"), [
    ("a1_in1k", 1000, True),
    ("in1k", 1000, True),
    ("augreg_in21k_ft_in1k", 1000, True),
    ("fb_in22k_ft_in1k_384", 1000, True),
    ("in1k", 10, False),  # another head
    ("augreg_in21k", 21843, False),
    ("in1k_ft_in12k", 1000, False),
    ("fb_dino", 1000, False),
    ("", 1000, False),
])  # fmt: skip
def test_the_tag_says_whether_outputs_are_imagenets(tag: str, n_classes: int, known: bool) -> None:
    about = with_imagenets_names(About(num_classes=n_classes), tag)
    assert about.classes == (imagenet() if known else None)
    own = tuple(str(number) for number in range(n_classes))
    assert with_imagenets_names(About(num_classes=n_classes, classes=own), tag).classes == own


def test_weights_of_timm_that_are_not_there(caches: Path) -> None:
    message = refusal("timm:test_resnet")
    folder = caches / "hub" / "models--timm--test_resnet.r160_in1k"
    for part in ("cannot be fetched", "timm/test_resnet.r160_in1k", str(folder), "hf download"):
        assert part in message


def test_a_network_that_refuses_is_one_line(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only offline mode, which asks nobody."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", never)  # nor is it asked again
    close_session()  # the next one is made with the fixture's proxy
    message = refusal("timm:test_resnet")
    for part in ("cannot be fetched from", "refused", "hf download timm/test_resnet.r160_in1k"):
        assert part in message
    # What the cache holds is found all the same, and the client is left as it was.
    put_hub(caches, "timm/test_resnet.r160_in1k", random_state("timm/test_resnet"))
    assert find_weights("timm:test_resnet").about.num_classes == 1000
    close_session()
    assert constants.HF_HUB_OFFLINE is False


def never(*_: object) -> NoReturn:
    raise AssertionError("it waits")


def test_names_that_timm_does_not_have() -> None:
    assert "there are r160_in1k" in refusal("timm:test_resnet.r161_in1k")
    assert "did you mean" in refusal("timm:convnext_tny")
    assert "timm:TAG with model.name" in refusal("timm:r160_in1k", "torchvision:alexnet")
    assert "test_resnet has no weights 'x'" in refusal("timm:x", "timm/test_resnet")


def test_a_model_of_one_size_gets_its_positions_resampled(caches: Path) -> None:
    """As timm does it."""
    put_hub(caches, "timm/test_vit.r160_in1k", random_state("timm/test_vit"))
    weights = find_weights("timm:test_vit", size=64)
    want = timm.create_model("test_vit", pretrained=True, img_size=64).state_dict()
    assert weights.about.size == 160
    assert weights.state["pos_embed"].shape == (1, 1 + 16, 64)
    assert all(torch.equal(weights.state[k], v) for k, v in want.items())
    # A file is resampled when it is loaded.
    file = caches / "vit.pth"
    torch.save(random_state("timm/test_vit"), file)
    model = plain("timm/test_vit", 1000, 64)
    load_strictly(model, find_weights(str(file)))
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_torchvisions_transformers_get_their_positions_resampled(caches: Path) -> None:
    state = random_state("vit_b_32", 3)
    torch.save(state, caches / "vit.pth")
    model = plain("vit_b_32", 3, 64)
    load_strictly(model, find_weights(str(caches / "vit.pth")))
    assert model.encoder.pos_embedding.shape == (1, 1 + 4, 768)
    assert torch.equal(model.state_dict()["heads.head.weight"], state["heads.head.weight"])


# ---------------------------------------------------------------------- the Hub


CONFIG = {
    "architecture": "test_resnet",
    "num_classes": 7,
    "pretrained_cfg": {
        "input_size": [3, 96, 96], "crop_pct": 0.75, "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "num_classes": 7, "classifier": "fc",
    },
}  # fmt: skip


def test_weights_of_the_hub(caches: Path) -> None:
    state = random_state("timm/test_resnet", 7)
    put_hub(caches, "me/mine", state, CONFIG)
    weights = find_weights("hf-hub:me/mine")
    about = weights.about
    assert (about.architecture, about.num_classes) == ("timm/test_resnet", 7)
    assert (about.size, about.resize, about.interpolation) == (96, 128, "bicubic")
    assert (about.mean, about.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert all(torch.equal(weights.state[k], v) for k, v in state.items())


def test_a_tag_on_the_hub_counts_in_timms_own_repositories_only(caches: Path) -> None:
    """Whoever trains on other classes and uploads may leave the tag as it was."""
    state = random_state("timm/test_resnet")
    cfg = CONFIG["pretrained_cfg"] | {"tag": "r160_in1k", "num_classes": 1000}  # type: ignore[operator]
    config = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": cfg}
    for repository, classes in (("timm/test_resnet.r160_in1k", imagenet()), ("me/mine", None)):
        put_hub(caches, repository, state, config)
        assert find_weights(f"hf-hub:{repository}").about.classes == classes


def test_weights_of_the_hub_that_are_not_there(caches: Path) -> None:
    message = refusal("hf-hub:me/mine@v1")
    for part in ("config.json of me/mine", "hf download me/mine --revision v1", "models--me--mine"):
        assert part in message
    for asked in ("mine", "../mine", "a/b/c", "", "me/mine@"):
        assert "write hf-hub:USER/REPOSITORY" in refusal(f"hf-hub:{asked}")


def test_a_model_of_the_hub_that_no_name_expresses(caches: Path) -> None:
    state = random_state("timm/test_resnet", 7)
    put_hub(caches, "me/other", state, CONFIG | {"model_args": {"act_layer": "gelu"}})
    assert "with other arguments ('act_layer')" in refusal("hf-hub:me/other")
    put_hub(caches, "me/unknown", state, CONFIG | {"architecture": "no_such"})
    assert "which timm does not have" in refusal("hf-hub:me/unknown")


def test_a_folder_as_the_hub_has_it(caches: Path) -> None:
    folder = caches / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert "no model.safetensors" in refusal(str(folder))
    state = random_state("timm/test_resnet", 7)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    weights = find_weights(str(folder))
    assert weights.about.architecture == "timm/test_resnet"
    assert weights.about.resize == 128
    assert all(torch.equal(weights.state[k], v) for k, v in state.items())
    for broken in (
        "[",
        "[1]",
        "{}",
        '{"architecture": 3}',
        '{"architecture": "x", "pretrained_cfg": 1}',
    ):
        (folder / "config.json").write_text(broken)
        assert "config.json" in refusal(str(folder))


# ---------------------------------------------------------------------- what they settle


def started(*words: str) -> Start:
    return start_of(load_config(None, words))


def settled_by_timm(caches: Path) -> str:
    put_hub(caches, "me/mine", random_state("timm/test_resnet", 7), CONFIG)
    return "model.init=hf-hub:me/mine"


def test_what_is_unset_follows_the_weights(caches: Path) -> None:
    start = started(settled_by_timm(caches))
    config = start.config
    assert config.model.name == "timm/test_resnet"
    data = config.data
    assert (data.size, data.resize, data.eval_filter) == (96, 128, "bicubic")
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    said = "\n".join(start.lines)
    for part in (
        "weights    'hf-hub:me/mine'", "model.name = timm/test_resnet",
        "data.mean = [0.1, 0.2, 0.3]", "data.std = [0.4, 0.5, 0.6]", "data.size = 96",
        "data.resize = 128", "data.eval_filter = bicubic",
    ):  # fmt: skip
        assert part in said
    assert "warning" not in said


@pytest.mark.parametrize(("size", "resize"), [(384, 439), (96, 110)])
def test_weights_that_say_their_size_and_no_resize(caches: Path, size: int, resize: int) -> None:
    """As an unset data.resize follows data.size."""
    cfg = {name: value for name, value in CONFIG["pretrained_cfg"].items() if name != "crop_pct"}
    config = CONFIG | {"pretrained_cfg": cfg | {"input_size": [3, size, size]}}
    put_hub(caches, "me/large", random_state("timm/test_resnet", 7), config)
    data = started("model.init=hf-hub:me/large").config.data
    assert (data.size, data.resize) == (size, resize)


def test_what_is_set_stays_and_is_told(caches: Path) -> None:
    words = ("data.mean=[0.5,0.5,0.5]", "data.size=64", "model.name=resnet18")
    start = started(settled_by_timm(caches), *words, "data.eval_filter=bilinear")
    config = start.config
    assert (config.model.name, config.data.size) == ("resnet18", 64)
    assert config.data.mean == (0.5, 0.5, 0.5)
    assert config.data.std == (0.4, 0.5, 0.6)
    assert config.data.resize == 85  # the weights' ratio
    said = "\n".join(start.lines)
    for part in (
        "warning: model.init = 'hf-hub:me/mine' was trained with mean = [0.1, 0.2, 0.3], but",
        "was trained with 96 px, but data.size = 64",
        "holds weights of 'timm/test_resnet', but model.name = 'resnet18'",
        "evaluated with 'bicubic'; here it is bilinear",
    ):
        assert part in said
    start = started(settled_by_timm_again(), "data.resize=100")
    assert "a shorter side of 128 px, but data.resize = 100" in "\n".join(start.lines)


def settled_by_timm_again() -> str:
    return "model.init=hf-hub:me/mine"


def test_a_setting_that_does_not_go_with_the_weights_says_whose_it_is(caches: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data\.resize = 90 must be at least data\.size = 96"
    ) as e:
        started(settled_by_timm(caches), "data.resize=90")
    assert "(model.init = 'hf-hub:me/mine' gives" in str(e.value)


def test_weights_that_say_nothing_settle_nothing_and_that_is_said(tmp_path: Path) -> None:
    torch.save(random_state("resnet18"), tmp_path / "x.pth")
    words = (f"model.init={tmp_path / 'x.pth'}", "model.name=resnet18")
    start = started(*words)
    assert start.config == load_config(None, words)
    assert "nobody says which mean and std" in "\n".join(start.lines)
    assert "nobody" not in "\n".join(started(*words, "data.mean=[0.1,0.5,0.5]").lines)


def test_without_init_nothing_changes() -> None:
    config = Config()
    assert start_of(config) == (config, None, [])


def test_a_classifiers_weights_do_not_name_a_detector(caches: Path) -> None:
    put_torch(caches, "resnet18-f37072fd.pth", random_state("resnet18"))
    words = (
        "task=detection", "data.crop=letterbox", "model.init=torchvision:resnet18",
        "model.name=retinanet_resnet18_fpn",
    )  # fmt: skip
    start = started(*words)
    assert start.config.model.name == "retinanet_resnet18_fpn"
    assert start.config.data.mean == (0.485, 0.456, 0.406)
    assert start.config.data.size == load_config(None, words).data.size
    assert "warning" not in "\n".join(start.lines)


def test_headers_that_are_nonsense_are_told(tmp_path: Path) -> None:
    state = random_state("resnet18")
    for text in (
        "garbage",
        "[" * 10_000,
        "NaN",
        "[0.5, 0.5]",
        '"' + "x" * 10**6 + '"',
        "[1e400,1,1]",
    ):
        safetensors.torch.save_file(state, tmp_path / "x.safetensors", {"mean": text})
        start = started(f"model.init={tmp_path / 'x.safetensors'}")
        (line,) = [line for line in start.lines if "its header says mean" in line]
        assert len(line) < 400
        assert start.config.data.mean == (0.5, 0.5, 0.5)


def test_what_is_published_is_loaded_with_a_new_head(caches: Path) -> None:
    put_torch(caches, "resnet18-f37072fd.pth", random_state("resnet18"))
    model = plain("resnet18", 5)
    said: list[str] = []
    weights = find_weights("torchvision:resnet18")
    load_init(model, "ours", weights, 5, said.append)
    assert said == [
        "model.init = 'torchvision:resnet18': head of 1,000 classes replaced by one of 5"
    ]
    assert torch.equal(model.conv1.weight, weights.state["conv1.weight"])
