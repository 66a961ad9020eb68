"""Target: what is no file, where the program reads one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

import pipelines
from fap import checkpoint
from fap.config import load_config
from fap.evaluate import load
from pipelines.sources.sidecar import sidecar_path
from tests.fuzzing.intact import add_sidecar, make_beton, make_folder, tiny_run
from tests.fuzzing.judge import ALLOWED
from tests.hostile_meta import valid_meta


def fuzz_no_file(rng: np.random.Generator, folder: Path) -> str:
    """A named pipe, a device, a folder or a dangling link: an error at once."""
    paths = make_files(folder)
    used = list(paths)[int(rng.integers(len(paths)))]
    path = paths[used]
    path.unlink()
    what = str(rng.choice(["pipe", "device", "folder", "dangling"]))
    match what:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "dangling":
            path.symlink_to("nowhere")
    try:
        use(used, paths, folder)
    except ALLOWED as error:
        return f"{what} {path.name}: {str(error)[:150]}"
    # What is no image file is none, so only an image may be passed over.
    passed_over = used == "image" and what in ("folder", "dangling")
    assert passed_over, f"{what} {path.name}: accepted"
    return f"{what} {path.name}: passed over"


def make_files(folder: Path) -> dict[str, Path]:
    """One file of each sort that the program reads."""
    config, state = tiny_run()
    beton = make_beton(folder, "jpg")
    add_sidecar(beton)
    saved = folder / "step_00000005.safetensors"
    checkpoint.save(saved, state, valid_meta(config))
    yaml = folder / "config.yaml"
    yaml.write_text(config.to_yaml())
    return {
        "beton": beton,
        "sidecar": sidecar_path(beton),
        "image": sorted(make_folder(folder).rglob("*.*"))[0],
        "checkpoint": saved,
        "config": yaml,
    }


def use(what: str, paths: dict[str, Path], folder: Path) -> None:
    match what:
        case "beton" | "sidecar":
            pipelines.open_store(paths["beton"])
        case "image":
            pipelines.open_store(folder / "images")
        case "checkpoint":
            load.load_model(paths["checkpoint"])
        case "config":
            load_config(paths["config"])
