"""Target: a damaged config, and hostile values in one or on the command line."""

# ruff: noqa: PT017  # an error is judged where it is met; not every input must raise one

from __future__ import annotations

from pathlib import Path

import numpy as np

from fap.config import Config, load_config
from tests.fuzzing.damage import mutate

ROOT = Path(__file__).parents[2]

HOSTILE_YAML = [
    "null", "-1", "0", "1e999", ".nan", ".inf", "''", "[]", "{}", "[1]", "{1: 2}", "9" * 40, "yes",
    "&a [*a]", "!!python/object/apply:os.system [echo]", "? [1]\n: 2", "'\\0'", "*x", "%", "\t",
    "1/0", "!!bool x", "!!int x", "2001-99-99", "0x_", "1e99999999", "1e-400", "1:61",
]  # fmt: skip


def fuzz_config(rng: np.random.Generator, folder: Path) -> str:
    """An error names the file or the field; what is accepted is read back as it was."""
    text = some_config(rng)
    hostile = str(rng.choice(HOSTILE_YAML))
    how = str(rng.choice(["bytes", "value", "override"]))
    fields = all_fields()
    field = str(rng.choice(fields))
    path = folder / "config.yaml"
    overrides = []
    match how:
        case "bytes":
            bad, _ = mutate(rng, text.encode())
            path.write_bytes(bad)
        case "value":
            path.write_text(with_value(rng, text, hostile))
        case "override":
            path.write_text(text)
            overrides = [f"{field}={hostile}"]
    try:
        config = load_config(path, overrides)
    except ValueError as error:
        leaves = [name.rpartition(".")[2] for name in fields]
        known = [str(path), *overrides, *leaves, "unknown key"]
        named = any(word in str(error) for word in known)
        assert named, f"neither file nor field is named: {error!r}"
        return f"{how} {field}: {str(error)[:150]}"
    path.write_text(config.to_yaml())
    assert load_config(path) == config, f"{how} {overrides}: read back differently"
    return f"{how} {overrides}: accepted"


def some_config(rng: np.random.Generator) -> str:
    """One of ours, or all settings at their defaults."""
    shipped = sorted((ROOT / "configs").rglob("*.yaml"))
    if rng.random() < 0.5:
        return shipped[int(rng.integers(len(shipped)))].read_text()
    return Config().to_yaml()


def all_fields() -> list[str]:
    """`optim.lr` and so on, then the names of the sections and what lies beside them."""
    fields = []
    for name, value in Config():
        if hasattr(value, "__pydantic_fields__"):
            fields += [f"{name}.{leaf}" for leaf in type(value).model_fields]
    return fields + list(Config.model_fields)


def with_value(rng: np.random.Generator, text: str, value: str) -> str:
    """The text of a config with this value on one of its lines."""
    lines = text.splitlines()
    usable = [i for i, line in enumerate(lines) if ":" in line and "name:" not in line]
    at = int(rng.choice(usable))
    lines[at] = f"{lines[at].partition(':')[0]}: {value}"
    return "\n".join(lines)
