"""What a config refuses, and how it says so: field, value, remedy, and never a full screen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fap.config import load_config, make_config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lr=fast", "optim.lr = 'fast'"),
        ("optim.lr=.inf", "optim.lr"),
        ("optim.momentum=1", "optim.momentum = 1"),
        # Methods, and what belongs together.
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
        (
            "optim.class_weights=equal",
            "optim.class_weights = 'equal': must be 'balanced', or a list",
        ),
        (
            "optim.class_weights=[1]",
            "optim.class_weights = [1]: must be 'balanced', or a list of 2",
        ),
        ("optim.class_weights=[1, 0]", "optim.class_weights = [1, 0]: must be 'balanced'"),
        ("optim.class_weights=[1, true]", "optim.class_weights = [1, True]: must be"),
        ("optim.class_weights=3", "optim.class_weights = 3: must be"),
        ("data.repeats=0", "data.repeats = 0"),
        ("data.repeats=321", "data.repeats = 321 must be at most the 320 rows that a step loads"),
        ("data.sampling=random", "data.sampling = 'random': must be 'shuffle' or 'balanced'"),
        ("data.scale=[1,0.1]", "data.scale"),
        ("data.color_jitter=0.4", "data.color_jitter = 0.4: must be [brightness, contrast, satur"),
        ("data.color_jitter=[1, 2]", "data.color_jitter = [1, 2]: must be [brightness, contrast,"),
        ("data.sizes=64", "data.sizes = 64: must be pairs [epoch, pixels] such as [[0, 128], [6,"),
        ("data.sizes=[1, 2]", "data.sizes = [1, 2]: must be pairs [epoch, pixels] such as"),
        ("data.sizes=[[0, 1, 2]]", "data.sizes = [[0, 1, 2]]: must be pairs [epoch, pixels]"),
        ("optim.freeze=conv1", "optim.freeze = 'conv1': must be a list of names such as [conv1,"),
        # Sizes.
        ("data.size=0", "data.size = 0: must be the side of a square in pixels such as 224"),
        ("data.size='224'", "data.size = '224': must be the side"),
        ("data.size=true", "data.size = True: must be the side"),
        ("data.size=224.5", "data.size = 224.5"),
        ("data.size=null", "data.size = None"),
        ("data.size=[224]", "or [height, width] such as [800, 1344]"),
        ("data.size=[2, 3, 4]", "data.size = [2, 3, 4]: must be"),
        ("data.size=[true, 3]", "data.size = [True, 3]: must be"),
        ("data.size=[3, -3]", "whole numbers from 1 to 2147483647"),
        (
            "data.size=[200, 100]",
            "data.size = [200, 100] with data.crop = 'random_resized': must be one number",
        ),
        ("data.jitter=[0, 1]", "data.jitter.0 = 0: must be greater than 0"),
        ("data.jitter=[2, 1]", "data.jitter = (2.0, 1.0) must be (low, high) with low <= high"),
        (
            "data.jitter=[0.5, 1]",
            "data.jitter = [0.5, 1.0] with data.crop = 'random_resized': only 'letterbox' has it",
        ),
        ("data.most_boxes=0", "data.most_boxes = 0"),
        ("data.filter=lanczos", "data.filter = 'lanczos': must be 'area', 'bilinear' or 'bicubic'"),
        # Augmentation.
        (
            "data.augment=fastaugment",
            "data.augment = 'fastaugment': must be 'randaugment', 'trivialaugment', 'augmix' or",
        ),
        (
            "data.augment_ops=2",
            "data.augment_ops = 2 with data.augment = None: only 'randaugment' has it",
        ),
        (
            "data.augment_magnitude=9",
            "data.augment_magnitude = 9 with data.augment = None: only 'randaugment' and 'augmix'",
        ),
        (
            "data.color_jitter=[0, 0, 0, 0]",
            "data.color_jitter = [0.0, 0.0, 0.0, 0.0]: the hue must",
        ),
        ("data.color_jitter=[0.1, 0, 0, 0.6]", "the hue must be at most 0.5"),
        ("data.color_jitter=[0.1, 0, 0]", "data.color_jitter"),
        ("data.color_jitter=[-0.1, 0, 0, 0]", "data.color_jitter.0 = -0.1"),
        ("data.erase=1.1", "data.erase = 1.1"),
        ("data.augment_on=adv", "data.augment_on = 'adv': there is nothing to do to an image"),
        (
            "data.crop=letterbox",
            "data.crop = 'letterbox' with task = 'classification': it is for detection",
        ),
        (
            "task=detection",
            "data.crop = 'random_resized' with task = 'detection': must be 'letterbox'",
        ),
        # What is no key, and what is no value.
        ("model=3", "model = '3': model is a section; set its fields: name, num_classes, init"),
        ("model={name: resnet18}", "model is a section"),
        ("model.name.x=3", "SECTION.FIELD=value"),
        ("name.x=3", "name = {'x': 3}: must be text"),
        ("seed", "key=value"),
        ("=3", "key=value"),
        ("seed=[", "not a YAML value"),
        ("seed=", "seed = '': no value; null means unset"),
        # Numbers, which YAML reads in many ways.
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
        # Words.
        ("run.compile=yes", "run.compile = 'yes': must be true or false"),
        ("run.compile=on", "run.compile = 'on'"),
        ("run.compile=True", "run.compile = 'True'"),
        ("run.compile=1", "run.compile = 1"),
        ("run.compile='true'", "run.compile = 'true'"),
        ("run.graph=true", "run.graph = True: must be 'auto', 'on' or 'off'"),
        (
            "paper.top=1",
            "paper.top = 'top': must be 'top1', 'imagenet_c', 'imagenet_r', 'stylized', 'map' or",
        ),
        ("paper.top1=101", "paper.top1 = 101"),
        ("paper={top1: x}", "paper.top1 = 'x': must be a number"),
        # Text.
        ("data.train=", "data.train = '': must be a path, not empty"),
        ("data.train=a\0b", "without NUL"),
        (
            "data.train=~nobody-of-this-name/x",
            "no home folder is known for it; give the full path, or ./~nobody-of-this-name/x",
        ),
        ("data.train=bad\udce9", "data.train = 'bad\\udce9': must be text that UTF-8 can express"),
        ("model.name=", "model.name = ''"),
        ("model.num_classes=0", "model.num_classes = 0"),
        # Milestones.
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
        # Sizes of training.
        ("data.sizes=[[1, 128]]", "data.sizes = [[1, 128]]: must be pairs [epoch, pixels] whose"),
        ("data.sizes=[[0, 128], [5, 160], [5, 192]]", "begin with 0 and ascend"),
        ("data.sizes=[[0, 0]]", "data.sizes.0.1 = 0"),
        ("data.sizes=[]", "data.sizes = []"),
        ("data.sizes=[0, 128]", "data.sizes = [0, 128]: must be pairs"),
        ("data.sizes=[[0, 128], [105, 160]]", "epoch 105 must be below budget.epochs = 105"),
        # The schedule of the rate.
        ("budget.lr_schedule=steps", "must be 'milestones', 'cosine', 'linear' or 'constant'"),
        (
            "budget.final_lr=0.1",
            "budget.final_lr = 0.1 has no meaning for budget.lr_schedule = 'milestones'; "
            "leave it out, or write null",
        ),
        ("budget.warmup_epochs=-1", "budget.warmup_epochs = -1"),
    ],
)
def test_users_mistakes_name_field_value_and_remedy(override: str, says: str) -> None:
    with pytest.raises(ValueError) as raised:
        load_config(None, [override])
    assert says in str(raised.value)


def test_a_canvas_has_one_size() -> None:
    letterbox = ["task=detection", "data.crop=letterbox", "data.size=[80, 128]"]
    with pytest.raises(ValueError, match=r"^data\.sizes with data\.crop = 'letterbox': .* null"):
        load_config(None, [*letterbox, "data.sizes=[[0, 64]]"])


@pytest.mark.parametrize(
    ("schedule", "override"),
    [
        ("cosine", "budget.milestones=[30]"),
        ("linear", "budget.gamma=0.1"),
        ("constant", "budget.milestones=[]"),
        ("constant", "budget.final_lr=0"),
    ],
)
def test_a_field_of_another_schedule_of_the_rate_is_refused(schedule: str, override: str) -> None:
    field, _, _ = override.partition("=")
    with pytest.raises(ValueError, match=f"^{field} = .* no meaning for .* = '{schedule}'; leave"):
        load_config(None, [f"budget.lr_schedule={schedule}", override])
    load_config(None, [f"budget.lr_schedule={schedule}", f"{field}=null"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["method.combine=mean", "method.sync=true"], "Algorithm 1"),
        (["method.name=vanilla", "method.eps_255=1"], "no meaning"),
        (["method.name=advprop", "method.p_adv=1/5"], "no meaning"),
        (["method.name=decoupled", "method.schedule=fused"], "no meaning"),
        (["method.name=advprop", "data.mix=mixup"], "unmixed clean rows; write data.mix_on=both"),
        (["method.name=advprop", "data.mix=mixup", "data.mix_on=adv"], "mix_on = 'adv': its adv"),
        (
            ["method.name=vanilla", "data.mix=mixup", "data.mix_on=both"],
            "data.mix_on = 'both' with method.name = 'vanilla': it attacks nothing",
        ),
        (
            ["task=detection", "data.crop=letterbox", "data.size=64", "data.sampling=balanced"],
            "data.sampling = 'balanced' with task = 'detection': an image has boxes of several",
        ),
        (
            ["optim.class_weights=balanced", "data.sampling=balanced"],
            "optim.class_weights = 'balanced' with data.sampling = 'balanced': either one bal",
        ),
        (["data.mix_on=adv"], "data.mix_on = 'adv' without data.mix: nothing is mixed"),
        (["data.mix_per=row"], "data.mix_per = 'row' without data.mix: nothing is mixed"),
        (["data.cutmix_alpha=0.5"], "data.cutmix_alpha = 0.5 without data.mix: nothing is mixed"),
        (
            ["data.mix=cutmix", "data.cutmix_alpha=0.5"],
            "data.cutmix_alpha = 0.5 with data.mix = 'cutmix': only 'either' has two; write",
        ),
        (
            ["run.compile=true", "run.norm_kernel=triton"],
            "run.norm_kernel = 'triton' with run.compile = true",
        ),
    ],
)
def test_combinations_without_meaning_are_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_config(None, overrides)


# ---------------------------------------------------------------------- files


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
    mistakes = (
        ("pipe", "is a named pipe, not a file"),
        ("folder", "is a folder, not a file"),
        ("zero", "is a character device"),
        ("big", "has more than 65,536 bytes"),
        ("locked", "[Ll]inks"),
    )
    for name, says in mistakes:
        with pytest.raises(ValueError, match=rf"config .*{name}\.yaml.*{says}"):
            load_config(tmp_path / f"{name}.yaml")


# ---------------------------------------------------------------------- not too much is said

MOST_CHARACTERS = 500  # of a line
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
    with pytest.raises(ValueError) as raised:
        make_config(tree)
    lines = str(raised.value).splitlines()
    assert 1 <= len(lines) <= 11
    assert all(len(line) < MOST_CHARACTERS for line in lines)
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize(
    "override",
    [f"seed={LONG}", f"{LONG}=1", LONG, f"model.{LONG}=1", f"{LONG}.x=1", "x." * 25_000 + "x=1"],
)
def test_no_override_fills_the_screen(override: str) -> None:
    with pytest.raises(ValueError) as raised:
        load_config(None, [override])
    assert len(str(raised.value)) < MOST_CHARACTERS


def test_many_errors_are_counted() -> None:
    with pytest.raises(ValueError) as raised:
        make_config({f"key{i}": i for i in range(1_000)})
    assert str(raised.value).splitlines()[-1] == "... and 990 more"


@pytest.mark.parametrize(
    "tree", [{"a\x1b[2J": 1}, {"model": {"a\nb": 1}}, {"model": {"init": "\x1b" + "x" * 5000}}]
)
def test_control_characters_do_not_reach_the_terminal(tree: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as raised:
        make_config(tree)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["data.augment=randaugment", "data.augment_magnitude=31"],
            "data.augment_magnitude = 31 with data.augment = 'randaugment': must be from 0 to 30",
        ),
        (
            ["data.augment=augmix", "data.augment_magnitude=0"],
            "data.augment_magnitude = 0 with data.augment = 'augmix': must be from 1 to 10",
        ),
        (
            ["data.augment=augmix", "data.augment_ops=2"],
            "data.augment_ops = 2 with data.augment = 'augmix': only 'randaugment' has it",
        ),
        (
            ["data.erase=0.1", "data.augment_on=adv", "method.name=vanilla"],
            "data.augment_on = 'adv' with method.name = 'vanilla': it has no adversarial rows",
        ),
        (
            ["data.erase=0.1", "data.augment_on=clean", "method.name=advprop"],
            "data.augment_on = 'clean' with method.name = 'advprop': its adversarial rows are",
        ),
    ],
)
def test_augmentation_that_has_no_meaning(overrides: list[str], says: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config(None, overrides)
    assert says in str(error.value)
