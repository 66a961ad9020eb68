"""The section `method`: what is trained through which norms, and the attack."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic.functional_validators import AfterValidator, model_validator

from fap.fields import PositiveFloat, PositiveInt, Ratio, Section, key_of
from fap.methods import DEFAULT_METHOD, METHODS, Kind, Method
from pipelines.files import shown


class MethodConfig(Section):
    name: Annotated[str, AfterValidator(key_of(METHODS))] = DEFAULT_METHOD
    """One of `fap.methods.METHODS`. What an unset field means is the method's; a field that has no
    meaning for it is an error."""
    group_rows: PositiveInt = 64
    """Rows of one batch-norm group of clean rows (section 4.1: 64 per GPU); one of adversarial rows
    has group_rows * p_adv / (1 - p_adv)."""
    p_adv: Ratio | None = None
    """n_adv / (n_clean + n_adv); `1/9`, `1/5`, `1/3`, `1/2` are the rows of Table 4."""
    schedule: Literal["sequential", "fused", "pipelined", "parallel"] | None = None
    """`parallel` is `sequential` with the clean pass on a second stream of the GPU: for few clean
    rows."""
    eps_255: PositiveFloat | None = None
    """Radius of the ball in grey levels of 0..255, whatever the normalisation."""
    step_255: PositiveFloat | None = None
    """Step in grey levels; at least eps / attack_steps is used, as in the authors' code."""
    attack_steps: PositiveInt | None = None
    random_start: bool | None = None
    """Start at U(-eps, eps); without it one step is FGSM (appendix A.1)."""
    targeted: bool | None = None
    """Of a separate attack: towards a random wrong target instead of away from the true one."""
    attack_bn: Literal["batch", "running"] | None = None
    """Statistics of the batch norms during a separate attack; it moves the running ones in neither
    mode."""
    attack_loss: Literal["total", "cls", "box", "max"] | None = None
    """What a separate attack follows: the loss that is trained, or for detection one part of it.
    `max` makes an image from each part and keeps the one of larger total loss (Det-AdvProp)."""
    weight_clean: PositiveFloat | None = None
    weight_noise: PositiveFloat | None = None
    weight_adv: PositiveFloat | None = None
    sync: bool | None = None
    """Update-speed synchronisation 1 : 1 : 1 of shared, main-BN and auxiliary-BN parameters
    (section 3.2.2)."""
    combine: Literal["sum", "mean"] | None = None
    """`sum`: weighted sum over all examples / sum of weights (authors' code); `mean`: Algorithm 1
    to the letter."""
    aux: Literal["auto", "norms", "none"] = "auto"
    """Auxiliary norms. `auto`: where the method has any, every norm of the model gets one, and a
    model without norms trains without. `norms`: the same, but such a model is an error. `none`:
    adversarial rows go through the main norms, in groups of their own (an ablation)."""
    shuffle: Literal["ranks", "groups", "off"] | None = None
    """Shuffling BN: permute adversarial rows over all ranks' groups, over one device's groups, or
    not at all."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Replace what is unset by the method's defaults."""
        if not isinstance(given, dict):
            return given
        name = given.get("name", DEFAULT_METHOD)
        if not isinstance(name, str) or name not in METHODS:
            return given
        defaults = dict(METHODS[name].defaults)
        given = {field: value for field, value in given.items() if value is not None}
        meaningful = {"name", "group_rows", "aux", *defaults}
        for field in sorted(given.keys() & cls.model_fields.keys() - meaningful):
            raise ValueError(
                f"method.{field} = {shown(given[field])} has no meaning for "
                f"method.name = {name!r}; leave it out"
            )
        if given.get("combine") == "mean":
            defaults["sync"] = False
        return defaults | given

    @model_validator(mode="after")
    def _check(self) -> MethodConfig:
        if self.p_adv is not None:
            self._check_rows(self.p_adv)
        if self.entry.recycles and self.attack_steps != 1:
            raise ValueError(
                f"method.attack_steps = {self.attack_steps}: {self.name} recycles one gradient, "
                "so only 1"
            )
        if self.entry.direction == "random" and self.attack_steps != 1:
            raise ValueError(
                f"method.attack_steps = {self.attack_steps}: {self.name} takes one random step, "
                "so only 1"
            )
        if self.aux != "auto" and not self.entry.has_aux:
            raise ValueError(
                f"method.aux = {self.aux!r} has no meaning for method.name = {self.name!r}, "
                "which trains nothing through auxiliary norms; leave it out"
            )
        if self.combine == "mean" and self.sync:
            raise ValueError(
                "method.sync = true with method.combine = 'mean': "
                "Algorithm 1 divides nothing; sync must be false"
            )
        return self

    def _check_rows(self, p_adv: Fraction) -> None:
        rows = self.group_rows * self.entry.adv_per_clean(p_adv)
        if rows.denominator == 1 and rows >= 2:
            return
        possible = max(3, round(rows))
        near = [Fraction(n, self.group_rows + n) for n in range(possible - 1, possible + 2)]
        raise ValueError(
            f"method.p_adv = {p_adv} gives {float(rows):.3f} adversarial rows "
            f"per {self.group_rows} clean ones; it must give a whole number >= 2, "
            f"for example {', '.join(map(str, near))}"
        )

    @property
    def entry(self) -> Method:
        return METHODS[self.name]

    @property
    def cost_per_image(self) -> Fraction:
        """Image passes per image of the epoch."""
        return self.entry.cost_per_image(self.p_adv, self.attack_steps, self.attack_loss)

    @property
    def norms(self) -> Mapping[Kind, Literal["main", "aux"]]:
        """The kinds of rows that are trained, each with the norms that it goes through."""
        if self.aux == "none":
            return dict.fromkeys(self.entry.norms, "main")
        return self.entry.norms

    @property
    def has_aux(self) -> bool:
        """Does anything go through auxiliary norms? A model without norms still has none."""
        return "aux" in self.norms.values()

    @property
    def any_norm(self) -> bool:
        """May norms that cannot divide a batch into groups see all of it? Only of clean rows."""
        return self.entry.attacked == "nothing"

    @property
    def adv_group_rows(self) -> int:
        """Rows of one group of adversarial rows; `pipelined` joins two of them in one."""
        return int(self.group_rows * self.entry.adv_per_clean(self.p_adv))

    @property
    def step_size_255(self) -> float:
        assert self.eps_255 and self.step_255 and self.attack_steps
        return max(self.step_255, self.eps_255 / self.attack_steps)
