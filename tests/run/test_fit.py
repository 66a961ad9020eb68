"""A recipe's rows, epochs and rate are fitted to the data, and what the user gives stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fap import recipes
from fap.budget import budget
from fap.cli import train_command
from fap.config import Config, load_config, make_config
from fap.run.fit import FIELDS, LEAST_GROUP, RATES, Fitted, fit, fitted_config
from fap.run.train import Run
from fap.sections.optim import OPTIMISERS
from tests.run.test_data import image_folder

FINETUNE = recipes.file_of("finetune")
assert FINETUNE is not None
MODEL = "model=cifar_resnet8"


def method(name: str = "fast_advprop", **fields: Any) -> Config:
    return make_config({"method": {"name": name, **fields}})


def fitted_to(n_images: int, config: Config, optimiser: str = "sgd", world: int = 1) -> Fitted:
    return fit(n_images, config.method.entry, config.method.p_adv, optimiser, {}, world)


def with_fitted(config: Config, fitted: Fitted) -> Config:
    tree = config.model_dump()
    tree["optim"] |= {"clean_batch": fitted.clean_batch, "lr": fitted.lr}
    tree["method"]["group_rows"] = fitted.group_rows
    tree["budget"] |= {"epochs": fitted.epochs, "milestones": None}
    return make_config(tree)


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(
    ("n_images", "expected"),
    [
        (64, (8, 8, 50)),  # 6 steps an epoch; of two groups there would be 3
        (80, (16, 8, 50)),  # 4 steps
        (160, (16, 8, 50)),
        (500, (32, 16, 50)),
        (2_000, (128, 64, 50)),
        (10_000, (128, 64, 17)),
        (1_000_000, (128, 64, 10)),
    ],
)
def test_the_rows_grow_with_the_images(n_images: int, expected: tuple[int, int, int]) -> None:
    fitted = fitted_to(n_images, method())
    assert (fitted.clean_batch, fitted.group_rows, fitted.epochs) == expected


METHODS = st.sampled_from([
    method(), method(p_adv="1/9"), method(p_adv="1/3"), method(p_adv="1/2"), method("vanilla"),
    method("decoupled"), method("advprop"), method("adversarial_training"),
])  # fmt: skip


@given(st.integers(40, 3_000_000), METHODS, st.sampled_from([1, 2, 4]))
def test_every_fit_is_a_run(n_images: int, config: Config, world: int) -> None:
    """The config takes the numbers, and the budget has the steps that are promised."""
    fitted = fitted_to(n_images, config, world=world)
    run = with_fitted(config, fitted)
    assert fitted.clean_batch % (fitted.group_rows * world) == 0
    assert fitted.group_rows >= LEAST_GROUP
    loaded = fitted.clean_batch + run.loader_adv_rows
    if n_images < loaded:  # several ranks and hardly an image
        assert world > 1
        return
    spent = budget(run, n_images)
    fewest = fitted_to(40, config, world=world)
    enough = 8 if fitted.clean_batch > 2 * fewest.clean_batch else 4
    assert spent.steps_per_epoch >= enough or fitted.clean_batch == fewest.clean_batch
    if fitted.clean_batch > fewest.clean_batch or world > 1:
        assert fitted.clean_batch // fitted.group_rows >= 2, "shuffling needs two groups"


def test_the_rate_follows_the_rows_as_the_optimiser_wants_it() -> None:
    """SGD's linearly, so that `optim.lr` is one number; Adam's by the root."""
    assert RATES.keys() == OPTIMISERS.keys()
    few, many = 64, 10_000
    rates = {}
    for name in ("sgd", "adamw"):
        rates[name] = [fitted_to(n, method(), name) for n in (few, many)]
    assert rates["sgd"][0].lr == rates["sgd"][1].lr == 0.04
    at = [fitted.lr * fitted.clean_batch / 256 for fitted in rates["adamw"]]
    assert at == pytest.approx([1e-4 * (8 / 64) ** 0.5, 1e-4 * 2**0.5], rel=0.01)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.clean_batch=24", {"clean_batch": 24, "group_rows": 12}),
        ("method.group_rows=16", {"group_rows": 16, "clean_batch": 16}),
        ("budget.epochs=3", {"epochs": 3}),
        ("optim.lr=0.5", {"lr": 0.5}),
    ],
)
def test_what_is_given_stays(tmp_path: Path, word: str, expected: dict[str, float]) -> None:
    data = image_folder(tmp_path / "photos", ["ant", "bee"], each=20)
    assert FINETUNE is not None
    config, line = fitted_config(FINETUNE, [f"data.train={data}", MODEL, word])
    found = Fitted(
        config.optim.clean_batch, config.method.group_rows, config.budget.epochs, config.optim.lr
    )
    for name, value in expected.items():
        assert getattr(found, name) == value
    key, _, value = word.partition("=")
    assert f"{key} {value} (given)" in line
    assert line.startswith("fitted     to 32 training images: ")
    for field in FIELDS.values():
        assert field in line


# ------------------------------------------------------------------ the recipe


def test_the_recipe_trains_on_a_few_photographs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = image_folder(tmp_path / "photos", ["ant", "bee", "cat"], each=10)
    words = [
        "finetune", f"data.train={data}", MODEL, "data.size=32", "data.resize=32",
        "budget.epochs=2", f"run.dir={tmp_path / 'runs'}", "run.device=cpu",
    ]  # fmt: skip
    train_command.run([*words, "run.max_steps=3"])
    said = capsys.readouterr().out
    assert "fitted     to 24 training images: optim.clean_batch 8, method.group_rows 8" in said
    assert "train      24 images, 3 class(es) ant to cat, 8 images per class" in said
    assert "val        6 images, 3 class(es) ant to cat, 2 images per class" in said
    folder = tmp_path / "runs" / "finetune" / "seed0"
    saved = load_config(folder / "config.yaml")
    assert (saved.optim.clean_batch, saved.method.group_rows, saved.budget.epochs) == (8, 8, 2)
    assert saved.data.val_share == 0.2
    assert (folder / "checkpoints" / "best.safetensors").exists()
    # The same command goes on, and so does the saved config.
    train_command.run([*words, "resume=auto"])
    assert "resuming" in capsys.readouterr().out
    again = Run(load_config(folder / "config.yaml"))
    assert again.progress.step == 4
    again.run_folder.release()


def test_data_to_validate_on_replace_the_part_held_out(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "photos", ["ant", "bee"], each=20)
    assert FINETUNE is not None
    config, line = fitted_config(FINETUNE, [f"data.train={data}", f"data.val={data}", MODEL])
    assert config.data.val_share is None
    assert "to 40 training images" in line


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit, match="1"):
        train_command.run(words)
    return capsys.readouterr().err


def test_mistakes_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"data.train={image_folder(tmp_path / 'photos', ['ant', 'bee'], each=4)}"
    assert "say which model: model=timm:convnext_tiny" in failure(capsys, "finetune", data)
    assert "neither a file nor a recipe: recipes are finetune" in failure(capsys, "finetun", data)
    assert "nowhere.yaml: no such file" in failure(capsys, "nowhere.yaml")
    for word, message in (
        ("optim.clean_batch=0", "optim.clean_batch = 0"),
        ("method.group_rows=many", "method.group_rows = 'many'"),
        ("budget.epochs=1.5", "budget.epochs = 1.5"),
        ("optim.lr=-1", "optim.lr = -1"),
        ("optim.clean_batch=9", "optim.clean_batch = 9: must be a multiple of 4 and at least 8"),
        ("data.nothing=1", "data.nothing"),
    ):
        assert message in failure(capsys, "finetune", data, MODEL, word)
    said = failure(capsys, "finetune", data, MODEL, f"run.dir={tmp_path}", "run.device=cpu")
    assert "data.train has 6 images, fewer than one batch of 10" in said


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (["method.p_adv=1/4"], ("method", "group_rows", 9)),
        (["method.p_adv=1/4", "optim.clean_batch=12"], ("method", "group_rows", 12)),
        (["data.sizes=[[0,16],[150,32]]", "budget.epochs=200"], ("budget", "epochs", 200)),
        (
            ["budget.lr_schedule=milestones", "budget.milestones=[150]", "budget.epochs=200"],
            ("budget", "milestones", (150,)),
        ),
        (["data.repeats=12"], ("data", "repeats", 12)),
    ],
)
def test_what_a_user_gives_is_not_held_against_what_is_fitted_later(
    tmp_path: Path, given: list[str], seen: tuple[str, str, Any]
) -> None:
    """The data are opened before their number is known, with a config that has the words too."""
    data = image_folder(tmp_path / "photos", ["ant", "bee"], each=60)
    assert FINETUNE is not None
    small = ["data.size=32", "data.resize=32"]
    config, _ = fitted_config(FINETUNE, [f"data.train={data}", MODEL, *small, *given])
    section, field, value = seen
    assert getattr(getattr(config, section), field) == value


@pytest.mark.parametrize(("name", "decay"), [("sgd", 1e-4), ("adamw", 0.05), ("lamb", 0.02)])
def test_the_decay_is_the_optimisers(tmp_path: Path, name: str, decay: float) -> None:
    """AdamW's 0.05 as SGD's penalty would undo the weights that a run starts from."""
    data = image_folder(tmp_path / "photos", ["ant", "bee"], each=10)
    assert FINETUNE is not None
    config, _ = fitted_config(FINETUNE, [f"data.train={data}", MODEL, f"optim.name={name}"])
    assert config.optim.weight_decay == decay


def test_a_folder_of_the_recipes_name_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that somebody made for the runs."""
    data = image_folder(tmp_path / "photos", ["ant", "bee"], each=10)
    monkeypatch.chdir(tmp_path)
    Path("finetune").mkdir()
    args = train_command.arguments(["finetune", f"data.train={data}", MODEL])
    _, fitted = train_command.wanted(args)
    assert "training images" in fitted


def test_a_file_of_the_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("finetune").write_text("budget: {epochs: 7}\n")
    args = train_command.arguments(["finetune"])
    config, fitted = train_command.wanted(args)
    assert config.budget.epochs == 7
    assert fitted == ""


def test_recipes_are_part_of_the_package() -> None:
    """What is installed has them: as package data, which the build is told of."""
    assert recipes.names() == ["finetune"]
    assert recipes.file_of("../recipes/finetune") is None
    code = "from fap import recipes; print(*recipes.names())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == recipes.names()


# ------------------------------------------------------------------ model=...


@pytest.mark.parametrize(
    ("word", "name", "init"),
    [
        ("model=cifar_resnet8", "cifar_resnet8", None),
        ("model=timm/resnet50", "timm/resnet50", None),
        ("model=timm:convnext_tiny", "timm/convnext_tiny", "timm:convnext_tiny"),
        (
            "model=timm:convnext_tiny.fb_in22k_ft_in1k",
            "timm/convnext_tiny",
            "timm:convnext_tiny.fb_in22k_ft_in1k",
        ),
        ("model=torchvision:resnet50", "resnet50", "torchvision:resnet50"),
        (
            "model=torchvision:resnet50.IMAGENET1K_V2",
            "resnet50",
            "torchvision:resnet50.IMAGENET1K_V2",
        ),
        ("model=hf-hub:timm/resnet18.a1_in1k", "resnet50", "hf-hub:timm/resnet18.a1_in1k"),
        ("model=mine/weights.safetensors", "resnet50", "mine/weights.safetensors"),
        ("model=./weights.safetensors", "resnet50", "./weights.safetensors"),
        ("model=/data/weights.pth", "resnet50", "/data/weights.pth"),
    ],
)
def test_model_is_short_for_name_and_weights(word: str, name: str, init: str | None) -> None:
    config = load_config(None, [word])
    assert config.model.name == name
    assert config.model.init == init
    later = load_config(None, [word, "model.name=resnet18"])
    assert later.model.name == "resnet18"
