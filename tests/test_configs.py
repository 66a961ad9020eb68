"""The committed YAML files: made from one table, complete, and what README.md says of them."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from configs import make
from configs.table import COCO, RECIPES, TABLE, Row
from fap.config import Config, load_config, make_config

ROWS = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.file)
README = make.FOLDER / "README.md"
PAPER_COLUMNS = ("top1", "imagenet_c", "imagenet_r", "stylized")  # as README's table orders them


def file_of(row: Row) -> Path:
    return make.FOLDER / f"{row.file}.yaml"


# ------------------------------------------------------------------ the table and its files


def test_every_file_has_a_row_and_only_one() -> None:
    assert make.unknown_files() == [], "add a row to configs/table.py, or remove the file"
    files = [row.file for row in TABLE]
    assert len(files) == len(set(files))


@ROWS
def test_a_file_is_what_the_table_gives(row: Row) -> None:
    assert file_of(row).is_file(), "make configs"
    committed = file_of(row).read_text(encoding="utf-8")
    assert committed == make.text_of(row), "make configs"


def test_making_writes_every_file_and_tells_of_a_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    make.main()
    made = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in files_in(tmp_path)}
    assert made == {row.file for row in TABLE}

    stranger = tmp_path / "imagenet" / "stranger.yaml"
    stranger.write_text("seed: 1\n")
    with pytest.raises(SystemExit, match=r"does not know imagenet/stranger\.yaml"):
        make.main()
    assert stranger.read_text() == "seed: 1\n"


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.yaml"))


# ------------------------------------------------------------------ one file


@ROWS
def test_a_file_is_the_config_of_its_row(row: Row) -> None:
    config = load_config(file_of(row))
    assert config == make.config_of(row)
    assert config.name == file_of(row).stem
    assert make_config(yaml.safe_load(config.to_yaml())) == config


@ROWS
def test_a_file_is_complete(row: Row) -> None:
    """So a changed default changes no file in silence, and a diff of two is the ablation."""
    config = load_config(file_of(row))
    given = yaml.safe_load(file_of(row).read_text())
    of_the_machine = {
        "train",
        "val",
        "val_share",
        "pipeline",
        "decode",
        "threads",
        "prefetch",
        "hw_decoder_load",
        "init",
    }
    assert given.pop("task") == config.task
    assert given.keys() - {"paper"} == {"model", "method", "data", "optim", "budget"}
    for section in given.keys() - {"paper"}:
        values = getattr(config, section)
        expected = type(values).model_fields.keys() - of_the_machine
        if section in ("method", "budget"):
            expected = {name for name in expected if getattr(values, name) is not None}
        if section == "data" and config.data.crop == "letterbox":
            expected -= {"sizes", "resize", "scale", "ratio", "pad", "mix", "mix_alpha"}
            expected -= {"cutmix_alpha", "mix_per", "mix_on", "sampling"}
            expected -= {"augment", "augment_ops", "augment_magnitude", "erase"}
        elif section == "data":
            expected -= {"jitter", "most_boxes"}
        assert set(given[section]) == expected


@ROWS
def test_the_header_says_what_cost_and_command(row: Row) -> None:
    header = [line for line in file_of(row).read_text().splitlines() if line.startswith("#")]
    assert all(len(line) <= 100 or line.startswith("# Run: ") for line in header)
    assert header[0].startswith(f"# {row.title[:60]}")
    assert sum(line.startswith("# Cost: ") for line in header) == 1
    assert any(line.startswith("# Paper: ") for line in header) == bool(row.paper)

    (run,) = [line for line in header if line.startswith("# Run: fap-train ")]
    file, *overrides = run.removeprefix("# Run: fap-train ").split()
    config = load_config(make.FOLDER.parent / file, overrides)
    recipe = RECIPES[row.file.partition("/")[0]]
    words = ["data.train=train.beton", "data.val=val.beton", *recipe.more.split()]
    assert config == load_config(file_of(row), words)


def test_the_fields_are_those_of_the_typed_config() -> None:
    """The generator keeps no list of them, so a new field reaches every file."""
    for config in (Config(), make_config({"method": {"name": "vanilla"}})):
        said = make.settings(config)
        method = config.method.model_dump(mode="json")
        assert said["method"] == {k: v for k, v in method.items() if v is not None}
        assert said["optim"] == config.optim.model_dump(mode="json")


def test_no_two_files_are_the_same_run() -> None:
    for one, other in itertools.combinations(TABLE, 2):
        if one.file.partition("/")[0] == other.file.partition("/")[0]:
            assert make.settings(make.config_of(one)) != make.settings(make.config_of(other)), (
                one.file,
                other.file,
            )


# ------------------------------------------------------------------ the README


def test_the_readme_shows_the_papers_numbers() -> None:
    """Every row with numbers of the paper stands in README's table, with the same numbers."""
    rows = {row.file.removeprefix("imagenet/"): row for row in TABLE if row not in COCO}
    shown = set()
    for line in README.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 8 or not cells[2].startswith("`") or "imagenet/" in cells[2]:
            continue
        name = cells[2].strip("`")
        shown.add(name)
        for column, number in zip(PAPER_COLUMNS, cells[3:7], strict=False):
            paper = rows[name].paper.get(column)
            if number:
                # Table 5 prints 76.53 where Table 1 prints 76.5.
                assert paper == pytest.approx(float(number), abs=0.05), (name, column)
        assert {c for c, n in zip(PAPER_COLUMNS, cells[3:], strict=False) if n} <= {
            *rows[name].paper
        }
    with_numbers = {name for name, row in rows.items() if row.paper}
    assert with_numbers - shown <= {"fast_advprop_sequential"}  # the same run as fast_advprop


def test_the_readme_shows_table_7() -> None:
    shown: dict[str, dict[str, float]] = {}
    for line in README.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[2].startswith("`") and "coco/" not in cells[2]:
            numbers = zip(("map", "coco_c"), cells[3:5], strict=True)
            shown[cells[2].strip("`")] = {name: float(v) for name, v in numbers if v}
    assert shown == {row.file.removeprefix("coco/"): row.paper for row in COCO}


def test_the_readme_names_every_file_of_imagenet() -> None:
    named = set(re.findall(r"`(\w+)`", README.read_text()))
    assert {r.file.partition("/")[2] for r in TABLE if r.file.startswith("imagenet/")} <= named
