"""`key=value` of a command line, put into the tree of a config before it is validated."""

from __future__ import annotations

from types import UnionType
from typing import Any, Union, get_args, get_origin

from fap import strict_yaml
from fap.fields import MOST_KEY, Section, sections_of
from pipelines.files import readable, shown

OF_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")  # how files of weights end


def override(tree: dict[str, Any], item: str, schema: type[Section]) -> None:
    """Put `FIELD=value` or `SECTION.FIELD=value` into the tree of a config, which is a `schema`.

    A field that holds text takes the value as it stands, any other as YAML. Raises ValueError.
    """
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ValueError(f"{shown(item)}: expected key=value, for example optim.lr=0.2")
    *parents, leaf = key.split(".")
    if len(parents) > 1:
        raise ValueError(
            f"{shown(key)}: expected FIELD=value or SECTION.FIELD=value, for example optim.lr=0.2"
        )
    if key == "model" and (text[:1].isalpha() or text.endswith(OF_WEIGHTS)):
        for field, value in _model_words(text):
            override(tree, f"model.{field}={value}", schema)
        return
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"{shown(key)}: {shown(parent)} is not a section")
    node[leaf] = _value(key, text, schema)


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


def _value(key: str, text: str, schema: type[Section]) -> Any:
    said = f"{readable(key, MOST_KEY)} = {shown(text)}"
    section = sections_of(schema).get(key)
    if section is not None:
        fields = ", ".join(section.model_fields)
        raise ValueError(f"{said}: {key} is a section; set its fields: {fields}")
    types = _types_of(key, schema)
    if str in types:
        if text == "null" and type(None) in types:
            return None
        return text
    if not text.strip():
        raise ValueError(f"{said}: no value; null means unset")
    if "#" in text:
        raise ValueError(f"{said}: '#' begins no comment here; leave it out")
    return strict_yaml.load(text, said)


def _types_of(key: str, schema: type[Section]) -> set[Any]:
    """The types that a field's value may have: {str, NoneType} for `model.init`; else none."""
    place, _, name = key.rpartition(".")
    section = sections_of(schema).get(place) if place else schema
    if section is None or name not in section.model_fields:
        return set()
    annotation = section.model_fields[name].annotation
    choices = {annotation}
    if get_origin(annotation) in (Union, UnionType):  # the arguments of a list are no choices
        choices |= {*get_args(annotation)}
    # Annotated[str, ...] is a str.
    return {getattr(choice, "__origin__", choice) for choice in choices}
