"""The metadata of a run's checkpoint: read back, or refused in a few words."""

import json
import random
import resource
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fap.checkpoint import DamagedCheckpoint, load, save
from fap.config import Config, make_config
from fap.evaluate.load import load_model
from fap.nets.build import build
from fap.run_meta import run_meta
from tests.hostile_meta import mutated, valid_meta

CLASSES = ("cat", "dog", "gnu")
MOST_KILOBYTES = 300_000  # more than before: nothing large may be built for a false file


@pytest.fixture(scope="module")
def config() -> Config:
    """Of a small run."""
    model = {"name": "cifar_resnet8", "num_classes": 3}
    return make_config({"name": "r", "model": model, "data": {"size": 32, "resize": 36}})


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The model's tensors in the checkpoint of such a run."""
    model = build("cifar_resnet8", 3, size=32)
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def changed(meta: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of a tree of mappings with the value at `a.b.c` replaced."""
    first, _, rest = key.partition(".")
    if rest:
        value = changed(meta[first], rest, value)
    return meta | {first: value}


def test_run_meta_round_trip(config: Config, state: dict[str, Tensor], tmp_path: Path) -> None:
    meta = valid_meta(config, CLASSES)
    # Of a run that diverges: it must resume all the same.
    meta = changed(meta, "totals.loss_clean", float("nan"))
    save(tmp_path / "c.safetensors", state, meta)
    found = run_meta("c", load(tmp_path / "c.safetensors")[1])
    assert found.config == config
    assert (found.step, found.closed, found.world, found.seconds) == (5, 1, 1, 2.5)
    assert found.train.classes == CLASSES
    assert found.val.model_dump() == meta["val"] | {"classes": CLASSES}
    assert run_meta("c", valid_meta(config)).train.classes is None
    undecodable = valid_meta(config, ["\udc80", "b"])  # names of folders
    assert run_meta("c", undecodable).train.classes == ("\udc80", "b")


def test_a_config_of_an_earlier_version_is_read_by_its_names(config: Config) -> None:
    meta = valid_meta(config, CLASSES)
    method = meta["config"]["method"]
    method["group"] = method.pop("group_rows")
    del meta["config"]["task"]
    del meta["best_step"]
    read = run_meta("c", meta)
    assert read.config == config
    assert read.best_step is None


@pytest.mark.parametrize(("key", "value", "message"), [
    ("step", -1, "'step'"),
    ("step", "5", "'step'"),
    ("step", True, "'step'"),
    ("step", 10**300, "'step'"),
    ("closed", 6, "closed = 6 epochs in step = 5"),
    ("seconds", float("nan"), "'seconds'"),
    ("world", 0, "'world'"),
    ("totals", {"loss": "x"}, "'totals.loss'"),
    ("best", {"epoch": 1.0}, "one metric and epoch"),
    ("best_step", 6, "best_step = 6 after step = 5"),
    ("last", {"top1": "x"}, "'last.top1'"),
    ("versions", ["torch"], "'versions'"),
    ("train.count", -1, "'train.count'"),
    ("train.content", "../../x", "'train.content'"),
    ("train.content", "0123abcd\n", "'train.content'"),
    ("train.classes", ["a", "a"], "twice"),
    ("train.classes", [], "list of class names"),
    ("train.classes", "abc", "list of class names"),
    ("train.classes", ["a", 1], "a class name is 1"),
    ("train.classes", ["a", "b", "c", "d"], "4 class names, but config.model.num_classes = 3"),
    ("extra", 1, "'extra'"),
    ("config", [], "'config'"),
    ("config", dict.fromkeys(map(str, range(1001))), "its config has 1,001 keys"),
    ("config.model", "x" * 100_000, "config is none of this version"),
    ("config.model.num_classes", None, "config.model.num_classes is not set"),
    ("config.unknown", 1, "unknown key"),
    ("config.data.size", "large", "data.size"),
])  # fmt: skip
def test_false_metadata_is_named(config: Config, key: str, value: Any, message: str) -> None:
    with pytest.raises(DamagedCheckpoint) as caught:
        run_meta("c.safetensors", changed(valid_meta(config, CLASSES), key, value))
    assert message in str(caught.value)
    assert str(caught.value).startswith("c.safetensors: metadata: ")
    assert "Value error, config" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_what_is_no_run_is_no_damage() -> None:
    with pytest.raises(ValueError, match="no checkpoint of a training run"):
        run_meta("c.safetensors", {"step": 1})


@pytest.mark.parametrize("meta", [[], "x", None, 7, [{}]])
def test_metadata_that_is_no_mapping(meta: Any, tmp_path: Path) -> None:
    save(tmp_path / "c.safetensors", {}, meta)
    with pytest.raises(DamagedCheckpoint, match="no mapping"):
        load(tmp_path / "c.safetensors")


# ---------------------------------------------------------------------- drawn at random


def hostile(config: Config, state: dict[str, Tensor], path: Path, seed: int) -> str:
    """One false checkpoint with a valid checksum: read, or refused in a few words."""
    meta = mutated(valid_meta(config, CLASSES), random.Random(seed))
    save(path, state, meta)
    try:
        load_model(path)
    except (DamagedCheckpoint, ValueError) as error:
        message = f"{type(error).__name__}: {error}"
    else:
        message = "loaded"
    assert len(message) < 1000, (seed, message[:3000])
    return message


def test_random_false_metadata(config: Config, state: dict[str, Tensor], tmp_path: Path) -> None:
    first = random.SystemRandom().randrange(10**9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = []
    for seed in range(first, first + 60):
        found.append(hostile(config, state, tmp_path / "c.safetensors", seed))
    assert any(message.startswith("DamagedCheckpoint: ") for message in found)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KILOBYTES, first


def test_mutations_reach_every_part() -> None:
    """The generator is only as good as its reach: every key is hit, most results are not valid."""
    valid = {"config": {"model": {"name": "x"}}, "step": 1, "train": {"classes": ["a", "b"]}}
    results = [mutated(valid, random.Random(seed)) for seed in range(300)]
    as_before = json.dumps(valid, sort_keys=True)
    assert sum(json.dumps(result, sort_keys=True) != as_before for result in results) > 250
    assert any("step" not in result for result in results)
    assert any(result.get("config", {}) != valid["config"] for result in results)
    trains = [result.get("train") for result in results]
    others = [train for train in trains if isinstance(train, dict)]
    assert any(train.get("classes") not in (["a", "b"], None) for train in others)
