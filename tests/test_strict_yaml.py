"""The configs' YAML: a word means what it looks like, and hostile text is a short error at once."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fap import strict_yaml

WORDS = [  # an unquoted word, and what it stands for
    ("010", "010"),
    ("0o10", "0o10"),
    ("0x10", "0x10"),
    ("0b1", "0b1"),
    ("1_000", "1_000"),
    ("1:30", "1:30"),
    ("2026-11-27", "2026-11-27"),
    ("2026-11-27 10:00:00", "2026-11-27 10:00:00"),
    ("on", "on"),
    ("off", "off"),
    ("yes", "yes"),
    ("NO", "NO"),
    ("y", "y"),
    ("True", "True"),
    ("FALSE", "FALSE"),
    ("None", "None"),
    (".inf", ".inf"),
    ("-.INF", "-.INF"),
    (".nan", ".nan"),
    ("inf", "inf"),
    ("1e999", "1e999"),
    ("01.5", "01.5"),
    ("1.2.3", "1.2.3"),
    (".", "."),
    ("e5", "e5"),
    ("1e", "1e"),
    ("١٢", "١٢"),
    ("9" * 101, "9" * 101),
    ("<<", "<<"),
    ("=", "="),
    ("1/9", "1/9"),
    ("true", True),
    ("false", False),
    ("null", None),
    ("~", None),
    ("0", 0),
    ("-10", -10),
    ("+3", 3),
    ("9" * 40, int("9" * 40)),
    ("1e-4", 1e-4),
    ("1E5", 1e5),
    ("1.0e-4", 1e-4),
    (".5", 0.5),
    ("5.", 5.0),
    ("-0.25", -0.25),
]


@pytest.mark.parametrize(("word", "value"), WORDS, ids=[w[:20] for w, _ in WORDS])
def test_an_unquoted_word_means_what_it_looks_like(word: str, value: Any) -> None:
    means = {word: value, f"[{word}]": [value], f"a: {word} # a comment": {"a": value}}
    for text, found in means.items():
        read = strict_yaml.load(text, "x")
        assert (read, repr(read)) == (found, repr(found))  # since 1 == 1.0 == True
    assert strict_yaml.load(f"'{word}'", "x") == word
    assert strict_yaml.load(f"{word}: 1", "x") == {word: 1}  # a key is always text


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    [word for word, _ in WORDS]
)

BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSED = {
    "a: 1\nb: 2\na: 3": "line 3: the key 'a' is there a second time",
    "a: {b: 1, c: 2, b: 3}": "line 1: the key 'b'",
    "1: a\n'1': b": "line 2: the key '1'",
    "on: a\non: b": "line 2: the key 'on'",
    BOMB: "line 1: an anchor",
    "a: *b": "line 1: an alias",
    "*b : 1": "line 1: an alias",
    "x: &a [*a]": "line 1: an anchor",
    "!!python/object/apply:os.system [echo]": "line 1: a tag",
    "a: !!int 1": "line 1: a tag",
    "!x {}": "line 1: a tag",
    "!!str a: 1": "line 1: a tag",
    "a: 1\n---\nb: 2": "line 2: a second document",
    "? [1]\n: 2": "a key must be a word",
    "[" * 60_000: "nested more than 8 deep",
    "{a: " * 10_000: "nested more than 8 deep",
    "- " * 30_000: "nested more than 8 deep",
    "a: [": "line 1: ",
    "a: b: c": "line 1: mapping values",
    "\t": "cannot start any token",
    "\0": "special characters",
    '"\\U00110000"': "chr()",
    "%YAML " + "9" * 5000 + ".1\n--- 1": "not a YAML value",
    "!" + "x" * 50_000: "line 1: a tag",
    "'" + "x" * 50_000: "line 1: found unexpected end",
    "x" * 50_000 + ": 1\n" + "y" * 50_000: "line 1: ",
}


@pytest.mark.parametrize(("text", "says"), REFUSED.items(), ids=[k[:16] for k in REFUSED])
def test_what_no_config_needs_is_a_short_error(text: str, says: str) -> None:
    for form in (text, text.encode()):
        with pytest.raises(ValueError) as error:
            strict_yaml.load(form, "config x.yaml")
        said = str(error.value)
        assert said.startswith("config x.yaml: ")
        assert says in said
        assert len(said) < 400
        assert "\n" not in said


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def _depth(tree: Any) -> int:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        return 1 + max((_depth(inner) for inner in tree), default=0)
    return 1


@given(st.dictionaries(TEXT, TREES, max_size=4).filter(lambda tree: _depth(tree) < 7))
def test_what_is_dumped_is_read_back_as_it_was(tree: dict[str, Any]) -> None:
    # One object at two places is written out, not as an alias.
    twice = {"first": tree, "again": [tree]}
    assert repr(strict_yaml.load(strict_yaml.dump(twice), "x")) == repr(twice)


@given(st.text(alphabet="0123456789+-._:xeEonfalstrub~ ", max_size=12))
def test_no_other_words_are_numbers_than_those_of_yaml_1_2(word: str) -> None:
    """Python reads a number here as the same one; it has no leading zeros and no separator."""
    value = strict_yaml.plain(word)
    if isinstance(value, bool) or value is None:
        assert word in ("true", "false", "null", "~", "")
    elif isinstance(value, int | float):
        assert value == float(word)
        assert math.isfinite(value)
        digits = word.lstrip("+-")
        assert not (digits[0] == "0" and digits[1:2].isdigit())
        assert "_" not in word
        assert word == word.strip()
    else:
        assert value == word


@given(st.text("[]{}:,-?!&*#'\"|>%@` \nab1~\t", max_size=40) | st.text(max_size=40))
def test_any_text_is_a_value_or_one_short_error(text: str) -> None:
    said = "x: "
    try:
        strict_yaml.load(text, "x")
    except ValueError as error:
        said = str(error)
    assert said.startswith("x: ")
    assert len(said) < 400


def test_other_programs_read_what_is_dumped_too() -> None:
    tree = {
        "a": ["010", "on", "1e5", "1e-4", "2026-11-27", "~", "", " x ", "a: b", "#1"],
        "b": {"c": None, "d": True, "e": 0.5},
    }
    assert yaml.safe_load(strict_yaml.dump(tree)) == tree
