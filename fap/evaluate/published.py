"""The folders of published benchmarks: their sets, and what belongs to none of them."""

import difflib
from pathlib import Path

from pipelines.corrupt import NAMES
from pipelines.files import readable

SEVERITIES = range(1, 6)
BETON = ".beton"
MOST_NAMED = 5  # of what a folder holds instead


def corruption_folders(root: Path) -> tuple[dict[tuple[str, int], Path], list[str]]:
    """ImageNet-C as published, ROOT/CORRUPTION/SEVERITY, in the report's order; what else is there.

    SEVERITY.beton is a set too, as fap-corrupt writes it.
    Raises ValueError for a folder that holds none of them, OSError.
    """
    severities = [str(severity) for severity in SEVERITIES]
    found: dict[tuple[str, int], Path] = {}
    unused: list[str] = []
    for entry in _listed(root, "--imagenet-c"):
        if entry.name not in NAMES or not entry.is_dir():
            unused.append(_unused(root, entry.name))
            continue
        for part in _listed(entry, "--imagenet-c"):
            is_beton = part.suffix == BETON and part.is_file()
            severity = part.stem if is_beton else part.name
            if part.name.endswith(f"{BETON}.json"):  # the sidecar of one
                continue
            is_set = severity in severities and (is_beton or part.is_dir())
            if is_set and (entry.name, int(severity)) not in found:
                found[entry.name, int(severity)] = part
            else:
                unused.append(_unused(root, f"{entry.name}/{part.name}"))
    if not found:
        raise ValueError(
            f"--imagenet-c {root}: holds none of {', '.join(NAMES)} "
            f"with severities 1 to 5{_and_holds(unused)}"
        )
    in_order = sorted(found, key=lambda at: (NAMES.index(at[0]), at[1]))
    return {at: found[at] for at in in_order}, unused


def corruption_arrays(root: Path) -> tuple[dict[str, Path], list[str]]:
    """CIFAR-10-C as published, ROOT/CORRUPTION.npy, in the report's order; what else is there.

    Raises ValueError for a folder that holds none of them, OSError.
    """
    found: dict[str, Path] = {}
    unused: list[str] = []
    for entry in _listed(root, "--cifar10-c"):
        if entry.suffix == ".npy" and entry.stem in NAMES:
            found[entry.stem] = entry
        elif entry.name != "labels.npy":
            unused.append(_unused(root, entry.name))
    if not found:
        expected = ", ".join(f"{name}.npy" for name in NAMES)
        raise ValueError(f"--cifar10-c {root}: holds none of {expected}{_and_holds(unused)}")
    return {name: found[name] for name in NAMES if name in found}, unused


def _listed(folder: Path, option: str) -> list[Path]:
    """What lies in a folder, by name, but for hidden things."""
    if not folder.is_dir():
        raise ValueError(f"{option} {folder}: no such folder")
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _unused(root: Path, name: str) -> str:
    """A path for a message, with the corruption that its name may be meant for."""
    path = readable(str(root / name))
    first = name.split("/")[0].removesuffix(".npy")
    near = difflib.get_close_matches(first, NAMES, n=1)
    if near and near[0] != first:
        return f"{path} (did you mean {near[0]}?)"
    return path


def _and_holds(unused: list[str]) -> str:
    if not unused:
        return ""
    return f"; it holds {', '.join(unused[:MOST_NAMED])}"
