"""A generator of metadata as an attacker, or another version, might leave it in a checkpoint."""

import copy
import random
from collections.abc import Sequence
from typing import Any

from fap.config import Config
from fap.step.metrics import METRICS

# What a value may become: other types, extremes, and what parsers and messages choke on.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7, 1000, 10**6, 10**9, 2**31, 2**63, 2**64, -(2**63), 10**300,
    0.0, -0.0, 0.5, 1e-320, 1e30, 1e308, float("inf"), float("-inf"), float("nan"),
    "", "0", "1e9", "x", "../../../x", "/", "~", "a\0b", "\ud800", "\n| x |\n", "on", "cpu", "-1",
    "1/3", "1/0",
    "cifar_resnet1000000000002", "cifar_resnet8", "cifar_resnet9" + "9" * 5000, "vit_b_16",
    "regnet_y_128gf", "timm/resnet18",
    "A" * 100_000, "9" * 5_000,
    [], {}, [[]], [None], {"": None}, ["a", "a"], [1, 2, 3], ["x"] * 5_000, [0.5] * 3,
]  # fmt: skip
DEPTH = 400  # of nested lists; json itself gives up at about a thousand


def valid_meta(
    config: Config, classes: Sequence[str] | None = None, step: int = 5
) -> dict[str, Any]:
    """What a run writes beside its tensors; the mutations start from it."""
    names = None if classes is None else list(classes)
    data = {"count": 40, "classes": names, "content": "0123abcd"}
    return {
        "config": config.model_dump(mode="json"),
        "step": step,
        "closed": 1,
        "totals": dict.fromkeys(METRICS, 0.0),
        "best": {"top1": 0.25, "epoch": 1},
        "best_step": 4,
        "last": {"top1": 0.25, "top5": 1.0, "loss": 1.5, "ece": 0.1},
        "seconds": 2.5,
        "world": 1,
        "dropout": False,
        "versions": {"torch": "2.14", "ffcv": None},
        "train": data,
        "val": data,
    }


def nested(rng: random.Random) -> Any:
    """Lists or mappings inside one another, deeper than code that calls itself may like."""
    tree: Any = 1
    for _ in range(rng.choice([20, DEPTH])):
        tree = [tree] if rng.random() < 0.5 else {"x": tree}
    return tree


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a tree of mappings and lists."""
    found: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        items: Any = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        items = []
    for key, value in items:
        found.append((tree, key))
        found += places(value)
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def mutated(valid: Any, rng: random.Random) -> Any:
    """A copy of a JSON tree with one to three changes.

    A value, its type, its place, or its absence.
    """
    tree = copy.deepcopy(valid)
    for _ in range(rng.randint(1, 3)):
        at = places(tree)
        if not at:
            break
        container, key = rng.choice(at)
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1:
                other, other_key = rng.choice(at)
                if isinstance(other, dict):
                    container[key] = copy.deepcopy(other.get(other_key))
                else:
                    container[key] = copy.deepcopy(rng.choice(VALUES))
            case 2:
                container[key] = nested(rng)
            case 3 if isinstance(container, dict):
                name = rng.choice(["", "x", "A" * 10_000, "../x", "step", "config", "\ud800"])
                container[name] = rng.choice(VALUES)
            case 4:
                container[key] = [container[key]]
            case 5 if is_number(container[key]):
                factor = rng.choice([-1, 10, 10**6, 0.5])
                container[key] = container[key] * factor
            case _:
                container[key] = copy.deepcopy(rng.choice(VALUES))
    return tree
