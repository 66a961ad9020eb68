"""The settings that a run's result depends on: by them two runs are compared.

Where data and weights lie is none of them, nor where and how often a run reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fap.config import Config
from fap.nets.weights.find import is_published
from fap.sections.budget import OF_LR_SCHEDULE
from fap.sections.data import OF_MIX
from pipelines.back_ends import GPU_DECODER

# What changes no result but by rounding. `amp` does: a loss scale of half precision is none of full
# precision.
FREE_DATA = {
    "train",
    "val",
    "val_share",
    "threads",
    "prefetch",
    "hw_decoder_load",
}  # data: compared by content
# They follow from `budget.lr_schedule` where that differs.
SHAPES_OF_A_RATE = {f"budget.{name}" for fields in OF_LR_SCHEDULE.values() for name in fields}


def settings_of(config: Config) -> dict[str, Any]:
    """The fields that a run's result depends on, as `section.field`, with values of JSON.

    Without those that have no meaning in it, such as `data.pad` where nothing is padded.
    """
    tree = config.model_dump(
        mode="json", exclude={"resume": True, "paper": True, "run": True, "data": FREE_DATA}
    )
    meaningless = set(config.data.meaningless)
    if config.data.crop == "pad":
        meaningless |= {"scale", "ratio"}
    else:
        meaningless |= {"pad"}
    if config.data.mix is None:
        meaningless |= {"mix_alpha", *OF_MIX}
    elif config.data.mix != "either":
        meaningless |= {"cutmix_alpha"}
    for field in meaningless:
        tree["data"].pop(field)
    tree["data"]["filter"] = config.data.shown_filter
    if config.data.crop != "letterbox":
        tree["data"]["augment_ops"] = config.data.shown_ops
        tree["data"]["augment_magnitude"] = config.data.shown_magnitude
    # Of dali it follows from the device. Before there was the field, CPU cores decoded.
    tree["data"]["decode"] = "gpu" if config.data.decode == "gpu" else "cpu"
    if config.data.pipeline == GPU_DECODER:
        del tree["data"]["decode"]
    init = config.model.init
    if init is not None and not is_published(init):  # a file may have moved, like the data
        tree["model"]["init"] = Path(init).name
    flat = {"run.amp": config.run.amp}
    for section, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{section}.{field}": v for field, v in value.items()}
        else:
            flat[section] = value
    return flat


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The fields in which two runs' settings differ, without those that follow from another one."""
    # A field that has a meaning for one of the two only follows from another one, which differs
    # too.
    differ = [field for field in ours if field in theirs and ours[field] != theirs[field]]
    if "method.name" in differ:  # then a dozen of its fields follow
        differ = [f for f in differ if f == "method.name" or not f.startswith("method.")]
    if "budget.lr_schedule" in differ:
        differ = [f for f in differ if f not in SHAPES_OF_A_RATE]
    return differ
