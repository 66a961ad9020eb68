"""Ranks: 1, 2 and 4 processes train alike, and the shuffle across them loses nothing."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pipelines
from fap.config import Config, load_config
from fap.distributed import Ranks
from fap.models import build
from fap.step import Step
from fap.train import plan_spec

CLEAN, GROUP, ADV = 32, 8, 4  # rows: 4 groups of 8 clean and 4 groups of 4 adversarial


def config(method: list[str]) -> Config:
    sizes = ["data.size=8", "data.resize=8", "data.crop=pad", "data.pad=2", "model.num_classes=5"]
    return load_config(None, [*sizes, f"optim.clean_batch={CLEAN}", f"method.group={GROUP}", "optim.lr=0.8", *method])


def train(rank: int, world: int, port: int, method: list[str], seed: int, out: Path) -> None:
    """Five steps in float64; every rank saves its state."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world)
    c = config(method)
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (250, 3, 8, 8), dtype=np.uint8))
    labels = torch.from_numpy(np.random.default_rng(seed + 1).integers(0, 5, 250))
    torch.manual_seed(seed)
    model = build("cifar_resnet8", 5, aux=c.method.name != "vanilla", size=8).double()
    step = Step(model, c, Ranks(rank, world, rank))
    sides = np.full(250, 8)
    whole = pipelines.draw_epoch(plan_spec(c, Ranks(rank, world, rank)), sides, sides, epoch=0)
    plan = whole.for_rank(rank, world)
    for k in range(5):
        rows = torch.from_numpy(plan.index[k].astype(np.int64))
        draws = {}
        if step.n_adv:
            shuffle = torch.from_numpy(plan.shuffle[k, rank * step.n_adv : (rank + 1) * step.n_adv].copy())
            draws = {"shuffle": shuffle, "noise_key": torch.from_numpy(plan.noise_key[k].copy())}
        step.feed(images[rows], labels[rows], 0.05, **draws)
        step()
    dist_metrics = step.take_metrics()
    torch.save({"state": step.state(), "stats": step.flat.stats, "metrics": dist_metrics}, out / f"{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "worlds"),
    [
        (["method.schedule=fused", "method.p_adv=1/3"], (2, 4)),
        (["method.schedule=pipelined", "method.p_adv=1/3"], (2,)),
        (["method.name=vanilla"], (2,)),
    ],
    ids=["fused", "pipelined", "vanilla"],
)
def test_one_two_and_four_ranks_train_alike(method: list[str], worlds: tuple[int, ...], tmp_path: Path) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    train(0, 1, 0, method, seed, tmp_path)
    for world in worlds:
        mp.spawn(train, (world, free_port(), method, seed, tmp_path), nprocs=world)
    one = torch.load(tmp_path / "1_0.pt")
    for world in worlds:
        for rank in range(world):
            other = torch.load(tmp_path / f"{world}_{rank}.pt")
            for name, value in one["state"].items():
                if name.startswith(("model.", "momentum.")) and value.is_floating_point():
                    assert torch.allclose(other["state"][name], value, rtol=1e-9, atol=1e-11), (seed, world, name)
        assert other["metrics"]["rows_clean"] == one["metrics"]["rows_clean"]
        assert other["metrics"]["loss_clean"] == pytest.approx(one["metrics"]["loss_clean"])


def exchange(rank: int, world: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    c = config(["method.p_adv=1/3"])
    step = Step(build("cifar_resnet8", 5, size=8), c, Ranks(rank, world, rank))
    sides = np.full(250, 8)
    plan = pipelines.draw_epoch(plan_spec(c), sides, sides, epoch=3)
    n = step.n_adv
    step.inputs.shuffle.copy_(torch.from_numpy(plan.shuffle[0, rank * n : (rank + 1) * n].copy()))
    number = torch.arange(rank * n, (rank + 1) * n)
    step._publish(number.float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8), number)
    torch.save((step.adv_255, step.adv_labels), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_shuffle_across_ranks_is_a_permutation_in_which_every_row_leaves_its_group(tmp_path: Path) -> None:
    mp.spawn(exchange, (4, free_port(), tmp_path), nprocs=4)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    labels = torch.cat([p[1] for p in parts])
    assert sorted(labels.tolist()) == list(range(16))  # none lost, none doubled
    assert torch.equal(torch.cat([p[0] for p in parts])[:, 0, 0, 0], labels.float())  # images went with their labels
    assert ((labels // ADV) != (torch.arange(16) // ADV)).all()


@pytest.mark.slow
def test_torchrun_trains_like_one_process_and_refuses_another_number_of_ranks(tiny_beton: Path, tmp_path: Path) -> None:
    words = [
        f"data.train={tiny_beton}", f"data.val={tiny_beton}",
        "data.size=32", "data.resize=32", "data.crop=pad", "model.name=cifar_resnet8",
        "model.num_classes=10", "optim.clean_batch=8", "method.group=4", "method.p_adv=1/3", "budget.epochs=3",
        "budget.milestones=[2]", "run.device=cpu", "run.torch_threads=1", "data.threads=1", "run.eval_batch=8",
        "data.pipeline=reference",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    one = [sys.executable, "-m", "fap.cli.train", *words, f"run.dir={tmp_path}/one"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    two = [*launch, "-m", "fap.cli.train", *words, f"run.dir={tmp_path}/two"]
    results = []
    for cmd in (one, two):
        done = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        results.append(next((tmp_path / ("one" if cmd is one else "two")).rglob("metrics.jsonl")).read_text().splitlines())
    import json

    for a, b in zip(*results, strict=True):
        a, b = json.loads(a), json.loads(b)
        for key in ("epoch_loss_clean", "epoch_acc_adv", "val_loss", "val_top1"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-3), key
    again = subprocess.run([*one[:-1], f"run.dir={tmp_path}/two", "resume=auto"], env=env, capture_output=True, text=True)
    assert again.returncode == 1
    assert "2 ranks" in again.stderr
