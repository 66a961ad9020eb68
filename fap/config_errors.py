"""What is wrong with a config, in its own words: the field, the value, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from fap.fields import MOST_KEY, Section, sections_of
from fap.renamed import RENAMED
from pipelines.files import readable, shown

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


def describe(error: Any, schema: type[Section]) -> str:
    """One of pydantic's findings as a line: the field, the value, what is allowed."""
    place = [str(part) for part in error["loc"] if part != "[key]"]
    field = ".".join(readable(part, MOST_KEY) for part in place)
    if field in RENAMED:
        return f"{field}: is now called {RENAMED[field]}"
    if error["type"] == "extra_forbidden":
        return f"{field}: unknown key; {_known_keys(place, schema)}"
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


def _known_keys(place: Sequence[str], schema: type[Section]) -> str:
    *parents, key = place
    section = sections_of(schema)[parents[0]] if parents else schema
    near = difflib.get_close_matches(readable(key, MOST_KEY), section.model_fields, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(section.model_fields)}"
