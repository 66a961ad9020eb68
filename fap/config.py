"""The typed configuration of a run: defaults <- YAML file <- `key=value` on the command line.

Every field is used; an unknown key, a wrong type or a combination without meaning is a `ValueError`
that names the field, the value and what is allowed. A saved config is complete, so
`diff a.yaml b.yaml` is the ablation. `fap.sections` has the fields.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, ValidationError
from pydantic.functional_validators import AfterValidator, model_validator

from fap import strict_yaml
from fap.fields import NAME_RULE, SAFE_NAME, UNSET, Percent, SafeName, Section, Seed, key_of
from fap.methods import DEFAULT_METHOD, METHODS
from fap.sections import BudgetConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from fap.sections.budget import exact
from fap.tasks import TASKS
from pipelines.files import read_regular, readable, shown

MOST_BYTES = 1 << 16  # of a YAML file; a complete config has 2,000
MOST_LINES = 10  # of one error
MOST_KEY = 60  # characters of a key in an error

# Fields that were called otherwise once: a user is told the new name, a checkpoint is read by it.
RENAMED = {"method.group": "method.group_rows", "optim.warmup_epochs": "budget.warmup_epochs"}

OF_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")  # how files of weights end
DETECTION = "detection"  # the task whose images keep their aspect ratio

PaperNumber = Literal["top1", "imagenet_c", "imagenet_r", "stylized", "map", "coco_c"]


class Config(Section):
    name: SafeName = UNSET
    """Of the run's folder. Unset: the YAML file's stem, or the method's name where there is no file
    or where the command line gives another method than the file."""
    seed: Seed = 0
    task: Annotated[str, AfterValidator(key_of(TASKS))] = "classification"
    """What is learned: one of `fap.tasks.TASKS`."""
    resume: Literal["never", "auto"] = "never"
    paper: dict[PaperNumber, Percent] = Field(default_factory=dict)
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
        """What no section can see alone."""
        data = self.data
        if self.optim.clean_batch % self.method.group_rows:
            raise ValueError(
                f"optim.clean_batch = {self.optim.clean_batch} must be a multiple of "
                f"method.group_rows = {self.method.group_rows}"
            )
        if data.mix is not None:
            self._check_mix()
        self._check_augment_on()
        rows = self.optim.clean_batch + self.loader_adv_rows
        if data.repeats > rows:
            raise ValueError(
                f"data.repeats = {data.repeats} must be at most the {rows} rows that a step loads"
            )
        for field in ("scale", "ratio", "jitter"):
            low, high = getattr(data, field)
            if low > high or (field == "scale" and high > 1):
                raise ValueError(
                    f"data.{field} = ({low}, {high}) must be (low, high) with low <= high, "
                    "scale at most 1"
                )
        if data.crop == "letterbox":
            self._check_letterbox()
        else:
            self._check_square()
        if self.run.compile and self.run.norm_kernel == "triton":
            raise ValueError(
                "run.norm_kernel = 'triton' with run.compile = true: what is compiled is the "
                "framework's norm; use 'framework' or 'auto'"
            )
        return self

    def _check_augment_on(self) -> None:
        part = self.data.augment_on
        attacked = self.method.entry.attacked
        if part != "both" and attacked == "copies":
            raise ValueError(
                f"data.augment_on = {part!r} with method.name = {self.method.name!r}: its "
                "adversarial rows are copies of the clean ones; must be 'both'"
            )
        if part == "adv" and attacked == "nothing":
            raise ValueError(
                f"data.augment_on = 'adv' with method.name = {self.method.name!r}: it has no "
                "adversarial rows; must be 'both' or 'clean'"
            )

    def _check_mix(self) -> None:
        mix_on = self.data.mix_on
        method = self.method
        if method.entry.attacked == "copies" and mix_on != "both":
            raise ValueError(
                f"data.mix with method.name = {method.name!r} and data.mix_on = {mix_on!r}: "
                "its adversarial rows are copies of unmixed clean rows; "
                "write data.mix_on=both, which mixes before rows are copied"
            )
        if method.entry.attacked == "nothing" and mix_on != "clean":
            raise ValueError(
                f"data.mix_on = {mix_on!r} with method.name = {method.name!r}: "
                "it attacks nothing, so there are clean rows only; leave it out"
            )

    def _check_letterbox(self) -> None:
        if self.task != DETECTION:
            raise ValueError(
                f"data.crop = 'letterbox' with task = {self.task!r}: "
                f"it is for {DETECTION}; must be 'random_resized' or 'pad'"
            )
        if self.data.sampling != "shuffle":
            raise ValueError(
                f"data.sampling = {self.data.sampling!r} with task = {DETECTION!r}: "
                "an image has boxes of several classes; must be 'shuffle'"
            )
        if self.data.mix is not None:
            raise ValueError(
                f"data.mix = {self.data.mix!r} with data.crop = 'letterbox': must be null"
            )
        for field, nothing in (("augment", None), ("erase", 0.0)):
            value = getattr(self.data, field)
            if value != nothing:
                raise ValueError(
                    f"data.{field} = {value!r} with data.crop = 'letterbox': boxes do not follow "
                    f"it; leave it out (data.color_jitter is allowed)"
                )
        if self.data.sizes is not None:
            raise ValueError(
                "data.sizes with data.crop = 'letterbox': a canvas keeps its size; must be null"
            )

    def _check_square(self) -> None:
        data = self.data
        if self.task == DETECTION:
            raise ValueError(
                f"data.crop = {data.crop!r} with task = {DETECTION!r}: must be 'letterbox'"
            )
        height, width = data.sides
        if height != width:
            raise ValueError(
                f"data.size = [{height}, {width}] with data.crop = {data.crop!r}: must be one "
                "number, the side of a square; [height, width] is for 'letterbox'"
            )
        if data.jitter != (1, 1):
            raise ValueError(
                f"data.jitter = {list(data.jitter)} with data.crop = {data.crop!r}: "
                "only 'letterbox' has it; leave it out"
            )
        if data.sizes is not None and data.sizes[-1][0] >= self.budget.epochs:
            raise ValueError(
                f"data.sizes: epoch {data.sizes[-1][0]} must be below "
                f"budget.epochs = {self.budget.epochs}"
            )
        # The weights of `model.init` may bring a smaller size; then the settled config is checked.
        may_change = self.model.init is not None and "size" not in data.model_fields_set
        if height > data.resize and not may_change:
            raise ValueError(f"data.resize = {data.resize} must be at least data.size = {height}")

    @property
    def loader_adv_rows(self) -> int:
        """Adversarial rows of one global batch that the loader delivers.

        Copies of clean rows are made in the step.
        """
        if self.method.entry.attacked != "own rows":
            return 0
        n_groups = self.optim.clean_batch // self.method.group_rows
        return n_groups * self.method.adv_group_rows

    def to_yaml(self) -> str:
        return strict_yaml.dump(self.model_dump(mode="json"))


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


# ---------------------------------------------------------------------- making one


def load_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Config of a YAML file (or the defaults) with dotted `key=value` overrides.

    A field that holds text takes the override as it stands, `#`, quotes and digits included
    (`null` unsets one that may be unset); any other field takes it as a YAML value.
    Raises ValueError.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        tree = _read(file)
    method_of_file = _method_of(tree)
    for item in overrides:
        _override(tree, item)
    if file is not None and tree.get("name") is None and _method_of(tree) == method_of_file:
        tree["name"] = _stem(file)
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
    """A copy of `config` with `model.num_classes` = n. ValueError if it cannot be."""
    tree = config.model_dump()
    tree["model"]["num_classes"] = n
    return make_config(tree)


def with_current_names(tree: Any) -> Any:
    """A copy of a config that an earlier version wrote, with the names that its fields have now.

    A warm-up was in epochs of the run once; it is now in those of vanilla training, as all epochs
    are.
    """
    if not isinstance(tree, dict):
        return tree
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for old, new in RENAMED.items():
        section, _, old_field = old.partition(".")
        new_section, _, new_field = new.partition(".")
        fields = tree.get(section)
        if isinstance(fields, dict) and old_field in fields:
            value = fields.pop(old_field)
            if old == "optim.warmup_epochs":
                value = _of_vanilla_training(value, tree)
            tree.setdefault(new_section, {})[new_field] = value
    return tree


def _of_vanilla_training(epochs: float, tree: dict[str, Any]) -> float:
    """Epochs of the run that a tree describes, in those of vanilla training."""
    if not tree.get("budget", {}).get("same_budget", True):
        return epochs
    method = MethodConfig.model_validate(tree.get("method", {}))
    return float(exact(epochs) * method.cost_per_image)


def _read(file: str | Path) -> dict[str, Any]:
    where = f"config {readable(file, 300)}"
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


def _stem(file: str | Path) -> str:
    """The run's name where only the file says it."""
    stem = Path(file).stem
    if not SAFE_NAME.fullmatch(stem):
        raise ValueError(
            f"config {readable(file, 300)}: {shown(stem)} cannot name a run ({NAME_RULE}); "
            "give name=..."
        )
    return stem


def _method_of(tree: dict[str, Any]) -> str:
    """The method that a tree names, the default where it names none or one that does not exist."""
    method = tree.get("method")
    if isinstance(method, MethodConfig):
        return method.name
    if isinstance(method, dict):
        name = method.get("name")
        if isinstance(name, str) and name in METHODS:
            return name
    return DEFAULT_METHOD


# ---------------------------------------------------------------------- key=value


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
    if key == "model" and text[:1].isalpha():
        for field, value in _model_words(text):
            _override(tree, f"model.{field}={value}")
        return
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"{shown(key)}: {shown(parent)} is not a section")
    node[leaf] = _override_value(key, text)


def _model_words(text: str) -> list[tuple[str, str]]:
    """What `model=...` is short for: fields of the section, and their values.

    `timm:NAME.TAG` and `torchvision:NAME` are a library's published weights and their model, so
    both fields follow; `hf-hub:...` and a file of weights say themselves which model it is. Other
    names are those of models with random weights.
    """
    library, _, rest = text.partition(":")
    architecture, _, _ = rest.partition(".")
    match library:
        case "timm":
            return [("name", f"timm/{architecture}"), ("init", text)]
        case "torchvision" if architecture.endswith("_Weights"):  # which says whose they are
            return [("init", text)]
        case "torchvision":
            return [("name", architecture), ("init", text)]
        case "hf-hub":
            return [("init", text)]
        case _ if text.endswith(OF_WEIGHTS):
            return [("init", text)]
        case _:
            return [("name", text)]


def _override_value(key: str, text: str) -> Any:
    said = f"{readable(key, MOST_KEY)} = {shown(text)}"
    if key in SECTIONS:
        fields = ", ".join(SECTIONS[key].model_fields)
        raise ValueError(f"{said}: {key} is a section; set its fields: {fields}")
    types = _types_of(key)
    if str in types:
        if text == "null" and type(None) in types:
            return None
        return text
    if not text.strip():
        raise ValueError(f"{said}: no value; null means unset")
    if "#" in text:
        raise ValueError(f"{said}: '#' begins no comment here; leave it out")
    return strict_yaml.load(text, said)


def _types_of(key: str) -> set[Any]:
    """The types that a field's value may have: {str, NoneType} for `model.init`; else none."""
    section, _, name = key.rpartition(".")
    if section and section not in SECTIONS:
        return set()
    fields = SECTIONS[section].model_fields if section else Config.model_fields
    if name not in fields:
        return set()
    annotation = fields[name].annotation
    choices = {annotation}
    if get_origin(annotation) in (Union, UnionType):  # the arguments of a list are no choices
        choices |= {*get_args(annotation)}
    # Annotated[str, ...] is a str.
    return {getattr(choice, "__origin__", choice) for choice in choices}


# ---------------------------------------------------------------------- errors

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
    """One of pydantic's findings as a line: the field, the value, what is allowed."""
    place = [str(part) for part in error["loc"] if part != "[key]"]
    field = ".".join(readable(part, MOST_KEY) for part in place)
    if field in RENAMED:
        return f"{field}: is now called {RENAMED[field]}"
    if error["type"] == "extra_forbidden":
        return f"{field}: unknown key; {_known_keys(place)}"
    message = MESSAGES.get(error["type"])
    if message is None:
        message = error["msg"].removeprefix("Value error, ")
        message = message.replace("Input should be", "must be")
    if error["type"] == "value_error" and "." in message.split(" ")[0]:
        return str(message)  # of a check of ours, which names the field itself
    try:
        value = shown(error["input"])
    except (RecursionError, ValueError):  # ValueError: an integer of more than 4,300 digits
        value = "a value too large to show"
    return f"{field or 'the config'} = {value}: {message}"


def _known_keys(place: Sequence[str]) -> str:
    *parents, key = place
    section = SECTIONS[parents[0]] if parents else Config
    near = difflib.get_close_matches(readable(key, MOST_KEY), section.model_fields, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(section.model_fields)}"
