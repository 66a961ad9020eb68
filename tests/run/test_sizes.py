"""Progressive resizing: which size is trained in which epoch, resumed anywhere, refused at once.

The twin glues a run of each size to the one before by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipelines
from fap.budget import budget
from fap.config import load_config, make_config
from fap.distributed import ONE_RANK
from fap.nets.build import prepare
from fap.run import train, validation
from fap.run.epoch import epochs
from fap.run.train import Run
from fap.step import graph
from fap.step.step import Step
from fap.tasks import make_task
from fap.tasks.classification import Classification
from tests.run.runs import assert_same, final_state, run, words

CPU = torch.device("cpu")
# Five epochs of four steps: the changes come at 3 / 1.2 and 5 / 1.2 epochs.
SIZES = "data.sizes=[[0,16],[3,24],[5,32]]"
OF_EPOCH = [16, 16, 24, 24, 32]


def test_every_epoch_trains_its_size_and_every_evaluation_sees_one(
    tiny_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    evaluated: list[int] = []
    opened: list[int] = []
    feed = Step.feed
    evaluate = validation.evaluate
    open_loader = pipelines.open_loader

    def fed(step: Step, images: Tensor, *args: Any, **draws: Tensor) -> None:
        feed(step, images, *args, **draws)
        buffers = [step.inputs.images, step.adv.rows.images_255, *step.pass_input]
        (side,) = {side for images in buffers for side in images.shape[-2:]}
        trained.append(side)

    def looked_at(model: nn.Module, batches: Any, *args: Any, **options: Any) -> Any:
        pairs = list(batches)
        evaluated.extend(images.shape[-1] for images, _ in pairs)
        return evaluate(model, iter(pairs), *args, **options)

    def noted(*args: Any, size: int, **options: Any) -> pipelines.Loader:
        opened.append(size)
        return open_loader(*args, size=size, **options)

    monkeypatch.setattr(Step, "feed", fed)
    monkeypatch.setattr(validation, "evaluate", looked_at)
    monkeypatch.setattr(pipelines, "open_loader", noted)
    run(tiny_beton, tmp_path, SIZES, "run.eval_every=9")
    assert trained == [size for size in OF_EPOCH for _ in range(4)]
    assert set(evaluated) == {32}
    assert opened == [16, 24, 32, 32], "one for each size, and one that evaluates"


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["fused", "pipelined"])
def test_stopping_in_any_epoch_and_resuming_gives_the_same_weights(
    tiny_beton: Path, tmp_path: Path, schedule: str
) -> None:
    """Also between two sizes, where nothing is carried."""
    method = (SIZES, f"method.schedule={schedule}", "run.eval_every=9")
    whole, _ = run(tiny_beton, tmp_path / "whole", *method)
    for stop in (3, 4, 8, 9, 13, 16, 18):
        run(tiny_beton, tmp_path / "parts", *method, f"run.max_steps={stop}", "resume=auto")
    parts, _ = run(tiny_beton, tmp_path / "parts", *method, "resume=auto")
    assert_same(final_state(whole), final_state(parts))


@pytest.mark.gpu
def test_every_size_is_captured_by_a_graph_of_its_own(
    tiny_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[int] = []
    capture = graph.Graphed.__init__

    def noted(graphed: graph.Graphed, step: Step) -> None:
        capture(graphed, step)
        captured.append(step.inputs.images.shape[-1])

    monkeypatch.setattr(graph.Graphed, "__init__", noted)
    more = ("run.device=cuda", "run.graph=on", "run.amp=off", "method.schedule=pipelined")
    folder, result = run(tiny_beton, tmp_path, SIZES, *more)
    assert captured == [16, 24, 32]
    assert result["steps"] == 20
    assert all(torch.isfinite(v).all() for v in final_state(folder).values())


# ---------------------------------------------------------------------- the twin


def glued(data: Path, schedule: str) -> dict[str, Tensor]:
    """The state after a run of each size, which begins with the one before's weights."""
    state: dict[str, Tensor] = {}
    for size, numbers in ((16, range(2)), (24, range(2, 4)), (32, range(4, 5))):
        more = (f"method.schedule={schedule}", f"data.size={size}", "model.num_classes=10")
        config = load_config(None, words(data, Path("nowhere"), *more))
        task = make_task(config)
        torch.manual_seed(config.seed)
        model = prepare(task.plain_model(), aux=True, size=size)
        step = Step(model, config, task=task)
        kept = {name: v for name, v in state.items() if not name.startswith("carry.")}
        step.load_state(step.state() | kept)

        store = pipelines.open_store(data)
        rates = budget(config, len(store)).rates
        loader = pipelines.open_loader("reference", store, size=size, device=CPU)
        number = 4 * numbers.start
        for epoch in epochs(config, ONE_RANK, store, task, CPU, numbers):
            for batch in loader.load(epoch.plan):
                targets = epoch.targets[batch.step]
                draws = epoch.draws_of(batch.step)
                step.feed(batch.images, targets, rates.at(number), **draws)
                step()
                number += 1
        state = {name: tensor.clone() for name, tensor in step.state().items()}
    return state


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["fused", "pipelined"])
def test_a_run_is_one_run_of_each_size_after_the_other(
    tiny_beton: Path, tmp_path: Path, schedule: str
) -> None:
    folder, _ = run(tiny_beton, tmp_path, SIZES, f"method.schedule={schedule}", "run.eval_every=9")
    expected = glued(tiny_beton, schedule)
    found = final_state(folder)
    assert found.keys() == expected.keys() - {"metrics"}
    assert_same(found, {name: expected[name] for name in found})


# ---------------------------------------------------------------------- refusals


def only(side: int) -> type[Classification]:
    """A task whose model takes images of this side alone, as many a vision transformer does."""

    class Fixed(Classification):
        def plain_model(self) -> nn.Module:
            def check(_: nn.Module, args: Sequence[Tensor]) -> None:
                assert args[0].shape[-1] == side, f"input height must be {side}"

            model = super().plain_model()
            model.register_forward_pre_hook(check)
            return model

    return Fixed


def test_a_model_of_one_size_is_refused_before_anything_is_written(
    tiny_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "make_task", only(32))
    says = r"^data\.sizes: the model does not accept images of 16 px: input height must be 32"
    with pytest.raises(ValueError, match=says):
        run(tiny_beton, tmp_path, SIZES)
    assert not list(tmp_path.iterdir())
    Run(load_config(None, words(tiny_beton, tmp_path, "data.sizes=[[0,32]]")))


def test_a_size_that_no_plan_takes_is_refused_before_anything_is_written(
    tiny_beton: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^data\.sizes: size = 40000: must be .* at most 32767"):
        run(tiny_beton, tmp_path, "data.sizes=[[0,32],[3,40000]]")
    assert not list(tmp_path.iterdir())


def test_other_sizes_are_another_run(tiny_beton: Path, tmp_path: Path) -> None:
    run(tiny_beton, tmp_path, SIZES, "run.max_steps=2")
    with pytest.raises(ValueError, match=r"data\.sizes: \[\[0, 16\], \[3, 24\], \[5, 32\]\], now"):
        run(tiny_beton, tmp_path, "data.sizes=[[0,16]]", "run.max_steps=4", "resume=auto")


# ---------------------------------------------------------------------- the step


def test_a_resized_step_is_a_new_one_with_the_same_weights() -> None:
    tree = {
        "model": {"name": "cifar_resnet8", "num_classes": 4},
        "method": {"schedule": "pipelined", "group_rows": 8},
        "optim": {"clean_batch": 16},
        "data": {"size": 16, "resize": 16},
    }
    config = make_config(tree)
    task = make_task(config)
    step = Step(prepare(task.plain_model(), aux=True, size=16), config, task=task)
    step.inputs.images.random_(0, 256)
    step()
    before = {name: tensor.clone() for name, tensor in step.state().items()}
    assert before["carry.filled"]
    images = step.inputs.images
    step.resize(16)
    assert step.inputs.images is images, "the same size changes nothing"
    step.resize(24)
    after = step.state()
    assert not after["carry.filled"]
    assert after["carry.images_255"].shape[-2:] == (24, 24)
    assert step.inputs.images.is_contiguous(memory_format=torch.channels_last)
    for name, tensor in before.items():
        if not name.startswith("carry."):
            assert torch.equal(after[name], tensor), name
    lr = step.inputs.lr
    step.feed(torch.zeros_like(step.inputs.images), step.inputs.targets, 0.25)
    assert step.inputs.lr is lr, "what the optimiser reads stays"
    step()
    assert step.state()["carry.filled"]
