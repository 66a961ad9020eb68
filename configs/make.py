"""`make configs`: write every config of this folder from table.py.

A file is complete: it holds the fields of the recipe, defaults included, so that
`diff a.yaml b.yaml` is the ablation. Which fields there are, and which a method has, the typed
config says (fap/config.py). Its header says what the run is, what we assume, what it costs, what
the paper reports, and the command. Equal tables give equal bytes.
"""

import sys
from pathlib import Path
from textwrap import wrap
from typing import Any

from configs.table import RECIPES, TABLE, Row
from fap import strict_yaml
from fap.budget import budget, cost_per_image
from fap.config import Config, make_config

FOLDER = Path(__file__).resolve().parent
SECTIONS = ("paper", "model", "method", "data", "optim", "budget")  # `run` belongs to the machine
# Fields that say where and on what machine a run happens, not what it trains.
OF_THE_MACHINE = {
    "model": {"init"},
    "data": {
        "train",
        "val",
        "val_share",
        "pipeline",
        "decode",
        "threads",
        "prefetch",
        "hw_decoder_load",
    },
}
MILLION = 1e6
COLUMNS = 100  # of a header


def main() -> None:
    for row in TABLE:
        path = FOLDER / f"{row.file}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text_of(row), encoding="utf-8")
    print(f"{len(TABLE)} files written in {FOLDER}")
    strangers = unknown_files()
    if strangers:
        sys.exit(f"table.py does not know {', '.join(strangers)}: add a row, or remove the file")


def unknown_files() -> list[str]:
    """The YAML files of this folder that no row of the table makes."""
    known = {f"{row.file}.yaml" for row in TABLE}
    found = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml")}
    return sorted(found - known)


def config_of(row: Row) -> Config:
    """The run of a row: defaults, then the recipe of its folder, then the row's own overrides."""
    folder, _, name = row.file.partition("/")
    tree: dict[str, Any] = {"name": name, "task": RECIPES[folder].task, "paper": row.paper}
    for key, value in (RECIPES[folder].overrides | row.overrides).items():
        section, _, field = key.partition(".")
        tree.setdefault(section, {})[field] = value
    return make_config(tree)


def text_of(row: Row) -> str:
    """The whole file: header, then the sections."""
    config = config_of(row)
    sections = settings(config)
    lines = [f"task: {config.task}"]
    for name, fields in sections.items():
        lines += _section(name, fields)
    body = "\n".join(lines)
    said = {"task": config.task, **sections}
    assert strict_yaml.load(body, row.file) == said, f"{row.file} does not read back as it is"
    header: list[str] = []
    for line in header_of(row):
        header += wrap(line, COLUMNS, initial_indent="# ", subsequent_indent="#   ")
    header.append(f"# Run: {command(row)}")  # not wrapped: it is there to be copied
    return "\n".join([*header, body, ""])


def settings(config: Config) -> dict[str, dict[str, Any]]:
    """What a file says: every section without what belongs to the machine.

    A field of `method` that is unset has no meaning for that method and is left out, and so are the
    fields of `budget` and of `data` that mean something to another schedule or kind of crop.
    """
    tree = config.model_dump(mode="json", include=set(SECTIONS), exclude=OF_THE_MACHINE)
    for name in ("method", "budget"):
        tree[name] = {field: value for field, value in tree[name].items() if value is not None}
    for field in config.data.meaningless:
        tree["data"].pop(field)
    return {name: tree[name] for name in SECTIONS if tree[name]}


def header_of(row: Row) -> list[str]:
    recipe = RECIPES[row.file.partition("/")[0]]
    lines = [f"{row.title} {recipe.setting}".rstrip(), *recipe.notes, *row.notes, _cost(row)]
    if row.paper:
        numbers = ", ".join(f"{name} {number}" for name, number in row.paper.items())
        lines.append(f"Paper: {numbers} ({recipe.paper_words}).")
    return lines


def command(row: Row) -> str:
    """The command line of the run; the files that it names are the user's."""
    more = RECIPES[row.file.partition("/")[0]].more
    said = f"fap-train configs/{row.file}.yaml data.train=train.beton data.val=val.beton {more}"
    return said.rstrip()


def _cost(row: Row) -> str:
    """Image passes of the whole run, and beside those of vanilla training of as many epochs."""
    config = config_of(row)
    images = RECIPES[row.file.partition("/")[0]].images
    run = budget(config, images)
    plain_method = make_config({"method": {"name": "vanilla"}}).method
    vanilla = budget(config.model_copy(update={"method": plain_method}), images)
    per_image = float(cost_per_image(config.method))
    return (
        f"Cost: {per_image:.4g} image passes per image x {run.epochs} epochs"
        f" = {run.image_passes / MILLION:.1f} M image passes"
        f" ({run.image_passes / vanilla.image_passes:.3f} x vanilla)."
    )


def _section(name: str, fields: dict[str, Any]) -> list[str]:
    return [f"{name}:", *(f"  {field}: {_word(value)}" for field, value in fields.items())]


def _word(value: Any) -> str:
    """A value as the strict YAML of the configs spells it; `text_of` checks that it reads back."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return "[" + ", ".join(_word(item) for item in value) + "]"
        case _:
            return str(value)


if __name__ == "__main__":
    main()
