"""A folder as the Hugging Face Hub has them: config.json with timm's fields, weights, card."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import timm
import torch

from fap import checkpoint
from fap.config import Config
from fap.evaluate.load import Plain
from fap.export.facts import Written, constructor, fixed_size, header, library_of
from fap.export.model_card import model_card
from fap.export.tensors import same
from fap.nets.weights.files import CONFIG, HUB_FILES, from_path
from fap.nets.weights.names import TIMM, spelt
from pipelines.files import one_line, sync_folder, write_whole

CARD = "README.md"


def write_hub_folder(plain: Plain, out: Path) -> Written:
    """All of the folder or none of it. Raises OSError, ValueError."""
    config = plain.config
    library = library_of(config)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        tree = json.dumps(hub_config(plain, library), indent=1) + "\n"
        write_whole(temporary / CONFIG, [tree.encode()])
        text = header(plain) | {"format": "pt"}
        checkpoint.save(temporary / HUB_FILES[0], plain.weights, {}, overwrite=False, **text)
        card = model_card(plain, library, usage(config, library, out.name))
        write_whole(temporary / CARD, [card.encode()])
        _check(plain, library, temporary)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(out.parent)
    what = "folder for the Hugging Face Hub, loaded again and compared"
    if library != "timm":
        what += (
            f" (the model is {library}'s: weights and card, which timm.create_model cannot load)"
        )
    return Written(what, (*usage(config, library, str(out)), f"hf upload USER/NAME {out}"))


def usage(config: Config, library: str, folder: str) -> tuple[str, ...]:
    """Python that loads the folder."""
    if library == "timm":
        return (f"model = timm.create_model({'local-dir:' + folder!r}, pretrained=True)",)
    weights = f"{folder}/{HUB_FILES[0]}"
    return (
        f"model = {constructor(config)}",
        f"model.load_state_dict(safetensors.torch.load_file({weights!r}), strict=True)",
    )


def hub_config(plain: Plain, library: str) -> dict[str, Any]:
    """The content of config.json."""
    config = plain.config
    data = config.data
    cfg: dict[str, Any] = {
        "tag": "fap",
        "custom_load": False,
        "input_size": [3, *data.sides],
        "fixed_input_size": library == "timm" and fixed_size(config),
        "interpolation": data.eval_filter,
        "crop_mode": "center",
        "mean": list(data.mean),
        "std": list(data.std),
        "num_classes": config.model.classes,
    }
    if data.crop != "letterbox":
        cfg["crop_pct"] = crop_pct(data.sides[0], data.resize)
    tree: dict[str, Any] = {
        "architecture": spelt(config.model.name).removeprefix(TIMM),
        "library": library,
        "num_classes": config.model.classes,
    }
    if library == "timm":
        known = timm.get_pretrained_cfg(tree["architecture"])
        if known is not None:
            cfg |= {"first_conv": known.first_conv, "classifier": known.classifier}
        if cfg["fixed_input_size"]:
            tree["model_args"] = {"img_size": list(data.sides)}
    if plain.meta.train.classes is not None:
        tree["label_names"] = list(plain.meta.train.classes)
    return tree | {"pretrained_cfg": cfg}


def crop_pct(size: int, resize: int) -> float:
    """The share from which timm's floor(size / share) is `resize`."""
    exact = size / resize
    if math.floor(size / exact) == resize:
        return exact
    return size / (resize + 0.5)


def _check(plain: Plain, library: str, folder: Path) -> None:
    """Raise ValueError unless the folder gives the weights back, to us and to timm."""
    if not same(from_path(str(folder)).state, plain.weights):
        raise ValueError(f"{folder.name}: what was written is not what is there")
    if library != "timm":
        return
    try:
        with torch.random.fork_rng(devices=[]):
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # of a constructor of timm
        raise ValueError(f"timm does not load the folder: {one_line(error)}") from None
    if not same(loaded.state_dict(), plain.weights):
        raise ValueError("timm loads other weights from the folder")
