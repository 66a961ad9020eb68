"""The typed configuration of a run: defaults <- YAML file <- `key=value` on the command line.

Every field is used; an unknown key, a wrong type or a combination without meaning is a `ValueError` that
names the field, the value and what is allowed. A saved config is complete, so `diff a.yaml b.yaml` is the
ablation. The semantics of each field are those of the paper and of its authors' code.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, ValidationInfo
from pydantic.functional_validators import BeforeValidator, field_validator, model_validator


def _fraction(value: Any) -> Fraction:
    text = str(value)
    with suppress(ValueError, ZeroDivisionError):
        if len(text) <= 32 and ("/" in text or 0 < float(text) < 1):
            ratio = Fraction(text).limit_denominator(1000)
            if 0 < ratio < 1:
                return ratio
    raise ValueError("must be a fraction in (0, 1) such as 1/5 or 0.2; method.name = vanilla is p_adv = 0")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads a bare `on` or `off` as a truth value, and pydantic a truth value as a number."""
        kind = str(cls.model_fields[info.field_name or ""].annotation)
        if not isinstance(value, bool) or "bool" in kind:
            return value
        if "'off'" not in kind:
            raise ValueError("must not be a truth value")
        return "on" if value else "off"


class ModelConfig(Section):
    name: str = "resnet50"
    """Any torchvision or timm name (`timm/NAME` forces timm), `cifar_resnet18` or `cifar_resnetD` with D = 6n + 2."""
    num_classes: PositiveInt = 1000
    init: str | None = None
    """Plain weights (.safetensors) to start from; the auxiliary batch norms begin as copies of the main ones."""


# What an unset field of `method` means, per method. A field that is absent here is meaningless for that
# method, and setting it is an error.
_ATTACK = {"eps_255": 1.0, "step_255": 1.0, "attack_steps": 1, "random_start": True}
_REUSE = _ATTACK | {"p_adv": Fraction(1, 5), "schedule": "fused", "sync": True, "combine": "sum", "shuffle": "ranks"}
_REUSE |= {"weight_clean": 1.0, "weight_noise": 0.5, "weight_adv": 0.5}
# Read from section 3.2.2: Fast AdvProp must "switch the attack mode from targeted attack to untargeted", so the others
# are targeted; and attackers "by default attack models using their testing mode", with the running statistics.
_SEPARATE = _ATTACK | {"targeted": True, "attack_bn": "running"}
_SEPARATE |= {"weight_clean": 1.0, "weight_adv": 1.0, "sync": False, "shuffle": "off"}
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "fast_advprop": _REUSE,
    "noise": _REUSE,
    "decoupled": _SEPARATE | {"p_adv": Fraction(1, 5)},
    # AdvProp paper (Xie et al., 2020): eps 4, step 1, 5 steps; eps is assumed, Fast AdvProp states none.
    "advprop": _SEPARATE | {"eps_255": 4.0, "attack_steps": 5},
}


class MethodConfig(Section):
    name: Literal["vanilla", "fast_advprop", "noise", "decoupled", "advprop"] = "fast_advprop"
    """`noise` is the control: Fast AdvProp's passes with a random sign in place of the gradient's."""
    group: PositiveInt = 64
    """Rows of one main batch-norm group (section 4.1: 64 per GPU); an auxiliary one has group * p / (1 - p)."""
    p_adv: Annotated[Fraction, BeforeValidator(_fraction)] | None = None
    """n_adv / (n_clean + n_adv); `1/9`, `1/5`, `1/3`, `1/2` are the rows of Table 4."""
    schedule: Literal["sequential", "fused", "pipelined", "parallel"] | None = None
    """`parallel` is `sequential` with the clean pass on a second stream of the GPU: for few clean rows."""
    eps_255: PositiveFloat | None = None
    """Radius of the ball in grey levels of 0..255, whatever the normalisation."""
    step_255: PositiveFloat | None = None
    """Step in grey levels; at least eps / attack_steps is used, as in the authors' code."""
    attack_steps: PositiveInt | None = None
    random_start: bool | None = None
    """Start at U(-eps, eps); without it one step is FGSM (appendix A.1)."""
    targeted: bool | None = None
    """Of a separate attack (advprop, decoupled): towards a random wrong label instead of away from the true one."""
    attack_bn: Literal["batch", "running"] | None = None
    """Statistics of the auxiliary batch norms during a separate attack; it moves the running ones in neither mode."""
    weight_clean: PositiveFloat | None = None
    weight_noise: PositiveFloat | None = None
    weight_adv: PositiveFloat | None = None
    sync: bool | None = None
    """Update-speed synchronisation 1 : 1 : 1 of shared, main-BN and auxiliary-BN parameters (section 3.2.2)."""
    combine: Literal["sum", "mean"] | None = None
    """`sum`: weighted sum over all examples / sum of weights (authors' code); `mean`: Algorithm 1 to the letter."""
    shuffle: Literal["ranks", "groups", "off"] | None = None
    """Shuffling BN: permute adversarial rows over all ranks' groups, over one device's groups, or not at all."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        name = str(given.get("name", "fast_advprop")) if isinstance(given, dict) else ""
        if (defaults := METHOD_DEFAULTS.get(name)) is None:
            return given
        given = {k: v for k, v in given.items() if v is not None}
        for field in sorted(given.keys() & cls.model_fields.keys() - {"name", "group", *defaults}):
            raise ValueError(f"method.{field} = {given[field]!r} has no meaning for method.name = {name!r}; leave it out")
        return defaults | ({"sync": False} if given.get("combine") == "mean" else {}) | given

    @model_validator(mode="after")
    def _check(self) -> MethodConfig:
        if self.p_adv is not None:
            rows = self.group * self.p_adv / (1 - self.p_adv)
            if rows.denominator != 1 or rows < 2:
                n = max(3, round(rows))
                near = ", ".join(str(Fraction(k, self.group + k)) for k in (n - 1, n, n + 1))
                gives = f"gives {float(rows):.3f} adversarial rows per {self.group} clean ones"
                raise ValueError(f"method.p_adv = {self.p_adv} {gives}; it must give a whole number >= 2, for example {near}")
        if self.reuses_gradient and self.attack_steps != 1:
            raise ValueError(f"method.attack_steps = {self.attack_steps}: {self.name} recycles one gradient, so only 1")
        if self.combine == "mean" and self.sync:
            raise ValueError("method.sync = true with method.combine = 'mean': Algorithm 1 divides nothing; sync must be false")
        return self

    @property
    def reuses_gradient(self) -> bool:
        return self.name in ("fast_advprop", "noise")

    @property
    def adv_group(self) -> int:
        """Rows of one auxiliary batch-norm group, before `pipelined` joins noise and carry in one."""
        share = Fraction(1, 2) if self.name == "advprop" else self.p_adv or Fraction(0)
        return int(self.group * share / (1 - share))

    @property
    def step_size_255(self) -> float:
        assert self.eps_255 and self.step_255 and self.attack_steps
        return max(self.step_255, self.eps_255 / self.attack_steps)


class DataConfig(Section):
    train: str | None = None
    """A `.beton` file, or an image folder in ImageNet's layout (pipelines `dali` and `reference`)."""
    val: str | None = None
    pipeline: Literal["ffcv", "dali", "reference"] = "ffcv"
    size: PositiveInt = 224
    resize: PositiveInt = 256
    """Evaluation: shorter side before the centre crop of `size` pixels."""
    crop: Literal["random_resized", "pad"] = "random_resized"
    scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    pad: NonNegativeInt = 4
    """Pixels of zero padding with `crop: pad` (CIFAR)."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    mix: Literal["mixup", "cutmix"] | None = None
    """On the clean partition only (Table 6)."""
    mix_alpha: PositiveFloat = 1.0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)
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
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """On every parameter, batch norms included (authors' code)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0


class BudgetConfig(Section):
    epochs: PositiveInt = 105
    """Epochs of vanilla training; other methods run epochs / cost (section 4.1)."""
    milestones: tuple[PositiveInt, ...] = (30, 60, 90, 100)
    """Epochs of vanilla training after which the learning rate is multiplied by gamma."""
    gamma: PositiveFloat = 0.1
    same_budget: bool = True
    """False: as many epochs as vanilla, at (K + 2) or (1 + p_adv K) times its cost."""


class RunConfig(Section):
    dir: str = "runs"
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
    """CPU threads of the training process; unset: torch's default."""
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
    name: str = "fast_advprop"
    seed: NonNegativeInt = 0
    resume: Literal["never", "auto"] = "never"
    paper: dict[str, float] = {}
    """The paper's numbers for this run (percent), shown beside ours by the evaluation."""
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig.model_validate({})
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    budget: BudgetConfig = BudgetConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        rows, group = self.optim.clean_batch, self.method.group
        if rows % group:
            raise ValueError(f"optim.clean_batch = {rows} must be a multiple of method.group = {group}")
        if self.data.mix and self.method.name == "advprop":
            raise ValueError("data.mix with method.name = 'advprop': its adversarial rows are copies of unmixed clean rows")
        for field in ("scale", "ratio"):
            low, high = getattr(self.data, field)
            if low > high or (field == "scale" and high > 1):
                raise ValueError(f"data.{field} = ({low}, {high}) must be (low, high) with low <= high, scale at most 1")
        if self.run.compile and self.run.norm_kernel == "triton":
            raise ValueError(
                "run.norm_kernel = 'triton' with run.compile = true: what is compiled is the "
                "framework's norm; use 'framework' or 'auto'"
            )
        if self.data.size > self.data.resize:
            raise ValueError(f"data.resize = {self.data.resize} must be at least data.size = {self.data.size}")
        return self

    @property
    def loader_adv_rows(self) -> int:
        """Adversarial rows of one global batch that the loader delivers (plain AdvProp copies clean rows instead)."""
        return 0 if self.method.name == "advprop" else self.optim.clean_batch // self.method.group * self.method.adv_group

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Config of a YAML file (or the defaults) with dotted `key=value` overrides. Raises ValueError."""
    tree: dict[str, Any] = {}
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise ValueError(f"config {path}: no such file")
        loaded = _yaml(path.read_bytes(), f"config {path}")
        if not isinstance(loaded, dict):
            raise ValueError(f"config {path}: must be a mapping of sections, found {type(loaded).__name__}")
        tree = {"name": path.stem} | loaded
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ValueError(f"{item!r}: expected key=value, for example optim.lr=0.2")
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{key}: {parent!r} is not a section")
        node[leaf] = _yaml(text.encode(), f"{key} = {text!r}")
    return make_config(tree)


def _yaml(text: bytes, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{where}: not a YAML value: {e}") from e


def make_config(tree: dict[str, Any]) -> Config:
    """Validate a nested dictionary; pydantic's findings become one ValueError, a line per field."""
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        raise ValueError("\n".join(_describe(error) for error in e.errors())) from None


def _describe(error: Any) -> str:
    field = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        section: Any = Config.model_fields[parents[0]].annotation if parents else Config
        near = difflib.get_close_matches(str(key), section.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(section.model_fields)}"
        return f"{field}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and message.split(" ")[0].count("."):
        return message
    return f"{field} = {error['input']!r}: {message}" if field else message
