"""The types of config fields: strict and bounded, with errors in a user's words.

Unlike pydantic's types of the same names they have bounds that fit every place a value gets to, and
no text becomes a number or a truth value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.functional_validators import AfterValidator, BeforeValidator

from pipelines.sizes import Size

UNSET: Any = None  # a default that a validator replaces
MOST_COUNT = 2**31 - 1  # fits every integer type on the way
MOST_SEED = 2**32 - 1  # what numpy and torch take
MOST = 1e30  # of a number, far from what float32 cannot hold
MOST_DENOMINATOR = 1000  # of a fraction that is given as 0.2
BALANCED = "balanced"  # of class weights: as the data asks for
MOST_WEIGHTS = 2000  # of classes in a config, which is a file of limited size
SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
NAME_RULE = "letters, digits, '.', '_' and '-', at most 100, not starting with '.'"
MOST_KEY = 60  # characters of a key in an error
FRACTION = re.compile(r"[1-9][0-9]{0,8}/[1-9][0-9]{0,8}")


class Section(BaseModel):
    """A part of the config. Unknown keys are errors, values are not changed once they are there."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def sections_of(schema: type[Section]) -> dict[str, type[Section]]:
    """The sections that a config has, by name."""
    return {
        name: field.annotation
        for name, field in schema.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def whole(value: Any) -> Any:
    """`1e5` and `256.0` are whole numbers too."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def fraction(value: Any) -> Fraction:
    """1/5, also where it is given as text or as 0.2. ValueError for what is not in (0, 1)."""
    ratio = Fraction(0)
    if isinstance(value, Fraction):
        ratio = value
    elif isinstance(value, float) and 0 < value < 1:
        ratio = Fraction(value).limit_denominator(MOST_DENOMINATOR)
    elif isinstance(value, str) and FRACTION.fullmatch(value):
        ratio = Fraction(value)
    if not 0 < ratio < 1:
        raise ValueError(
            "must be a fraction in (0, 1) such as 1/5 or 0.2; method.name = vanilla is p_adv = 0"
        )
    return ratio


def canvas_size(value: Any) -> Size:
    """A side, or height and width; of a square always the side. ValueError for anything else."""
    sides = [value]
    if isinstance(value, list | tuple) and len(value) == 2:
        sides = [*value]
    sides = [whole(side) for side in sides]
    # `true` is no side, though Python takes it for a 1.
    if not all(type(side) is int and 1 <= side <= MOST_COUNT for side in sides):
        raise ValueError(
            "must be the side of a square in pixels such as 224, "
            f"or [height, width] such as [800, 1344]; whole numbers from 1 to {MOST_COUNT}"
        )
    if len(set(sides)) == 1:
        return sides[0]
    height, width = sides
    return height, width


def class_weights(value: Any) -> Any:
    """A word, a tuple with a number for each class, or None. ValueError for anything else."""
    if value is None or value == BALANCED:
        return value
    weights: Sequence[Any] = ()
    if isinstance(value, list | tuple):
        weights = value
    # `true` is no number, though Python takes it for a 1.
    are_positive = all(type(weight) in (int, float) and 0 < weight <= MOST for weight in weights)
    if 2 <= len(weights) <= MOST_WEIGHTS and are_positive:
        return tuple(float(weight) for weight in weights)
    raise ValueError(
        f"must be {BALANCED!r}, or a list of 2 to {MOST_WEIGHTS:,} positive numbers such as"
        " [1, 2.5], one for each class"
    )


def as_list(value: Any, example: str) -> Any:
    """What is given as a list; anything else is a ValueError that shows one."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be {example}")
    return value


def sides_by_epoch(value: Any) -> Any:
    example = "pairs [epoch, pixels] such as [[0, 128], [6, 160]]"
    for pair in as_list(value, example):
        if len(as_list(pair, example)) != 2:
            raise ValueError(f"must be {example}")
    return value


def color_jitter(value: Any) -> Any:
    example = "[brightness, contrast, saturation, hue] such as [0.4, 0.4, 0.4, 0.1]"
    if len(as_list(value, example)) != 4:
        raise ValueError(f"must be {example}")
    return value


def names_of_parts(value: Any) -> Any:
    return as_list(value, "a list of names such as [conv1, layer1]")


def safe_name(value: str) -> str:
    """The name becomes a folder and part of file names, so it must lead nowhere else."""
    if not SAFE_NAME.fullmatch(value):
        raise ValueError(f"must be a plain file name: {NAME_RULE}")
    return value


def full_path(value: str) -> str:
    """A path with `~` as the home folder, which nothing after the config expands."""
    if not value or "\0" in value:
        raise ValueError("must be a path, not empty and without NUL")
    full = os.path.expanduser(value)
    if full.startswith("~"):
        raise ValueError(
            "no home folder is known for it; "
            f"give the full path, or ./{full[:40]} for a file of that name"
        )
    return full


def key_of(registry: Collection[str], *more: str) -> Callable[[str], str]:
    """A validator for `more` and the names that stand in a registry when a value is checked."""

    def known(value: str) -> str:
        if value not in registry and value not in more:
            *names, last = (repr(name) for name in (*more, *registry))
            listed = f"{', '.join(names)} or {last}" if names else last
            raise ValueError(f"must be {listed}")
        return value

    return known


PositiveInt = Annotated[int, BeforeValidator(whole), Field(ge=1, le=MOST_COUNT)]
NonNegativeInt = Annotated[int, BeforeValidator(whole), Field(ge=0, le=MOST_COUNT)]
Seed = Annotated[int, BeforeValidator(whole), Field(ge=0, le=MOST_SEED)]
Number = Annotated[float, Field(ge=-MOST, le=MOST)]
PositiveFloat = Annotated[float, Field(gt=0, le=MOST)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MOST)]
Share = Annotated[float, Field(ge=0, le=1)]
SmallerPart = Annotated[float, Field(gt=0, lt=0.5)]
Beta = Annotated[float, Field(ge=0, lt=1)]  # of an exponential average: what it keeps each step
Percent = Annotated[float, Field(ge=0, le=100)]
Ratio = Annotated[Fraction, BeforeValidator(fraction)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
SafeName = Annotated[str, AfterValidator(safe_name)]
FilePath = Annotated[str, Field(max_length=4096), AfterValidator(full_path)]
# A tuple may come as a list; what is in it stays strict.
Pair = Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False)]
# [[0, 128], [6, 160]]: from which epoch on which side, in pixels.
Sides = Annotated[
    tuple[Annotated[tuple[NonNegativeInt, PositiveInt], Field(strict=False)], ...],
    Field(strict=False, min_length=1, max_length=100),
    BeforeValidator(sides_by_epoch),
]
CanvasSize = Annotated[int | tuple[int, int], BeforeValidator(canvas_size)]
ClassWeights = Annotated[
    Literal["balanced"] | tuple[float, ...] | None, BeforeValidator(class_weights)
]
Channels = Annotated[tuple[Number, Number, Number], Field(strict=False)]
ColorJitter = Annotated[
    tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat],
    Field(strict=False),
    BeforeValidator(color_jitter),
]
PositiveChannels = Annotated[
    tuple[PositiveFloat, PositiveFloat, PositiveFloat], Field(strict=False)
]
