"""What a run's weights settle in its config: the model, and the images as the weights know them.

Only what the user left unset follows them. What was set otherwise stays as it is, and is told.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fap.config import DETECTION, Config, make_config
from fap.nets.retinanet import SPECS
from fap.nets.weights.about import About, Weights
from fap.nets.weights.find import find_weights, named
from fap.nets.weights.names import spelt
from fap.sections.data import usual_resize
from pipelines.back_ends import EVAL_FILTERS
from pipelines.files import shown
from pipelines.sizes import size_in_words

DATA = ("mean", "std", "size", "resize", "eval_filter")  # fields of data that follow weights
CONTINUED = " " * 11  # in a start-up line, below the first


class Start(NamedTuple):
    """What a run starts from."""

    config: Config
    """As the user wrote it, with what the weights settle."""
    weights: Weights | None
    """Those of model.init; None: random ones of the seed."""
    lines: list[str]
    """For the start of the run: what was found, settled and doubted."""


def start_of(config: Config) -> Start:
    """Read the weights that `model.init` names, and let the config follow them.

    What a user set is what is in the sections' `model_fields_set`: of a config of a file and of
    the command line, not of one that was made anew of all fields. Raises ValueError.
    """
    init = config.model.init
    if init is None:
        return Start(config, None, [])
    name = None
    if "name" in config.model.model_fields_set:
        name = config.model.name
    size = None
    if "size" in config.data.model_fields_set:
        size = config.data.size
    weights = find_weights(init, name, size)
    settled = _followed(config, weights.about)
    try:
        config = _with(config, settled)
    except ValueError as error:
        what = ", ".join(f"{field} = {value}" for field, value in settled.items()) or "nothing"
        raise ValueError(f"{error} ({named(init)} gives {what}; what is set stays)") from None
    return Start(config, weights, _lines(config, weights, settled))


def _followed(config: Config, about: About) -> dict[str, Any]:
    """The fields that follow the weights, by their dotted names, with the values they get."""
    found: dict[str, Any] = {}
    data = config.data
    if about.architecture is not None and "name" not in config.model.model_fields_set:
        is_detector = spelt(about.architecture) in SPECS
        # A classifier's weights may be those of a detector's backbone.
        if is_detector == (config.task == DETECTION):
            found["model.name"] = spelt(about.architecture)
    fields: dict[str, Any] = {"mean": about.mean, "std": about.std}
    if data.crop != "letterbox":  # which has a canvas, not a size, and no resize
        fields["size"] = about.size
        size = data.size if "size" in data.model_fields_set else about.size
        fields["resize"] = resize_for(about, size)
        if fields["resize"] is None and size is not None:
            fields["resize"] = usual_resize(size)  # which an unset one was before, of another size
        if about.interpolation in EVAL_FILTERS:
            fields["eval_filter"] = about.interpolation
    for field, value in fields.items():
        if value is not None and field not in data.model_fields_set:
            found[f"data.{field}"] = value
    return {field: value for field, value in found.items() if value != _value(config, field)}


def resize_for(about: About, size: Any) -> int | None:
    """The weights' ratio of `resize` to `size`, for another size."""
    if not isinstance(about.size, int) or not isinstance(size, int) or about.resize is None:
        return None
    return max(size, size * about.resize // about.size)


def _value(config: Config, field: str) -> Any:
    section, _, name = field.partition(".")
    return getattr(getattr(config, section), name)


def _with(config: Config, values: dict[str, Any]) -> Config:
    """A checked copy with other values, that still knows which fields the user set."""
    tree = config.model_dump()
    for field, value in values.items():
        section, _, name = field.partition(".")
        tree[section][name] = value
    checked = make_config(tree)
    model = {n: getattr(checked.model, n) for n in ("name",) if f"model.{n}" in values}
    data = {n: getattr(checked.data, n) for n in DATA if f"data.{n}" in values}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "data": config.data.model_copy(update=data),
        }
    )


# ---------------------------------------------------------------------- in words


def _lines(config: Config, weights: Weights, settled: dict[str, Any]) -> list[str]:
    about = weights.about
    lines = [*weights.notes]
    if settled:
        values = (f"{field} = {_in_words(value)}" for field, value in settled.items())
        lines.append(f"they settle {', '.join(values)}")
    shown_filter = config.data.eval_filter
    if about.interpolation not in (None, shown_filter):
        lines.append(f"evaluated with {shown(about.interpolation)}; here it is {shown_filter}")
    if about.mean is None and not config.data.model_fields_set & {"mean", "std"}:
        lines.append(
            "nobody says which mean and std they were trained with; data.mean = "
            f"{list(config.data.mean)}, data.std = {list(config.data.std)} are the defaults"
        )
    first, *more = [shown(weights.origin), *lines]
    said = [f"weights    {first}", *(f"{CONTINUED}{line}" for line in more)]
    return said + [f"warning: {named(weights.origin)} {doubt}" for doubt in doubts(about, config)]


def doubts(about: About, config: Config) -> list[str]:
    """What weights say otherwise than the config; what they do not say is no doubt."""
    found = []
    data = config.data
    for field in ("mean", "std"):
        stated = getattr(about, field)
        ours = getattr(data, field)
        if stated is not None and tuple(stated) != tuple(ours):
            found.append(
                f"was trained with {field} = {list(stated)}, but data.{field} = {list(ours)}: "
                "it knows its inputs on another scale"
            )
    if data.crop != "letterbox" and about.size is not None:
        if about.size != data.size:
            found.append(
                f"was trained with {size_in_words(about.size)} px, but data.size = "
                f"{size_in_words(data.size)}"
            )
        elif about.resize is not None and about.resize != data.resize:
            found.append(
                f"is evaluated with a shorter side of {about.resize} px, but data.resize = "
                f"{data.resize}"
            )
    name = config.model.name
    if about.architecture is not None and spelt(about.architecture) != spelt(name):
        backbone = config.task == DETECTION and spelt(about.architecture) not in SPECS
        if not backbone:  # that it is another model is no doubt then
            found.append(
                f"holds weights of {shown(about.architecture)}, but model.name = {shown(name)}"
            )
    return found


def _in_words(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
