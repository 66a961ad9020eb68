"""YAML in which a word means what it looks like: the language of the configs.

Plain YAML 1.1 reads `010` as 8, `1:30` as 90, `on` as true, `2026-11-27` as a date and `1e-4` as
text, lets the last of two equal keys win, and expands a few lines of aliases to gigabytes. Here an
unquoted word is `null` (or `~`, or nothing), `true`, `false`, a decimal number, or else text; keys
are always text; and what no config needs (aliases, anchors, tags, several documents, deep nesting,
equal keys) is refused before anything is built. PyYAML's parser does the reading.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from pipelines.files import shown

WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
MOST_DIGITS = 100  # characters of a number; more is text
MOST_DEPTH = 8
MOST_OF_A_MESSAGE = 200  # characters


class _NotPlainError(Exception):
    """Found what YAML allows and a config does not need."""

    def __init__(self, event: yaml.Event, problem: str) -> None:
        assert event.start_mark is not None
        super().__init__(f"line {event.start_mark.line + 1}: {problem}")


def load(text: str | bytes, where: str) -> Any:
    """The value that `text` holds, None if it is empty.

    Raises ValueError: `where`, the line and the reason.
    """
    try:
        return _document(yaml.parse(text, Loader=yaml.SafeLoader))
    except _NotPlainError as error:
        said = str(error)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        said = f"not a YAML value: line {line}: {str(error.problem)[:MOST_OF_A_MESSAGE]}"
    except (yaml.YAMLError, ValueError) as error:  # ValueError: for example the escape "\U00110000"
        said = f"not a YAML value: {' '.join(str(error).split())[:MOST_OF_A_MESSAGE]}"
    raise ValueError(f"{where}: {said}")


def dump(tree: dict[str, Any]) -> str:
    """`tree` as text that `load` reads back as it is."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=math.inf)


def plain(word: str) -> Any:
    """What an unquoted word stands for."""
    if word in WORDS:
        return WORDS[word]
    if len(word) > MOST_DIGITS:
        return word
    if WHOLE.fullmatch(word):
        return int(word)
    if DECIMAL.fullmatch(word):
        value = float(word)
        if math.isfinite(value):
            return value
    return word


def _document(events: Iterator[yaml.Event]) -> Any:
    value = None
    documents = 0
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _NotPlainError(event, "a second document begins; only one is allowed")
            value = _value(next(events), events, 1)
    return value


def _value(event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Any:
    """The value that begins with `event`; takes the events up to its end."""
    if isinstance(event, yaml.AliasEvent):
        raise _NotPlainError(event, "an alias (*name) is not allowed; write the value out")
    assert isinstance(event, yaml.NodeEvent)
    if event.anchor is not None:
        raise _NotPlainError(
            event, "an anchor (&name) is not allowed; quote text that begins with &"
        )
    if getattr(event, "tag", None) is not None:
        raise _NotPlainError(event, "a tag (!name) is not allowed; quote text that begins with !")
    if depth > MOST_DEPTH:
        raise _NotPlainError(event, f"nested more than {MOST_DEPTH} deep")

    if isinstance(event, yaml.ScalarEvent):
        quoted = not event.implicit[0]
        return event.value if quoted else plain(event.value)
    if isinstance(event, yaml.SequenceStartEvent):
        return _list(events, depth)
    return _mapping(events, depth)


def _list(events: Iterator[yaml.Event], depth: int) -> list[Any]:
    values = []
    for event in events:
        if isinstance(event, yaml.SequenceEndEvent):
            break
        values.append(_value(event, events, depth + 1))
    return values


def _mapping(events: Iterator[yaml.Event], depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for event in events:
        if isinstance(event, yaml.MappingEndEvent):
            break
        # The checks of any value hold for a key too, but whatever a key looks like, it is text.
        checked = _value(event, events, depth + 1)
        if isinstance(checked, list | dict):
            raise _NotPlainError(event, "a key must be a word, not a list or a mapping")
        assert isinstance(event, yaml.ScalarEvent)
        key = event.value
        if key in values:
            raise _NotPlainError(event, f"the key {shown(key)} is there a second time")
        values[key] = _value(next(events), events, depth + 1)
    return values


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = None
    if not isinstance(plain(value), str):
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
