"""The section `optim`: rows of a step, the optimiser, and what its loss is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.functional_validators import AfterValidator, BeforeValidator, model_validator

from fap.fields import (
    UNSET,
    Beta,
    ClassWeights,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
    key_of,
    names_of_parts,
)
from pipelines.files import shown

# What an unset field of `optim` means, by `optim.name`; a field that stands in none of a name's has
# no meaning for it. Rates are per 256 clean rows.
OPTIMISERS: dict[str, dict[str, Any]] = {
    # Section 4.1, and the authors' code.
    "sgd": {"lr": 0.1, "weight_decay": 1e-4, "momentum": 0.9, "nesterov": False},
    # ConvNeXt's and DeiT's recipes use 0.05; DeiT's rate is 5e-4 per 512 images.
    "adamw": {"lr": 5e-4, "weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8},
    # Of ResNet strikes back's recipe A3 (arXiv 2110.00476): 8e-3 for 2,048 images.
    "lamb": {"lr": 1e-3, "weight_decay": 0.02, "betas": (0.9, 0.999), "eps": 1e-6},
}
SOME_OPTIMISERS = {"momentum", "nesterov", "betas", "eps"}
"""The fields that have a meaning for some names only."""


class OptimConfig(Section):
    name: Annotated[str, AfterValidator(key_of(OPTIMISERS))] = "sgd"
    """`sgd` with momentum, `adamw` (arXiv 1711.05101), or `lamb` (arXiv 1904.00962) for large
    batches. What an unset field means follows from it; a field that has no meaning for it is an
    error."""
    clean_batch: PositiveInt = 256
    """Clean rows of one step over all ranks."""
    accumulate: PositiveInt = 1
    """Parts of whole groups into which every pass of a step is divided, so that activations of
    1/accumulate of its rows are in memory at once. The step stays that of `clean_batch`; only a
    model's own random layers draw differently."""
    lr: PositiveFloat = UNSET
    """Per 256 clean rows (section 4.1); the run uses lr * clean_batch / 256, with any optimiser.
    Unset: 0.1 of sgd, 5e-4 of adamw, 1e-3 of lamb."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of sgd; unset: 0.9."""
    nesterov: bool | None = None
    """Of sgd: Nesterov's momentum; unset: false."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] | None = None
    """Of adamw and lamb: decay per step of the averages of the gradient and of its square; unset:
    0.9 and 0.999."""
    eps: PositiveFloat | None = None
    """Of adamw and lamb: what is added to the root of the averaged square. Unset: 1e-8 of adamw,
    1e-6 of lamb."""
    weight_decay: NonNegativeFloat = UNSET
    """On the parameters of `decay_on`. Unset: 1e-4 of sgd (authors' code), 0.05 of adamw, 0.02 of
    lamb."""
    decay_on: Literal["all", "weights"] = "all"
    """`all`: every parameter, norms and biases included (authors' code). `weights`: none with fewer
    than two dimensions, no bias, and none that the model itself names, such as the embedding of
    positions."""
    head_lr_scale: PositiveFloat = 1.0
    """Factor on the rate of the head: the last layer or layers, which know the classes."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on the rate from each layer to the one before it, by timm's division of a model into
    layers; the last one has the full rate. Unset: one rate for all."""
    freeze: Annotated[
        tuple[Text, ...], Field(strict=False, max_length=1000), BeforeValidator(names_of_parts)
    ] = ()
    """Parameters that are not trained, by name: `layer1` is all inside that module, and a pattern
    such as `*.bias` all names that it matches. Auxiliary norms follow their main ones. Frozen norms
    go on to normalise by the batch, so their running statistics still move."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: ClassWeights = None
    """Classification: factors of the rows' losses, one for each class in the order of the labels.
    `balanced`: images / (classes * images of the class), which is 1 on average over the images."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient of all parameters; a longer one is shortened. Unset: any."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential average of weights and running statistics, which is then
    what evaluation and export show, for example 0.9999. After t steps it is at most
    (1 + t) / (10 + t), so that a short run forgets its first weights too. Unset: none."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Replace what is unset by the optimiser's defaults."""
        if not isinstance(given, dict):
            return given
        name = given.get("name", "sgd")
        if not isinstance(name, str) or name not in OPTIMISERS:
            return given
        given = {field: value for field, value in given.items() if value is not None}
        defaults = OPTIMISERS[name]
        for field in sorted(given.keys() & SOME_OPTIMISERS - defaults.keys()):
            raise ValueError(
                f"optim.{field} = {shown(given[field])} has no meaning for "
                f"optim.name = {name!r}; leave it out, or write null"
            )
        return defaults | given

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.nesterov and not self.momentum:
            raise ValueError(
                "optim.nesterov = true with optim.momentum = 0: it is a kind of momentum; "
                "must be false"
            )
        return self
