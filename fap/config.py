"""The typed configuration of a run: defaults <- YAML file <- `key=value` on the command line.

Every field is used; an unknown key, a wrong type or a combination without meaning is a `ValueError`
that names the field, the value and what is allowed. A saved config is complete, so `diff a.yaml
b.yaml` is the ablation. The semantics of each field are those of the paper and of its authors'
code.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic.functional_validators import (
    AfterValidator,
    BeforeValidator,
    field_validator,
    model_validator,
)

from fap import strict_yaml
from fap.tasks import TASKS
from pipelines.files import read_regular, shown

MOST_BYTES = 1 << 16  # of a YAML file; a complete config has 2,000
MOST_LINES = 10  # of one error
MOST_COUNT = 2**31 - 1  # fits every integer type on the way
MOST_SEED = 2**32 - 1  # what numpy and torch take
MOST = 1e30  # of a number, far from what float32 cannot hold
UNSET: Any = None  # a default that a validator replaces
DEFAULT_METHOD = "fast_advprop"
PAPER_EPOCHS = 105  # section 4.1, with the milestones
PAPER_MILESTONES = (30, 60, 90, 100)
SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
NAME_RULE = "letters, digits, '.', '_' and '-', at most 100, not starting with '.'"


def _whole(value: Any) -> Any:
    """`1e5` and `256.0` are whole numbers too."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _fraction(value: Any) -> Fraction:
    ratio = Fraction(0)
    if isinstance(value, Fraction):
        ratio = value
    elif isinstance(value, float) and 0 < value < 1:
        ratio = Fraction(value).limit_denominator(1000)
    elif isinstance(value, str) and re.fullmatch(r"[1-9][0-9]{0,8}/[1-9][0-9]{0,8}", value):
        ratio = Fraction(value)
    if not 0 < ratio < 1:
        raise ValueError(
            "must be a fraction in (0, 1) such as 1/5 or 0.2; method.name = vanilla is p_adv = 0"
        )
    return ratio


def _name(value: str) -> str:
    """The name becomes a folder and part of file names, so it must lead nowhere else."""
    if not SAFE_NAME.fullmatch(value):
        raise ValueError(f"must be a plain file name: {NAME_RULE}")
    return value


def _task(value: str) -> str:
    if value not in TASKS:
        raise ValueError(f"must be one of {', '.join(TASKS)}")
    return value


def _path(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("must be a path, not empty and without NUL")
    full = os.path.expanduser(value)
    if full.startswith("~"):
        raise ValueError(
            f"no home folder is known for it; give the full path, or ./{full[:40]} for a file of"
            " that name"
        )
    return full


# Unlike pydantic's types of the same names these are bounded. All are strict: no text becomes a
# number or a truth value.
PositiveInt = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST_COUNT)]
NonNegativeInt = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST_COUNT)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST_SEED)]
Number = Annotated[float, Field(ge=-MOST, le=MOST)]
PositiveFloat = Annotated[float, Field(gt=0, le=MOST)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MOST)]
Percent = Annotated[float, Field(ge=0, le=100)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
FilePath = Annotated[str, Field(max_length=4096), AfterValidator(_path)]
LAX = Field(strict=False)  # a tuple may come as a list; what is in it stays strict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    name: Text = "resnet50"
    """Any torchvision or timm name (`timm/NAME` forces timm), `cifar_resnet18` or `cifar_resnetD`
    with D = 6n + 2.
    """
    num_classes: PositiveInt | None = None
    """Unset: the data's class count."""
    init: FilePath | None = None
    """Plain weights (.safetensors) to start from; the auxiliary batch norms begin as copies of the
    main ones.
    """

    @property
    def classes(self) -> int:
        """`num_classes` of a run whose data is open (`with_classes`), or of a checkpoint. Raises
        ValueError if unset.
        """
        if self.num_classes is None:
            raise ValueError(
                "model.num_classes is not set, and there is no data here to take it from"
            )
        return self.num_classes


# What an unset field of `method` means, per method. A field that is absent here is meaningless for
# that method, and setting it is an error.
_ATTACK = {"eps_255": 1.0, "step_255": 1.0, "attack_steps": 1, "random_start": True}
_REUSE = _ATTACK | {
    "p_adv": Fraction(1, 5),
    "schedule": "fused",
    "sync": True,
    "combine": "sum",
    "shuffle": "ranks",
}
_REUSE |= {"weight_clean": 1.0, "weight_noise": 0.5, "weight_adv": 0.5}
# Read from section 3.2.2: Fast AdvProp must "switch the attack mode from targeted attack to
# untargeted", so the others are targeted; and attackers "by default attack models using their
# testing mode", with the running statistics.
_SEPARATE = _ATTACK | {"targeted": True, "attack_bn": "running"}
_SEPARATE |= {"weight_clean": 1.0, "weight_adv": 1.0, "sync": False, "shuffle": "off"}
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "fast_advprop": _REUSE,
    "noise": _REUSE,
    "decoupled": _SEPARATE | {"p_adv": Fraction(1, 5)},
    # AdvProp paper (Xie et al., 2020): eps 4, step 1, 5 steps; eps is assumed, Fast AdvProp states
    # none.
    "advprop": _SEPARATE | {"eps_255": 4.0, "attack_steps": 5},
}


class MethodConfig(Section):
    name: Literal["vanilla", "fast_advprop", "noise", "decoupled", "advprop"] = "fast_advprop"
    """`noise` is the control: Fast AdvProp's passes with a random sign in place of the gradient's.
    """
    group_rows: PositiveInt = 64
    """Rows of one main batch-norm group (section 4.1: 64 per GPU); an auxiliary one has group * p /
    (1 - p).
    """
    p_adv: Annotated[Fraction, BeforeValidator(_fraction)] | None = None
    """n_adv / (n_clean + n_adv); `1/9`, `1/5`, `1/3`, `1/2` are the rows of Table 4."""
    schedule: Literal["sequential", "fused", "pipelined", "parallel"] | None = None
    """`parallel` is `sequential` with the clean pass on a second stream of the GPU: for few clean
    rows.
    """
    eps_255: PositiveFloat | None = None
    """Radius of the ball in grey levels of 0..255, whatever the normalisation."""
    step_255: PositiveFloat | None = None
    """Step in grey levels; at least eps / attack_steps is used, as in the authors' code."""
    attack_steps: PositiveInt | None = None
    random_start: bool | None = None
    """Start at U(-eps, eps); without it one step is FGSM (appendix A.1)."""
    targeted: bool | None = None
    """Of a separate attack (advprop, decoupled): towards a random wrong label instead of away from
    the true one.
    """
    attack_bn: Literal["batch", "running"] | None = None
    """Statistics of the auxiliary batch norms during a separate attack; it moves the running ones
    in neither mode.
    """
    weight_clean: PositiveFloat | None = None
    weight_noise: PositiveFloat | None = None
    weight_adv: PositiveFloat | None = None
    sync: bool | None = None
    """Update-speed synchronisation 1 : 1 : 1 of shared, main-BN and auxiliary-BN parameters
    (section 3.2.2).
    """
    combine: Literal["sum", "mean"] | None = None
    """`sum`: weighted sum over all examples / sum of weights (authors' code); `mean`: Algorithm 1
    to the letter.
    """
    shuffle: Literal["ranks", "groups", "off"] | None = None
    """Shuffling BN: permute adversarial rows over all ranks' groups, over one device's groups, or
    not at all.
    """

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("name", DEFAULT_METHOD)
        if not isinstance(name, str) or name not in METHOD_DEFAULTS:
            return given
        defaults = METHOD_DEFAULTS[name]
        given = {k: v for k, v in given.items() if v is not None}
        for field in sorted(
            given.keys() & cls.model_fields.keys() - {"name", "group_rows", *defaults}
        ):
            value = shown(given[field])
            raise ValueError(
                f"method.{field} = {value} has no meaning for method.name = {name!r}; leave it out"
            )
        return defaults | ({"sync": False} if given.get("combine") == "mean" else {}) | given

    @model_validator(mode="after")
    def _check(self) -> MethodConfig:
        if self.p_adv is not None:
            rows = self.group_rows * self.p_adv / (1 - self.p_adv)
            if rows.denominator != 1 or rows < 2:
                n = max(3, round(rows))
                near = ", ".join(str(Fraction(k, self.group_rows + k)) for k in (n - 1, n, n + 1))
                gives = f"gives {float(rows):.3f} adversarial rows per {self.group_rows} clean ones"
                raise ValueError(
                    f"method.p_adv = {self.p_adv} {gives}; it must give a whole number >= 2, for"
                    f" example {near}"
                )
        if self.reuses_gradient and self.attack_steps != 1:
            raise ValueError(
                f"method.attack_steps = {self.attack_steps}: {self.name} recycles one gradient, so"
                " only 1"
            )
        if self.combine == "mean" and self.sync:
            raise ValueError(
                "method.sync = true with method.combine = 'mean': Algorithm 1 divides nothing; sync"
                " must be false"
            )
        return self

    @property
    def reuses_gradient(self) -> bool:
        return self.name in ("fast_advprop", "noise")

    @property
    def adv_group_rows(self) -> int:
        """Rows of one auxiliary batch-norm group, before `pipelined` joins noise and carry in one."""
        share = Fraction(1, 2) if self.name == "advprop" else self.p_adv or Fraction(0)
        return int(self.group_rows * share / (1 - share))

    @property
    def step_size_255(self) -> float:
        assert self.eps_255 and self.step_255 and self.attack_steps
        return max(self.step_255, self.eps_255 / self.attack_steps)


class DataConfig(Section):
    train: FilePath | None = None
    """A `.beton` file, or an image folder in ImageNet's layout (pipelines `dali` and `reference`).
    """
    val: FilePath | None = None
    pipeline: Literal["ffcv", "dali", "reference"] = "ffcv"
    size: PositiveInt = 224
    resize: PositiveInt = 256
    """Evaluation: shorter side before the centre crop of `size` pixels."""
    crop: Literal["random_resized", "pad"] = "random_resized"
    scale: Annotated[tuple[PositiveFloat, PositiveFloat], LAX] = (0.08, 1.0)
    ratio: Annotated[tuple[PositiveFloat, PositiveFloat], LAX] = (3 / 4, 4 / 3)
    pad: NonNegativeInt = 4
    """Pixels of zero padding with `crop: pad` (CIFAR)."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    mix: Literal["mixup", "cutmix"] | None = None
    """On the clean partition only (Table 6)."""
    mix_alpha: PositiveFloat = 1.0
    mean: Annotated[tuple[Number, Number, Number], LAX] = (0.5, 0.5, 0.5)
    std: Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], LAX] = (0.5, 0.5, 0.5)
    threads: PositiveInt | None = None
    """Decoding threads of one process; unset: the cores it may use."""
    prefetch: PositiveInt = 3
    """Batches decoded ahead."""
    hw_decoder_load: Annotated[float, Field(ge=0, le=1)] = 0.65
    """DALI on a GPU: share of JPEGs given to the hardware decoder."""


class OptimConfig(Section):
    clean_batch: PositiveInt = 256
    """Clean rows of one step over all ranks."""
    lr: PositiveFloat = 0.1
    """Per 256 clean rows (section 4.1); the run uses lr * clean_batch / 256."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 1e-4
    """On every parameter, batch norms included (authors' code)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs of this run over which the rate rises from 0; fewer than the run has."""


def nearest(value: Fraction) -> int:
    """The nearest whole number, ties down: 87.5 epochs are 87, as in Table 4."""
    return math.ceil(value - Fraction(1, 2))


def paper_milestones(epochs: int) -> tuple[int, ...]:
    """The paper's 30/60/90/100 of 105, scaled to `epochs`; what would meet another one or the end
    is left out.
    """
    milestones: list[int] = []
    last = 0
    for milestone in PAPER_MILESTONES:
        epoch = nearest(Fraction(milestone * epochs, PAPER_EPOCHS))
        if last < epoch < epochs:
            milestones.append(epoch)
            last = epoch
    return tuple(milestones)


class BudgetConfig(Section):
    epochs: PositiveInt = PAPER_EPOCHS
    """Epochs of vanilla training; other methods run epochs / cost (section 4.1)."""
    milestones: Annotated[
        tuple[PositiveInt, ...], Field(strict=False, max_length=100, validate_default=True)
    ] = UNSET
    """Epochs of vanilla training after which the learning rate is multiplied by gamma; [] for a
    constant rate.
    Unset: the paper's 30, 60, 90 and 100 of 105, scaled to `epochs`.
    """
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    same_budget: bool = True
    """False: as many epochs as vanilla, at (K + 2) or (1 + p_adv K) times its cost."""

    @field_validator("milestones", mode="before")
    @classmethod
    def _scale(cls, given: Any, info: ValidationInfo) -> Any:
        if given is not None:
            return given
        epochs = info.data.get(
            "epochs", PAPER_EPOCHS
        )  # absent only if it is wrong, which is an error of its own
        return paper_milestones(epochs)

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        ascending = all(a < b for a, b in pairwise(self.milestones))
        if not ascending or any(milestone >= self.epochs for milestone in self.milestones):
            scaled = list(paper_milestones(self.epochs))
            raise ValueError(
                f"budget.milestones = {shown(list(self.milestones))} with budget.epochs ="
                f" {self.epochs}: must be strictly ascending and below budget.epochs; null means"
                f" the paper's, scaled: {scaled}"
            )
        return self


class RunConfig(Section):
    dir: FilePath = "runs"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """auto: fp16 on a GPU, off on a CPU."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Replay the step as one CUDA graph; auto: on a GPU."""
    norm_kernel: Literal["auto", "triton", "framework"] = "auto"
    """Batch norm in training: our Triton kernel, or the framework's group after group.
    auto: on a GPU triton, and framework, with a warning, if that fails."""
    compile: bool = False
    torch_threads: PositiveInt | None = None
    """CPU threads of the training process; unset: torch's default, or a container's CPU quota if
    that is less.
    """
    max_steps: PositiveInt | None = None
    """Stop after so many steps in all; the schedule is that of the whole run."""
    log_every: PositiveInt = 50
    checkpoint_every: PositiveInt = 1000
    """Steps between checkpoints; one is also written at each epoch's end."""
    keep: PositiveInt = 2
    eval_every: PositiveInt = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    eval_batch: PositiveInt = 256
    max_skipped: PositiveInt = 20
    """Consecutive non-finite steps after which the run stops."""


class Config(Section):
    name: Annotated[str, AfterValidator(_name)] = UNSET
    """Of the run's folder. Unset: the YAML file's stem, or the method's name where there is no file
    or where the command line gives another method than the file.
    """
    seed: Seed = 0
    task: Annotated[str, AfterValidator(_task)] = "classification"
    """What is learned: one of `fap.tasks.TASKS`."""
    resume: Literal["never", "auto"] = "never"
    paper: dict[Literal["top1", "imagenet_c", "imagenet_r", "stylized"], Percent] = {}
    """The paper's numbers for this run (percent), shown beside ours by the evaluation."""
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig.model_validate({})
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    budget: BudgetConfig = BudgetConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("name") is None:
            return given | {"name": _method_of(given)}
        return given

    @model_validator(mode="after")
    def _check(self) -> Config:
        rows, group = self.optim.clean_batch, self.method.group_rows
        if rows % group:
            raise ValueError(
                f"optim.clean_batch = {rows} must be a multiple of method.group_rows = {group}"
            )
        if self.data.mix and self.method.name == "advprop":
            raise ValueError(
                "data.mix with method.name = 'advprop': its adversarial rows are copies of unmixed"
                " clean rows"
            )
        for field in ("scale", "ratio"):
            low, high = getattr(self.data, field)
            if low > high or (field == "scale" and high > 1):
                raise ValueError(
                    f"data.{field} = ({low}, {high}) must be (low, high) with low <= high, scale at"
                    " most 1"
                )
        if self.run.compile and self.run.norm_kernel == "triton":
            raise ValueError(
                "run.norm_kernel = 'triton' with run.compile = true: what is compiled is the "
                "framework's norm; use 'framework' or 'auto'"
            )
        if self.data.size > self.data.resize:
            raise ValueError(
                f"data.resize = {self.data.resize} must be at least data.size = {self.data.size}"
            )
        return self

    @property
    def loader_adv_rows(self) -> int:
        """Adversarial rows of one global batch that the loader delivers (plain AdvProp copies clean
        rows instead).
        """
        return (
            0
            if self.method.name == "advprop"
            else self.optim.clean_batch // self.method.group_rows * self.method.adv_group_rows
        )

    def to_yaml(self) -> str:
        return strict_yaml.dump(self.model_dump(mode="json"))


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def load_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Config of a YAML file (or the defaults) with dotted `key=value` overrides.

    A field that holds text takes the override as it stands, `#`, quotes and digits included (`null`
    unsets one that may be unset); any other field takes it as a YAML value. Raises ValueError.
    """
    if file is None:
        tree: dict[str, Any] = {}
    else:
        tree = _read(file)
    method = _method_of(tree)
    for item in overrides:
        _override(tree, item)
    if file is not None and tree.get("name") is None and _method_of(tree) == method:
        stem = Path(file).stem
        if not SAFE_NAME.fullmatch(stem):
            raise ValueError(
                f"config {_cut(str(file), 300)}: {shown(stem)} cannot name a run ({NAME_RULE});"
                " give name=..."
            )
        tree["name"] = stem
    return make_config(tree)


def make_config(tree: dict[str, Any]) -> Config:
    """Validate a nested dictionary; pydantic's findings become one ValueError, a line per field."""
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        errors = e.errors(include_url=False)
        lines = [_describe(error) for error in errors[:MOST_LINES]]
        if len(errors) > MOST_LINES:
            lines.append(f"... and {len(errors) - MOST_LINES:,} more")
        raise ValueError("\n".join(lines)) from None


def with_classes(config: Config, n: int) -> Config:
    """A copy of `config` whose `model.num_classes` is `n`. Raises ValueError if that is no possible
    number.
    """
    tree = config.model_dump()
    tree["model"]["num_classes"] = n
    return make_config(tree)


def _read(file: str | Path) -> dict[str, Any]:
    where = f"config {_cut(str(file), 300)}"
    try:
        text = read_regular(os.path.expanduser(file), MOST_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{where}: no such file") from None
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"config {error}") from None
    tree = strict_yaml.load(text, where)
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: must be a mapping of sections, found {type(tree).__name__}")
    return tree


def _override(tree: dict[str, Any], item: str) -> None:
    """Put `key=value` into the tree."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ValueError(f"{shown(item)}: expected key=value, for example optim.lr=0.2")
    *parents, leaf = key.split(".")
    if len(parents) > 1:
        raise ValueError(
            f"{shown(key)}: expected FIELD=value or SECTION.FIELD=value, for example optim.lr=0.2"
        )
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"{shown(key)}: {shown(parent)} is not a section")
    node[leaf] = _override_value(key, text)


def _override_value(key: str, text: str) -> Any:
    said = f"{_cut(key)} = {shown(text)}"
    section, _, leaf = key.rpartition(".")
    if key in SECTIONS:
        raise ValueError(
            f"{said}: {key} is a section; set its fields: {', '.join(SECTIONS[key].model_fields)}"
        )
    fields = Config.model_fields
    if section:
        fields = SECTIONS[section].model_fields if section in SECTIONS else {}
    if leaf in fields:
        kinds = [fields[leaf].annotation, *get_args(fields[leaf].annotation)]
        if any(getattr(kind, "__origin__", kind) is str for kind in kinds):
            nullable = type(None) in kinds
            return None if nullable and text == "null" else text
    if not text.strip():
        raise ValueError(f"{said}: no value; null means unset")
    if "#" in text:
        raise ValueError(f"{said}: '#' begins no comment here; leave it out")
    return strict_yaml.load(text, said)


def _method_of(tree: dict[str, Any]) -> str:
    """The method that a tree names, the default where it names none or one that does not exist."""
    method = tree.get("method")
    if isinstance(method, MethodConfig):
        return method.name
    name = method.get("name") if isinstance(method, dict) else None
    if isinstance(name, str) and name in METHOD_DEFAULTS:
        return name
    return DEFAULT_METHOD


# Fields that were called otherwise once: a user is told the new name, a checkpoint is read by it.
RENAMED = {"method.group": "method.group_rows"}


def with_current_names(tree: Any) -> Any:
    """A copy of a config that an earlier version wrote, with the names that its fields have now."""
    if not isinstance(tree, dict):
        return tree
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for old, new in RENAMED.items():
        section, _, field = old.partition(".")
        node = tree.get(section)
        if isinstance(node, dict) and field in node:
            node[new.partition(".")[2]] = node.pop(field)
    return tree


# What pydantic says, in the words of a config.
MESSAGES = {
    "int_type": "must be a whole number such as 10; no quotes, no leading zeros",
    "float_type": "must be a number such as 0.1 or 1e-4; no quotes, no leading zeros",
    "bool_type": "must be true or false",
    "string_type": "must be text; put quotes around what looks like a number or a truth value",
    "string_unicode": "must be text that UTF-8 can express",
    "tuple_type": "must be a list such as [1, 2]",
    "dict_type": "must be a section, key: value",
    "model_type": "must be a section, key: value",
}


def _describe(error: Any) -> str:
    place = [str(part) for part in error["loc"] if part != "[key]"]
    field = ".".join(_cut(part) for part in place)
    if field in RENAMED:
        return f"{field}: is now called {RENAMED[field]}"
    if error["type"] == "extra_forbidden":
        *parents, key = place
        section = SECTIONS[parents[0]] if parents else Config
        near = difflib.get_close_matches(_cut(key), section.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(section.model_fields)}"
        return f"{field}: unknown key; {hint}"
    message = MESSAGES.get(
        error["type"],
        error["msg"].removeprefix("Value error, ").replace("Input should be", "must be"),
    )
    if error["type"] == "value_error" and message.split(" ")[0].count("."):
        return message
    try:
        value = shown(error["input"])
    except (RecursionError, ValueError):  # ValueError: an integer of more than 4,300 digits
        value = "a value too large to show"
    return f"{field or 'the config'} = {value}: {message}"


def _cut(text: str, most: int = 60) -> str:
    """A key or a path for a message: as it is, unless it is very long or has characters that a
    terminal would act on.
    """
    if not text.isprintable():
        text = ascii(text)[1:-1]
    return text if len(text) <= most else f"{text[:most]}..."
