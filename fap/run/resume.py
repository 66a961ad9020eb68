"""What a run depends on, compared with what it resumes and with what its other ranks have.

Compared by content: where data lie, and where and how often a run reports, may differ.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fap.config import Config
from fap.distributed import Ranks
from fap.run.epoch import plan_spec
from fap.run_meta import RunMeta
from fap.run_settings import differing, settings_of
from pipelines.files import shown

# What may differ between ranks; else they would save, evaluate or stop at different steps.
PER_RANK_RUN = {"dir", "torch_threads"}


def check_same_run(saved: Config, now: Config, path: Path) -> None:
    """Raise ValueError if `now` would not go on as the run that wrote `path` began.

    The message gives each field's two values.
    """
    ours = settings_of(now)
    theirs = settings_of(saved)
    differ = differing(ours, theirs)
    if differ:
        lines = [f"  {field}: {shown(theirs[field])}, now {shown(ours[field])}" for field in differ]
        raise ValueError(
            f"resume=auto: {path} was trained with other settings; use another name or seed:\n"
            + "\n".join(lines)
        )


def check_same_data(
    field: str, saved: Mapping[str, Any], now: Mapping[str, Any], path: Path
) -> None:
    """Raise ValueError, with what differs, unless two `Store.identity()` are the same."""
    differ = []
    if saved["count"] != now["count"]:
        differ.append(f"{saved['count']:,} images, now {now['count']:,}")
    if saved["classes"] != now["classes"]:
        differ.append(f"classes {shown(saved['classes'])}, now {shown(now['classes'])}")
    if not differ and saved["content"] != now["content"]:
        differ.append(
            "as many images and the same classes, "
            f"but another content ({saved['content']}, now {now['content']})"
        )
    if differ:
        raise ValueError(
            f"resume=auto: {path} was trained with other data than {field} is now: "
            f"{'; '.join(differ)}. "
            "Its path may change, its content may not; use another name or seed"
        )


def check_same_groups(saved: RunMeta, now: Config, world: int, path: Path) -> None:
    """Raise ValueError, with the reason, if the run would depend on its number of ranks.

    Without one, ranks take slices of one plan, and what they sum and gather is the same: a run goes
    on on any number of them that divides its groups, which the step has checked.
    """
    if saved.world == world:
        return
    then = _groups_of_a_shuffle(now, saved.world)
    today = _groups_of_a_shuffle(now, world)
    reason = ""
    if then != today:
        reason = (
            f"method.shuffle = {now.method.shuffle!r} lets rows change places among the groups of "
            f"one rank, {then} then and {today} now"
        )
    elif saved.dropout is None:
        reason = "it was written by an earlier version, which does not say whether the model "
        reason += "has dropout, and with it each rank draws its own"
    elif saved.dropout:
        reason = "the model has dropout, or the like, and each rank draws its own"
    if reason:
        raise ValueError(
            f"resume=auto: {path} was written by {ranks_in_words(saved.world)}, "
            f"this run has {world}: {reason}; resume on as many ranks"
        )


def ranks_in_words(world: int) -> str:
    if world == 1:
        return "1 rank"
    return f"{world} ranks"


def _groups_of_a_shuffle(config: Config, world: int) -> int:
    """Among how many groups rows change places; 0 where they keep them."""
    groups = plan_spec(config, Ranks(world=world)).shuffle_groups
    if groups < 2:
        return 0
    return groups


def facts(
    config: Config, train: Mapping[str, Any], val: Mapping[str, Any], resumed: Path | None
) -> dict[str, Any]:
    """What all ranks must have in common before the first step."""
    start = "none"
    if resumed is not None:
        start = f"{resumed.stem}, checksum {checksum(resumed)}"
    found = {
        "checkpoint": start,
        "data.train": dict(train),
        "data.val": dict(val),
        **settings_of(config),
    }
    settings = config.run.model_dump(mode="json", exclude=PER_RANK_RUN)
    return found | {f"run.{field}": value for field, value in settings.items()}


def checksum(path: Path) -> str:
    """The CRC32 that stands in a checkpoint; who loaded it has compared it with the content."""
    with safe_open(path, "pt") as file:
        return str(file.metadata()["crc32"])


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """CRC32 of a model's tensors on the CPU.

    They are what `model.init`, or this machine's random numbers, came to.
    """
    crc32 = 0
    for name in sorted(tensors):
        crc32 = zlib.crc32(tensors[name].numpy().tobytes(), crc32)
    return f"{crc32:08x}"
