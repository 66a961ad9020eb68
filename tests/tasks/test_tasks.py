"""Every task of the registry fulfils the contract, and no other can be asked for."""

import inspect
import subprocess
import sys
from importlib import import_module
from types import FunctionType
from typing import Any

import pytest
import torch

from fap.config import make_config
from fap.tasks import TASKS, make_task
from fap.tasks.base import CorruptionMean, Task
from fap.tasks.labels import Matching
from pipelines.corrupt import NAMES

# What a task may leave as the contract has it.
LENT = {
    *("loss_parts", "fewest_classes", "references", "losses_and_hits", "attack_losses"),
    *("eval_batch", "notes", "pictures", "class_counter"),
    *("prediction_columns", "predictions"),
    *("look_at", "row_weights"),
}


def contract() -> list[str]:
    """Every member that `Task` declares: annotated attributes and methods."""
    functions = (FunctionType, staticmethod)
    methods = [name for name, member in vars(Task).items() if isinstance(member, functions)]
    own = [name for name in methods if not name.startswith("_") or name == "__init__"]
    return [*Task.__annotations__, *own]


def class_of(name: str) -> type:
    module, _, attribute = TASKS[name].partition(":")
    return getattr(import_module(module), attribute)


SETTINGS: dict[str, dict[str, Any]] = {
    "classification": {"model": {"name": "cifar_resnet8"}},
    "detection": {
        "model": {"name": "retinanet_tiny"},
        "data": {"crop": "letterbox", "size": [32, 32]},
    },
}
# Their evaluators wait for the device: what they gather has no fixed size.
WAITS = {"detection"}
# Members of a task that is made, not of its class.
FROM_THE_CONFIG = {"n_classes", "output_rows"}


def made(name: str) -> Task:
    settings = SETTINGS[name]
    model = settings["model"] | {"num_classes": 5}
    return make_task(make_config({"name": "tiny", "task": name, **settings, "model": model}))


def own_members(cls: type) -> dict[str, Any]:
    """Members of a class and its bases, but for those that the protocol would lend it."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is Task:
            break
        found = vars(base) | found
    return found


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Names, how they are given, and defaults."""
    listed = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in listed]


def test_the_contract_is_seen_whole() -> None:
    """A guard for the tests below, which go through it."""
    assert set(contract()) == {
        *("primary", "percents", "rows", "measure", "measure_better", "means", "loss_parts"),
        *("n_classes", "output_rows", "fewest_classes", "eval_batch", "notes", "pictures"),
        *("__init__", "plain_model", "labels", "targets", "references", "empty_targets"),
        *("losses", "hits", "losses_and_hits", "attack_losses", "wrong_targets"),
        *("evaluator", "class_counter", "check_metrics", "measured"),
        *("prediction_columns", "predictions"),
        *("look_at", "row_weights"),
    }


@pytest.mark.parametrize("member", contract())
@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_every_member_of_its_own(name: str, member: str) -> None:
    if member in FROM_THE_CONFIG:
        assert getattr(made(name), member) > 0
        return
    members = own_members(class_of(name))
    if member in LENT and member not in members:
        return
    assert member in members
    if member not in Task.__annotations__:
        assert parameters(members[member]) == parameters(vars(Task)[member])


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_made_of_a_config(name: str) -> None:
    assert type(made(name)) is class_of(name)


@pytest.mark.parametrize("name", TASKS)
def test_what_a_task_says_of_its_metrics_fits_together(name: str) -> None:
    task = made(name)
    assert task.primary in task.percents
    assert next(iter(task.rows)) == task.primary
    assert set(task.percents) <= set(task.rows)
    titles = [*task.rows.values()]
    assert len(set(titles)) == len(titles)
    assert task.measure
    for mean in task.means:
        assert isinstance(mean, CorruptionMean)
        assert set(mean.corruptions) <= set(NAMES)
        measured = dict.fromkeys(mean.corruptions, 0.5)
        assert isinstance(mean.percent(measured, 0.5), float)
    assert len({mean.title for mean in task.means}) == len(task.means)


@pytest.mark.parametrize("name", TASKS)
def test_outputs_and_targets_have_one_row_for_each_image(name: str) -> None:
    task = made(name)
    images = torch.rand(4, 3, 32, 32)
    outputs = task.plain_model()(images)
    targets = task.empty_targets(4, torch.device("cpu"))
    assert len(outputs) == len(targets) == 4
    losses = task.losses(outputs, targets)
    assert losses.shape == (4,)
    assert losses.requires_grad
    hits = task.hits(outputs, targets)
    assert hits.shape == (4,)
    assert ((hits >= 0) & (hits <= 1)).all()
    both = task.losses_and_hits(outputs, targets)
    assert torch.equal(both[0], losses)
    assert torch.equal(both[1], hits)
    assert torch.equal(task.attack_losses(outputs, targets, "total"), losses)
    parts = [task.attack_losses(outputs, targets, part) for part in task.loss_parts]
    if parts:
        assert torch.allclose(sum(parts), losses)
    # A function of its own row alone.
    assert torch.allclose(task.losses(outputs[1:3], targets[1:3]), losses[1:3])


@pytest.mark.parametrize("name", TASKS)
def test_what_must_not_wait_for_the_device_asks_for_no_value(name: str) -> None:
    """A tensor without storage has shapes alone: whatever asks it for a value fails."""
    task = made(name)
    meta = torch.device("meta")
    outputs = task.plain_model().to(meta)(torch.empty(4, 3, 32, 32, device=meta))
    targets = task.empty_targets(4, meta)
    assert task.losses(outputs, targets).shape == (4,)
    for found in task.losses_and_hits(outputs, targets):
        assert found.shape == (4,)
    for part in ("total", *task.loss_parts):
        assert task.attack_losses(outputs, targets, part).shape == (4,)
    keys = torch.empty(2, dtype=torch.int32, device=meta)
    assert task.wrong_targets(keys, targets).shape == targets.shape
    with pytest.raises(RuntimeError):
        outputs.sum().item()
    if name in WAITS:
        return
    some = torch.arange(3)
    for matching in (Matching("same"), Matching("some", some), Matching("few", some, True)):
        task.evaluator(meta, matching).update(outputs, targets)


def test_another_task_is_refused_by_the_config() -> None:
    with pytest.raises(ValueError, match="task = 'clasification': must be 'classification'"):
        make_config({"name": "tiny", "task": "clasification"})


@pytest.mark.slow
def test_a_config_is_checked_without_models() -> None:
    """Their packages take seconds to import, and a task's module needs the config itself."""
    absent = {"torchvision", "timm", *(entry.partition(":")[0] for entry in TASKS.values())}
    code = f"import sys, fap.config; print(*{absent} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []
