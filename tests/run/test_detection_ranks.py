"""Detection on one and on two ranks: the same training, the same AP."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pipelines
from fap.config import Config, load_config
from fap.distributed import ONE_RANK, connect
from fap.nets.build import prepare
from fap.run.epoch import epochs, plan_spec
from fap.run.train import Run
from fap.step.rows import Aim, Rows, shuffled
from fap.step.step import Step
from fap.tasks import make_task
from tests.run.detections import DETECTION, write_boxes
from tests.run.wiring import BASE
from tests.test_distributed import free_port, join

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxes(tmp_path_factory.mktemp("ranks") / "data.beton", 0)


def config(data: Path, runs: Path, *more: str) -> Config:
    words = [word.format(data=data, runs=runs) for word in (*BASE, *DETECTION)]
    return load_config(None, [*words, "model.num_classes=3", "data.jitter=[0.7,1.3]", *more])


# ---------------------------------------------------------------------- the step


def train(
    rank: int, world: int, port: int, data: Path, method: list[str], seed: int, out: Path
) -> None:
    """Two epochs in float64, of this rank's rows of each step; every rank saves its state."""
    ranks = join(rank, world, port)
    c = config(data, out, *method, f"seed={seed}", "optim.clip_norm=1")
    task = make_task(c)
    torch.manual_seed(seed)
    model = prepare(task.plain_model(), aux=c.method.has_aux, size=c.data.size).double()
    step = Step(model, c, ranks, task=task)
    store = pipelines.open_store(data)
    loader = pipelines.open_loader("reference", store, size=c.data.size, device=CPU)
    for epoch in epochs(c, ranks, store, task, CPU, range(2)):
        for batch in loader.load(epoch.plan):
            targets = epoch.targets[batch.step]
            step.feed(batch.images, targets, 0.05, **epoch.draws_of(batch.step))
            step()
    found = {"state": step.state(), "metrics": step.metrics.take(ranks)}
    torch.save(found, out / f"{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "method",
    [
        ["method.schedule=fused"],
        ["method.schedule=pipelined"],
        ["method.name=decoupled", "method.attack_loss=max"],
        ["method.name=vanilla", "method.p_adv=null"],
    ],
    ids=["fused", "pipelined", "max", "vanilla"],
)
def test_one_and_two_ranks_train_alike(data: Path, method: list[str], tmp_path: Path) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    train(0, 1, 0, data, method, seed, tmp_path)
    mp.spawn(train, (2, free_port(), data, method, seed, tmp_path), nprocs=2)
    one = torch.load(tmp_path / "1_0.pt")
    for rank in range(2):
        other = torch.load(tmp_path / f"2_{rank}.pt")
        for name, value in one["state"].items():
            if name.startswith(("model.", "momentum.")) and value.is_floating_point():
                same = torch.allclose(other["state"][name], value, rtol=1e-9, atol=1e-11)
                assert same, (seed, rank, name)
        for name in ("rows_clean", "loss_clean", "correct_clean"):
            assert other["metrics"][name] == pytest.approx(one["metrics"][name]), name


# ---------------------------------------------------------------------- the shuffle


def exchange(rank: int, world: int, port: int, data: Path, out: Path) -> None:
    """The rows that a rank gets if each row's image and all its boxes hold its number."""
    ranks = join(rank, world, port)
    c = config(data, out)
    store = pipelines.open_store(data)
    (epoch,) = epochs(c, ranks, store, make_task(c), CPU, range(1))
    shuffle = epoch.draws["shuffle"][0]
    n = plan_spec(c).adv_rows // world
    number = torch.arange(rank * n, (rank + 1) * n).float()
    images = number.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = number.view(-1, 1, 1).repeat(1, c.data.most_boxes, 5)
    found = shuffled(Rows(images, Aim(targets)), shuffle, "ranks", ranks)
    torch.save((found.images_255, found.aim.targets), out / f"{rank}.pt")
    dist.destroy_process_group()


def test_boxes_change_ranks_with_their_images(data: Path, tmp_path: Path) -> None:
    mp.spawn(exchange, (2, free_port(), data, tmp_path), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    images = torch.cat([part[0] for part in parts])
    targets = torch.cat([part[1] for part in parts])
    numbers = targets[:, 0, 0]
    assert sorted(numbers.tolist()) == [0, 1, 2, 3]  # none lost, none doubled
    assert torch.equal(targets, numbers.view(-1, 1, 1).expand_as(targets))
    assert torch.equal(images, numbers.view(-1, 1, 1, 1).expand_as(images))
    assert ((numbers // 2) != torch.tensor([0, 0, 1, 1])).any()  # some changed ranks


# ---------------------------------------------------------------------- validation


def validate(rank: int, world: int, port: int, data: Path, weights: Path, out: Path) -> None:
    torch.set_num_threads(1)
    ranks = ONE_RANK
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        ranks = connect()
    # 24 images in batches of 7 or 2 x 3, the last of which are padded.
    words = [f"model.init={weights}", "run.eval_batch=7", "data.jitter=[1,1]"]
    run = Run(config(data, out / f"runs{world}", *words), ranks)
    run.step.network.model.eval()
    found = run.validate(run.model, lambda: None)
    (out / f"{world}_{rank}.json").write_text(json.dumps(found))
    run.run_folder.release()
    if world > 1:
        os._exit(0)


@pytest.fixture(scope="module")
def weights(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain weights of a detector that finds something: AP is above zero."""
    from fap.export.formats import export

    folder = tmp_path_factory.mktemp("trained")
    more = ("budget.epochs=30", "budget.milestones=[24]", "optim.lr=1", "optim.clip_norm=5")
    vanilla = ("method.name=vanilla", "method.p_adv=null", "run.eval_every=30", "run.log_every=99")
    c = config(data, folder, *more, *vanilla, "data.jitter=[1,1]")
    run = Run(c, ONE_RANK)
    result: dict[str, Any] = run.train()
    assert result["last"]["map"] > 0.03
    export(run.saving.checkpoints.paths()[-1], folder / "plain.safetensors")
    return folder / "plain.safetensors"


def test_the_ap_of_two_ranks_is_that_of_one(data: Path, weights: Path, tmp_path: Path) -> None:
    validate(0, 1, 0, data, weights, tmp_path)
    mp.spawn(validate, (2, free_port(), data, weights, tmp_path), nprocs=2)
    one = json.loads((tmp_path / "1_0.json").read_text())
    assert one["map"] > 0.03
    for rank in range(2):
        other = json.loads((tmp_path / f"2_{rank}.json").read_text())
        assert other == pytest.approx(one, rel=1e-4)
