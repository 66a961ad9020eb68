"""The typed configuration of a run: defaults <- YAML file <- `key=value` on the command line.

Every field is used; an unknown key, a wrong type or a combination without meaning is a `ValueError`
that names the field, the value and what is allowed. A saved config is complete, so
`diff a.yaml b.yaml` is the ablation. `fap.sections` has the fields.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic.functional_validators import AfterValidator, model_validator

from fap import strict_yaml
from fap.config_errors import describe
from fap.fields import (
    BALANCED,
    NAME_RULE,
    SAFE_NAME,
    UNSET,
    Percent,
    SafeName,
    Section,
    Seed,
    key_of,
    sections_of,
)
from fap.methods import DEFAULT_METHOD, METHODS
from fap.overrides import override
from fap.sections import BudgetConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from fap.tasks import TASKS
from pipelines.files import read_regular, readable, shown

MOST_BYTES = 1 << 16  # of a YAML file; a complete config has 2,000
MOST_LINES = 10  # of one error

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
        if data.sampling == BALANCED and self.optim.class_weights == BALANCED:
            raise ValueError(
                "optim.class_weights = 'balanced' with data.sampling = 'balanced': either one "
                "balances the classes, both do it twice; leave one out"
            )
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


SECTIONS = sections_of(Config)


# ---------------------------------------------------------------------- making one


def load_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Config of a YAML file (or the defaults) with dotted `key=value` overrides.

    A field that holds text takes the override as it stands, `#`, quotes and digits included
    (`null` unsets one that may be unset); any other field takes it as a YAML value.
    Raises ValueError.
    """
    return make_config(config_tree(file, overrides))


def config_tree(file: str | Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `load_config` makes a config of: nested, and with what was given alone."""
    tree: dict[str, Any] = {}
    if file is not None:
        tree = _read(file)
    method_of_file = _method_of(tree)
    for item in overrides:
        override(tree, item, Config)
    if file is not None and tree.get("name") is None and _method_of(tree) == method_of_file:
        tree["name"] = _stem(file)
    return tree


def make_config(tree: dict[str, Any]) -> Config:
    """Validate a nested dictionary; pydantic's findings become one ValueError, a line per field."""
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        errors = e.errors(include_url=False)
        lines = [describe(error, Config) for error in errors[:MOST_LINES]]
        if len(errors) > MOST_LINES:
            lines.append(f"... and {len(errors) - MOST_LINES:,} more")
        raise ValueError("\n".join(lines)) from None


def with_classes(config: Config, n: int) -> Config:
    """A copy of `config` with `model.num_classes` = n. ValueError if it cannot be."""
    tree = config.model_dump()
    tree["model"]["num_classes"] = n
    return make_config(tree)


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
