"""Recipes that come with the package: `fap-train NAME` finds them by name, also when installed.

Unlike the files of configs/, a recipe leaves to the user what it is for: the data and the model.
"""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The recipes, by the names of their files."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def file_of(name: str) -> Path | None:
    """The file of a recipe; None where there is none of that name."""
    return FOLDER / f"{name}.yaml" if name in names() else None
