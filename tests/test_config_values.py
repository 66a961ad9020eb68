"""How values arrive in a config: from a YAML file, from `key=value`, and back from its own file."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fap.config import Config, load_config, make_config


def test_numbers_and_words_that_yaml_misreads(tmp_path: Path) -> None:
    file = tmp_path / "my_run.yaml"
    file.write_text(
        "optim: {weight_decay: 1e-4, clean_batch: 1.28e2}\n"
        "method: {p_adv: 1/9, shuffle: off}\n"
        "run: {graph: on}\n"
    )
    config = load_config(file, ["seed=3", "run.amp=off"])
    assert config.optim.weight_decay == 1e-4
    assert config.optim.clean_batch == 128
    assert config.method.adv_group_rows == 8
    assert config.method.shuffle == "off"
    assert (config.run.graph, config.run.amp) == ("on", "off")
    assert (config.name, config.seed) == ("my_run", 3)


# ---------------------------------------------------------------------- key=value

TEXT_FIELDS = ["model.name", "model.init", "data.train", "data.val", "run.dir"]
PLAIN = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=50
)
PATHS = PLAIN.filter(lambda text: not text.startswith("~") and text != "null")


def value_of(config: Config, key: str) -> Any:
    """Of the field of a dotted name."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@given(st.sampled_from(TEXT_FIELDS), PATHS)
def test_text_arrives_from_the_command_line_as_it_stands(key: str, text: str) -> None:
    assert value_of(load_config(None, [f"{key}={text}"]), key) == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=001", "001"),
        ("name=null", "null"),
        ("name=1e5", "1e5"),
        ("run.dir=2026-11-27", "2026-11-27"),
        ("run.dir=null", "null"),
        ("run.dir=on", "on"),
        ("data.train=/a/my #1/x.beton", "/a/my #1/x.beton"),
        ("data.train=/a/b=c: [d].beton", "/a/b=c: [d].beton"),
        ("data.train='x'", "'x'"),
        ("data.train= x ", " x "),
        ("data.train=null", None),
        ("data.train=./null", "./null"),
        ("data.train=~/x", "/home/me/x"),
        ("data.val=~", "/home/me"),
        ("model.init=~/w.safetensors", "/home/me/w.safetensors"),
        ("run.dir=~/runs", "/home/me/runs"),
        ("run.dir=./~", "./~"),
        ("run.dir=a/~/b", "a/~/b"),
        ("model.num_classes=null", None),
        ("run.max_steps=1e5", 100_000),
        ("budget.milestones=[]", ()),
        ("data.sizes=[[0, 128], [6, 1.6e2]]", ((0, 128), (6, 160))),
        ("budget.milestones=null", (30, 60, 90, 100)),
        ("seed=4294967295", 4294967295),
    ],
)
def test_an_override_means_what_it_says(
    override: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    key, _, _ = override.partition("=")
    assert value_of(load_config(None, [override]), key) == value


def test_home_folders_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("data: {train: ~/a}\nrun: {dir: '~'}\n")
    config = load_config("~/x.yaml")
    assert config.data.train == f"{tmp_path}/a"
    assert config.run.dir == str(tmp_path)


# ---------------------------------------------------------------------- there and back

COUNT = st.integers(1, 2**31 - 1)
NAMES = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", fullmatch=True)
NUMBER = st.floats(-1e30, 1e30)
POSITIVE = st.floats(0, 1e30, exclude_min=True)
SHARE = st.floats(0, 1)
ATTACK = {"eps_255": POSITIVE, "attack_steps": st.integers(1, 9), "random_start": st.booleans()}
SEPARATE = ATTACK | {"weight_adv": POSITIVE}
METHODS = st.one_of(
    st.fixed_dictionaries({"name": st.just("vanilla")}),
    st.fixed_dictionaries(
        {"name": st.sampled_from(["fast_advprop", "noise"])},
        optional={
            "p_adv": st.sampled_from(["1/9", 0.2, Fraction(1, 3), 0.5, "200/1000"]),
            "schedule": st.sampled_from(["sequential", "fused", "pipelined", "parallel"]),
            "eps_255": POSITIVE,
            "combine": st.sampled_from(["sum", "mean"]),
            "shuffle": st.sampled_from(["ranks", "groups", "off"]),
        },
    ),
    st.fixed_dictionaries({"name": st.just("decoupled")}, optional=SEPARATE),
    st.fixed_dictionaries(
        {"name": st.just("advprop")},
        optional=SEPARATE | {"attack_bn": st.sampled_from(["batch", "running"])},
    ),
    st.fixed_dictionaries(
        {"name": st.just("adversarial_training")},
        optional=ATTACK | {"attack_bn": st.sampled_from(["batch", "running"])},
    ),
)


@st.composite
def budgets(draw: st.DrawFn) -> dict[str, Any]:
    epochs = draw(st.integers(1, 2000))
    tree: dict[str, Any] = {"epochs": epochs, "warmup_epochs": draw(SHARE)}
    schedule = draw(st.sampled_from([None, "milestones", "cosine", "linear", "constant"]))
    if schedule is not None:
        tree["lr_schedule"] = schedule
    if schedule in ("cosine", "linear"):
        tree["final_lr"] = draw(SHARE)
    elif schedule != "constant" and draw(st.booleans()):
        milestones = draw(st.sets(st.integers(1, max(1, epochs - 1)), max_size=8))
        tree["milestones"] = sorted(milestones - {epochs})
    return tree


ANY_CONFIG = st.fixed_dictionaries(
    {},
    optional={
        "name": NAMES,
        "seed": st.integers(0, 2**32 - 1),
        "resume": st.sampled_from(["never", "auto"]),
        "paper": st.dictionaries(
            st.sampled_from(["top1", "imagenet_c", "imagenet_r", "stylized"]), st.floats(0, 100)
        ),
        "model": st.fixed_dictionaries(
            {},
            optional={"name": PLAIN, "num_classes": COUNT | st.none(), "init": PATHS | st.none()},
        ),
        "method": METHODS,
        "data": st.fixed_dictionaries(
            {},
            optional={
                "train": PATHS,
                "val": PATHS | st.none(),
                "mix_alpha": POSITIVE,
                "flip": SHARE,
                "mean": st.lists(NUMBER, min_size=3, max_size=3),
                "std": st.lists(POSITIVE, min_size=3, max_size=3),
                "threads": COUNT | st.none(),
                "most_boxes": COUNT,
                "sizes": st.just([[0, 128]]) | st.none(),
            },
        ),
        "optim": st.fixed_dictionaries(
            {},
            optional={
                "lr": POSITIVE,
                "weight_decay": st.floats(0, 1),
                "class_weights": st.none()
                | st.just("balanced")
                | st.lists(POSITIVE, min_size=2, max_size=9),
            },
        ),
        "budget": budgets(),
        "run": st.fixed_dictionaries(
            {},
            optional={
                "dir": PATHS,
                "graph": st.sampled_from(["auto", "on", "off"]),
                "compile": st.booleans(),
            },
        ),
    },
)


@st.composite
def letterboxes(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of `data` that detection has a meaning for."""
    jitter = sorted(draw(st.lists(POSITIVE, min_size=2, max_size=2)))
    size = draw(COUNT | st.lists(COUNT, min_size=2, max_size=2))
    return {"crop": "letterbox", "size": size, "jitter": jitter, "most_boxes": draw(COUNT)}


@given(letterboxes())
def test_any_canvas_survives_its_file_and_its_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    config = make_config({"task": "detection", "data": data})
    size = data["size"]
    if isinstance(size, int):
        size = [size, size]
    assert list(config.data.sides) == size
    assert config.data.eval_crop == "letterbox"
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file) == config
    assert make_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config


@given(ANY_CONFIG)
def test_any_config_survives_its_file_and_its_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    config = make_config(tree)
    assert config.model.name == tree.get("model", {}).get("name", "resnet50")
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file) == config
    assert make_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_a_size_is_written_as_it_is_given_and_a_square_by_its_side() -> None:
    for given_size, line in ((224, "  size: 224"), ([96, 96], "  size: 96"), (64.0, "  size: 64")):
        config = make_config({"data": {"size": given_size}})
        assert line in config.to_yaml().splitlines()
        assert config.data.sides[0] == config.data.sides[1] == config.data.size
    letterbox = {"crop": "letterbox", "size": [800, 1344]}
    config = make_config({"task": "detection", "data": letterbox})
    assert config.model_dump(mode="json")["data"]["size"] == [800, 1344]
    assert config.data.sides == (800, 1344)
    # Nothing is resized before a centre crop, so nothing is compared with `resize`.
    assert config.data.resize < 800


def test_mix_is_for_squares_that_an_image_fills() -> None:
    letterbox = {"crop": "letterbox", "mix": "mixup"}
    with pytest.raises(ValueError, match=r"data.mix = 'mixup' with data.crop = 'letterbox'"):
        make_config({"task": "detection", "data": letterbox})
