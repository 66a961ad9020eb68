import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fap.config import (
    RENAMED,
    SECTIONS,
    Config,
    load_config,
    make_config,
    with_classes,
    with_current_names,
)
from fap.sections import MethodConfig, paper_milestones


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lr=fast", "optim.lr = 'fast'"),
        ("optim.lr=.inf", "optim.lr"),
        ("optim.momentum=1", "optim.momentum = 1"),
        ("method.padv=0.2", "did you mean 'p_adv'"),
        ("metod.p_adv=0.2", "did you mean 'method'"),
        ("method.p_adv=0", "(0, 1)"),
        ("method.p_adv=1", "(0, 1)"),
        ("method.p_adv=0.3", "13/45"),
        ("method.p_adv=1/0", "fraction"),
        ("method.attack_steps=2", "recycles one gradient"),
        ("method.attack_steps=0", "method.attack_steps = 0"),
        ("method.targeted=true", "no meaning"),
        ("method.attack_bn=running", "no meaning"),
        ("method.name=fgsm", "method.name = 'fgsm'"),
        (
            "run.norm_kernel=split",
            "run.norm_kernel = 'split': must be 'auto', 'triton' or 'framework'",
        ),
        ("optim.clean_batch=100", "multiple of method.group_rows"),
        ("data.resize=100", "data.resize"),
        ("data.scale=[1,0.1]", "data.scale"),
        ("model=3", "model = '3': model is a section; set its fields: name, num_classes, init"),
        ("model={name: resnet18}", "model is a section"),
        ("model.name.x=3", "SECTION.FIELD=value"),
        ("name.x=3", "name = {'x': 3}: must be text"),
        ("seed", "key=value"),
        ("=3", "key=value"),
        ("seed=[", "not a YAML value"),
        ("seed=", "seed = '': no value; null means unset"),
        ("seed=null", "seed = None: must be a whole number"),
        (
            "seed=010",
            "seed = '010': must be a whole number such as 10; no quotes, no leading zeros",
        ),
        ("seed='10'", "no quotes"),
        ("seed=1:30", "seed = '1:30'"),
        ("seed=0x10", "seed = '0x10'"),
        ("seed=1_000", "seed = '1_000'"),
        ("seed=2026-11-27", "seed = '2026-11-27'"),
        ("seed=true", "seed = True"),
        ("seed=0.5", "seed = 0.5"),
        ("seed=1 #2", "'#' begins no comment"),
        ("seed=#", "'#' begins no comment"),
        ("seed=4294967296", "less than or equal to 4294967295"),
        ("optim.clean_batch=1e30", "less than or equal to 2147483647"),
        ("optim.lr='0.1'", "optim.lr = '0.1': must be a number such as 0.1 or 1e-4"),
        ("optim.lr=010.5", "optim.lr = '010.5'"),
        ("optim.lr=true", "optim.lr = True"),
        ("optim.lr=.nan", "optim.lr = '.nan'"),
        ("optim.lr=1e99999999", "optim.lr = '1e99999999'"),
        ("optim.lr=1e31", "optim.lr = 1e+31: must be less than"),
        ("budget.gamma=2", "budget.gamma = 2"),
        ("data.mean=[0.5, '0.5', 0.5]", "data.mean.1 = '0.5': must be a number"),
        ("data.mean=0.5", "data.mean = 0.5: must be a list such as [1, 2]"),
        ("method.p_adv='0.2'", "fraction"),
        ("method.p_adv=1_0/50", "fraction"),
        ("method.p_adv=01/5", "fraction"),
        ("run.compile=yes", "run.compile = 'yes': must be true or false"),
        ("run.compile=on", "run.compile = 'on'"),
        ("run.compile=True", "run.compile = 'True'"),
        ("run.compile=1", "run.compile = 1"),
        ("run.compile='true'", "run.compile = 'true'"),
        ("run.graph=true", "run.graph = True: must be 'auto', 'on' or 'off'"),
        (
            "paper.top=1",
            "paper.top = 'top': must be 'top1', 'imagenet_c', 'imagenet_r' or 'stylized'",
        ),
        ("paper.top1=101", "paper.top1 = 101"),
        ("paper={top1: x}", "paper.top1 = 'x': must be a number"),
        ("data.train=", "data.train = '': must be a path, not empty"),
        ("data.train=a\0b", "without NUL"),
        (
            "data.train=~nobody-of-this-name/x",
            "no home folder is known for it; give the full path, or ./~nobody-of-this-name/x",
        ),
        ("data.train=bad\udce9", "data.train = 'bad\\udce9': must be text that UTF-8 can express"),
        ("model.name=", "model.name = ''"),
        ("model.num_classes=0", "model.num_classes = 0"),
        (
            "budget.milestones=[30, 30]",
            "budget.milestones = [30, 30] with budget.epochs = 105: must be strictly ascending",
        ),
        ("budget.milestones=[60, 30]", "strictly ascending"),
        (
            "budget.milestones=[30, 105]",
            "below budget.epochs; null means the paper's, scaled: [30, 60, 90, 100]",
        ),
        ("budget.milestones=30,60", "must be a list"),
    ],
)
def test_users_mistakes_name_field_value_and_remedy(override: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config(None, [override])
    assert says in str(error.value)


def test_combinations_without_meaning_are_refused() -> None:
    for overrides, says in (
        (["method.combine=mean", "method.sync=true"], "Algorithm 1"),
        (["method.name=vanilla", "method.eps_255=1"], "no meaning"),
        (["method.name=advprop", "method.p_adv=1/5"], "no meaning"),
        (["method.name=decoupled", "method.schedule=fused"], "no meaning"),
        (["method.name=advprop", "data.mix=mixup"], "unmixed"),
        (
            ["run.compile=true", "run.norm_kernel=triton"],
            "run.norm_kernel = 'triton' with run.compile = true",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            load_config(None, overrides)


def test_numbers_and_words_that_yaml_misreads(tmp_path: Path) -> None:
    file = tmp_path / "my_run.yaml"
    file.write_text(
        "optim: {weight_decay: 1e-4, clean_batch: 1.28e2}\nmethod: {p_adv: 1/9, shuffle: off}\nrun:"
        " {graph: on}\n"
    )
    config = load_config(file, ["seed=3", "run.amp=off"])
    assert config.optim.weight_decay == 1e-4
    assert config.optim.clean_batch == 128
    assert config.method.adv_group_rows == 8
    assert config.method.shuffle == "off"
    assert (config.run.graph, config.run.amp) == ("on", "off")
    assert (config.name, config.seed) == ("my_run", 3)


TEXT_FIELDS = ["model.name", "model.init", "data.train", "data.val", "run.dir"]
PLAIN = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=50
)
PATHS = PLAIN.filter(lambda text: not text.startswith("~") and text != "null")
NAMES = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", fullmatch=True)


def field(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@given(st.sampled_from(TEXT_FIELDS), PATHS)
def test_text_arrives_from_the_command_line_as_it_stands(key: str, text: str) -> None:
    assert field(load_config(None, [f"{key}={text}"]), key) == text


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
        ("budget.milestones=null", (30, 60, 90, 100)),
        ("seed=4294967295", 4294967295),
    ],
)
def test_an_override_means_what_it_says(
    override: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(None, [override])
    assert field(config, override.partition("=")[0]) == value


def test_the_largest_seed_serves_every_generator() -> None:
    torch.manual_seed(2**32 - 1)
    np.random.seed(2**32 - 1)
    np.random.SeedSequence([2**32 - 1, 0, 0])


def test_home_folders_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("data: {train: ~/a}\nrun: {dir: '~'}\n")
    config = load_config("~/x.yaml")
    assert config.data.train == f"{tmp_path}/a"
    assert config.run.dir == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "overrides", "name"),
    [
        (None, [], "fast_advprop"),
        (None, ["method.name=vanilla"], "vanilla"),
        (None, ["method.name=vanilla", "name=mine"], "mine"),
        ("{}", [], "stem"),
        ("{}", ["method.name=fast_advprop"], "stem"),
        ("{}", ["method.name=noise"], "noise"),
        ("method: {name: vanilla}", [], "stem"),
        ("method: {name: vanilla}", ["method.name=vanilla"], "stem"),
        ("method: {name: vanilla}", ["method.name=advprop"], "advprop"),
        ("method: {name: vanilla}", ["method.name=advprop", "name=mine"], "mine"),
        ("name: given\nmethod: {name: vanilla}", ["method.name=advprop"], "given"),
        ("name:\nmethod: {name: vanilla}", [], "stem"),
    ],
)
def test_the_name_says_what_the_run_is(
    tmp_path: Path, text: str | None, overrides: list[str], name: str
) -> None:
    file = None
    if text is not None:
        file = tmp_path / "stem.yaml"
        file.write_text(text)
    assert load_config(file, overrides).name == name


def test_a_config_made_in_python_is_named_too() -> None:
    assert Config().name == "fast_advprop"
    assert Config(method=MethodConfig(name="noise")).name == "noise"
    assert make_config({"method": {"name": "decoupled"}}).name == "decoupled"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/x",
        "a/b",
        "a\\b",
        ".x",
        "a b",
        "a\n",
        "ü",
        "a" * 101,
        "~",
        "\0",
        7,
        None,
        [],
    ],
)
def test_a_name_leads_nowhere_else(name: Any, tmp_path: Path) -> None:
    """Wherever it comes from: the command line, a file, a file's stem, a checkpoint."""
    if name is not None:
        with pytest.raises(ValueError, match=r"^name = "):
            make_config(Config().model_dump(mode="json") | {"name": name})
    if isinstance(name, str):
        with pytest.raises(ValueError, match=r"^name = .*not starting with"):
            load_config(None, [f"name={name}"])


def test_a_stem_that_is_no_name_asks_for_one(tmp_path: Path) -> None:
    file = tmp_path / "my run.yaml"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"'my run' cannot name a run .*; give name="):
        load_config(file)
    assert load_config(file, ["name=my_run"]).name == "my_run"
    assert load_config(file, ["method.name=vanilla"]).name == "vanilla"


def test_with_classes() -> None:
    config = load_config(None, ["method.p_adv=1/9", "budget.epochs=50", "name=x"])
    with pytest.raises(ValueError, match=r"model\.num_classes is not set"):
        _ = config.model.classes
    seven = with_classes(config, 7)
    assert seven.model.classes == seven.model.num_classes == 7
    assert with_classes(seven, 9).model.num_classes == 9
    assert seven.model_copy(update={"model": config.model}) == config
    with pytest.raises(ValueError, match=r"model\.num_classes = 0"):
        with_classes(config, 0)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "\x00"])
def test_a_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"x\.yaml"):
        load_config(file)
    with pytest.raises(ValueError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def test_only_a_small_regular_file_is_a_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "big.yaml").write_text("#" * 70_000)
    (tmp_path / "locked.yaml").symlink_to("locked.yaml")
    for name, says in (
        ("pipe", "is a named pipe, not a file"),
        ("folder", "is a folder, not a file"),
        ("zero", "is a character device"),
        ("big", "has more than 65,536 bytes"),
        ("locked", "[Ll]inks"),
    ):
        with pytest.raises(ValueError, match=rf"config .*{name}\.yaml.*{says}"):
            load_config(tmp_path / f"{name}.yaml")


LONG = "x" * 50_000
NESTED: Any = []
for _ in range(5_000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    "tree",
    [
        {"seed": LONG},
        {"model": {"name": LONG}},
        {"name": LONG},
        {"paper": {LONG: 1}},
        {"method": {"p_adv": LONG}},
        {"method": {"name": "vanilla", "eps_255": LONG}},
        {"method": {"name": LONG}},
        {"method": LONG},
        {"budget": {"milestones": list(range(100, 0, -1))}},
        {"budget": {"milestones": [1] * 100_000}},
        {"budget": {"milestones": list(range(1, 105)) * 1000}},
        {"data": {"train": "~" + LONG}},
        {"data": {"mean": [LONG, LONG, LONG]}},
        {LONG: 1},
        {"model": {LONG: 1}},
        {f"key{i}": i for i in range(10_000)},
        {"seed": NESTED},
        {"method": {"name": NESTED}},
        {"seed": 10**5000},
        {"optim": {"lr": 10**400}},
        [LONG],
        LONG,
    ],
    ids=range(22),
)
def test_no_value_fills_the_screen(tree: Any) -> None:
    """Trees as an untrusted checkpoint may hold them."""
    with pytest.raises(ValueError) as error:
        make_config(tree)
    lines = str(error.value).splitlines()
    assert 1 <= len(lines) <= 11
    assert max(map(len, lines)) < 500
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [f"seed={LONG}", f"{LONG}=1", LONG, f"model.{LONG}=1", f"{LONG}.x=1", "x." * 25_000 + "x=1"],
)
def test_no_override_fills_the_screen(override: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config(None, [override])
    assert len(str(error.value)) < 500


def test_many_errors_are_counted() -> None:
    with pytest.raises(ValueError) as error:
        make_config({f"key{i}": i for i in range(1_000)})
    assert str(error.value).splitlines()[-1] == "... and 990 more"


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    for tree in ({"a\x1b[2J": 1}, {"model": {"a\nb": 1}}, {"model": {"init": "\x1b" + "x" * 5000}}):
        with pytest.raises(ValueError) as error:
            make_config(tree)
        assert str(error.value).isprintable()


COUNT = st.integers(1, 2**31 - 1)
NUMBER = st.floats(-1e30, 1e30)
POSITIVE = st.floats(0, 1e30, exclude_min=True)
SHARE = st.floats(0, 1)
SEPARATE = {
    "eps_255": POSITIVE,
    "attack_steps": st.integers(1, 9),
    "random_start": st.booleans(),
    "weight_adv": POSITIVE,
}
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
)


@st.composite
def budgets(draw: st.DrawFn) -> dict[str, Any]:
    epochs = draw(st.integers(1, 2000))
    tree: dict[str, Any] = {"epochs": epochs}
    if draw(st.booleans()):
        tree["milestones"] = sorted(
            draw(st.sets(st.integers(1, max(1, epochs - 1)), max_size=8)) - {epochs}
        )
    return tree


CONFIGS_OF_ANY_KIND = st.fixed_dictionaries(
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
            },
        ),
        "optim": st.fixed_dictionaries(
            {}, optional={"lr": POSITIVE, "weight_decay": st.floats(0, 1), "warmup_epochs": SHARE}
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


@given(CONFIGS_OF_ANY_KIND)
def test_any_config_survives_its_file_and_its_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    config = make_config(tree)
    assert config.model.name == tree.get("model", {}).get("name", "resnet50")
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file) == config
    assert make_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_unset_milestones_are_the_papers_scaled() -> None:
    assert Config().budget.milestones == (30, 60, 90, 100)
    for epochs, milestones in (
        (210, (60, 120, 180, 200)),
        (50, (14, 29, 43, 48)),
        (12, (3, 7, 10, 11)),
        (3, (1, 2)),
        (1, ()),
    ):
        assert make_config({"budget": {"epochs": epochs}}).budget.milestones == milestones
    with pytest.raises(
        ValueError, match=r"\[30, 60, 90, 100\] with budget.epochs = 50.*scaled: \[14, 29, 43, 48\]"
    ):
        load_config("configs/imagenet/vanilla.yaml", ["budget.epochs=50"])
    assert (
        load_config(
            "configs/imagenet/vanilla.yaml", ["budget.epochs=50", "budget.milestones=null"]
        ).budget.epochs
        == 50
    )


@given(st.integers(1, 10**6))
def test_scaled_milestones_are_a_schedule(epochs: int) -> None:
    scaled = paper_milestones(epochs)
    assert list(scaled) == sorted(set(scaled))
    assert all(1 <= milestone < epochs for milestone in scaled)
    near = [milestone * epochs / 105 for milestone in (30, 60, 90, 100)]
    assert all(min(abs(milestone - n) for n in near) <= 0.5 for milestone in scaled)
    if epochs >= 12:
        assert len(scaled) == 4


def test_an_unset_field_means_the_paper() -> None:
    method = Config().method
    assert (method.name, method.schedule, method.combine, method.shuffle) == (
        "fast_advprop",
        "fused",
        "sum",
        "ranks",
    )
    assert (
        method.eps_255,
        method.step_size_255,
        method.weight_noise,
        method.weight_adv,
        method.sync,
    ) == (1, 1, 0.5, 0.5, True)
    assert (method.group_rows, method.adv_group_rows) == (64, 16)
    assert make_config({"method": {"name": "advprop"}}).method.step_size_255 == 1
    assert make_config({"method": {"name": "advprop", "attack_steps": 1}}).method.step_size_255 == 4


def test_a_field_that_was_renamed_names_the_new_one() -> None:
    for old, new in RENAMED.items():
        with pytest.raises(ValueError, match=f"{old}: is now called {new}$"):
            load_config(None, [f"{old}=1"])
        section, _, field = new.partition(".")
        assert field in SECTIONS[section].model_fields


def test_a_config_of_an_earlier_version_is_read_by_the_new_names() -> None:
    earlier = {"name": "run", "method": {"name": "vanilla", "group": 32}}
    found = make_config(with_current_names(earlier))
    assert found.method.group_rows == 32
    assert earlier["method"] == {"name": "vanilla", "group": 32}  # a copy was changed
    now = found.model_dump(mode="json")
    assert with_current_names(now) == now
    for odd in (None, 3, [], {"method": None}, {"method": 3}):
        assert with_current_names(odd) == odd
