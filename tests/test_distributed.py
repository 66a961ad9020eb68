"""Ranks: 1, 2 and 4 processes train alike, shuffle without a loss, start and stop together."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file

import pipelines
from fap.config import Config, load_config
from fap.distributed import ONE_RANK, Ranks, Votes, connect
from fap.nets.build import build, plain
from fap.run import session
from fap.run.epoch import plan_spec, step_draws
from fap.run.train import Run
from fap.step.rows import Aim, Rows, shuffled
from fap.step.step import Step
from tests.conftest import noise_beton
from tests.run.runs import RUN, environment, records, wait_for_a_record

IMAGES = 250
# Rows: 4 groups of 8 clean and 4 groups of 4 adversarial ones.
CLEAN = 32
GROUP = 8
ADV = 4


def config(method: list[str]) -> Config:
    sizes = ["data.size=8", "data.resize=8", "data.crop=pad", "data.pad=2", "model.num_classes=5"]
    rows = [f"optim.clean_batch={CLEAN}", f"method.group_rows={GROUP}"]
    return load_config(None, [*sizes, *rows, "optim.lr=0.8", *method])


def join(rank: int, world: int, port: int) -> Ranks:
    """This process as a rank of a group on this machine."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world)
    return Ranks(rank, world, rank)


def plan_of(c: Config, ranks: Ranks, epoch: int) -> pipelines.EpochPlan:
    """The part of one rank."""
    sides = np.full(IMAGES, 8)
    whole = pipelines.draw_epoch(plan_spec(c, ranks), sides, sides, epoch)
    return whole.for_rank(ranks.rank, ranks.world)


def train(rank: int, world: int, port: int, method: list[str], seed: int, out: Path) -> None:
    """Five steps in float64; every rank saves its state."""
    ranks = join(rank, world, port)
    c = config(method)
    shape = (IMAGES, 3, 8, 8)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    images = torch.from_numpy(pixels)
    labels = torch.from_numpy(np.random.default_rng(seed + 1).integers(0, 5, IMAGES))
    torch.manual_seed(seed)
    model = build("cifar_resnet8", 5, aux=c.method.name != "vanilla", size=8).double()
    step = Step(model, c, ranks)
    plan = plan_of(c, ranks, epoch=0)
    draws = step_draws(plan, c, torch.device("cpu"))
    for k in range(5):
        rows = torch.from_numpy(plan.index[k].astype(np.int64))
        of_this_step = {name: values[k] for name, values in draws.items()}
        step.feed(images[rows], labels[rows], 0.05, **of_this_step)
        step()
    found = {"state": step.state(), "metrics": step.metrics.take(ranks)}
    torch.save(found, out / f"{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def free_port() -> int:
    """A port that nobody listens at.

    Below those that the system hands out (from 32,768 on): another process would be given such a
    one in the seconds until ours listens.
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("", port))
            return port


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
def test_one_two_and_four_ranks_train_alike(
    method: list[str], worlds: tuple[int, ...], tmp_path: Path
) -> None:
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
                    same = torch.allclose(other["state"][name], value, rtol=1e-9, atol=1e-11)
                    assert same, (seed, world, name)
        assert other["metrics"]["rows_clean"] == one["metrics"]["rows_clean"]
        assert other["metrics"]["loss_clean"] == pytest.approx(one["metrics"]["loss_clean"])


def exchange(rank: int, world: int, port: int, out: Path) -> None:
    """The rows that a rank gets if each row, an image and a label, holds its number."""
    ranks = join(rank, world, port)
    c = config(["method.p_adv=1/3"])
    plan = plan_of(c, ranks, epoch=3)
    shuffle = step_draws(plan, c, torch.device("cpu"))["shuffle"][0]
    number = torch.arange(rank * ADV, (rank + 1) * ADV)  # a group each
    images = number.float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    images = images.contiguous(memory_format=torch.channels_last)
    found = shuffled(Rows(images, Aim(number)), shuffle, "ranks", ranks)
    torch.save((found.images_255, found.aim.targets), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_shuffle_across_ranks_is_a_permutation_in_which_every_row_leaves_its_group(
    tmp_path: Path,
) -> None:
    mp.spawn(exchange, (4, free_port(), tmp_path), nprocs=4)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    images = torch.cat([part[0] for part in parts])
    labels = torch.cat([part[1] for part in parts])
    assert sorted(labels.tolist()) == list(range(16))  # none lost, none doubled
    # Images went with their labels, whole.
    assert torch.equal(images, labels.float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8))
    assert ((labels // ADV) != (torch.arange(16) // ADV)).all()


@pytest.mark.slow
def test_torchrun_trains_like_one_process_which_goes_on_with_its_run(
    tiny_beton: Path, tmp_path: Path
) -> None:
    words = [
        f"data.train={tiny_beton}", f"data.val={tiny_beton}", "data.size=32", "data.resize=32",
        "data.crop=pad", "model.name=cifar_resnet8", "model.num_classes=10", "optim.clean_batch=8",
        "method.group_rows=4", "method.p_adv=1/3", "budget.epochs=3", "budget.milestones=[2]",
        "run.device=cpu", "run.torch_threads=1", "data.threads=1", "run.eval_batch=8",
        "data.pipeline=reference",
    ]  # fmt: skip

    def start(*launch: str, runs: str, more: tuple[str, ...] = ()) -> Any:
        argv = [
            sys.executable,
            *launch,
            "-m",
            "fap.cli.train",
            *words,
            f"run.dir={tmp_path / runs}",
        ]
        return subprocess.run(
            [*argv, *more], env=environment(), capture_output=True, text=True, timeout=900
        )

    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    for done in (
        start(runs="one"),
        start(*torchrun, "--master-port", str(free_port()), runs="two"),
    ):
        assert done.returncode == 0, done.stdout + done.stderr
    ones = records(tmp_path / "one" / RUN)
    twos = records(tmp_path / "two" / RUN)
    for a, b in zip(ones, twos, strict=True):
        for key in ("epoch_loss_clean", "epoch_acc_adv", "val_loss", "val_top1"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-3), key
    again = start(runs="two", more=("resume=auto",))
    assert again.returncode == 0, again.stderr
    assert "written by 2 ranks" in again.stdout


# ------------------------------------------------------------------ start and stop


def small(data: Path, runs: Path, *more: str) -> list[str]:
    return [
        f"data.train={data}", f"data.val={data}", f"run.dir={runs}", "data.size=32",
        "data.resize=32", "data.crop=pad", "model.name=cifar_resnet8", "model.num_classes=10",
        "optim.clean_batch=8", "method.group_rows=4", "method.p_adv=1/3", "budget.epochs=600",
        "budget.milestones=[2]", "run.device=cpu", "run.torch_threads=1", "data.threads=1",
        "data.pipeline=reference", "run.log_every=1", *more,
    ]  # fmt: skip


# What both ranks say, by case: settings of both, settings of rank 1, and what both errors contain.
DIFFERENT_RANKS = {
    "folder": (
        ["resume=auto"],
        ["run.dir=unshared"],
        "checkpoint: 'none' on rank 1, 'step_00000002, checksum ",
    ),
    "config": (["run.dir=new"], ["optim.lr=0.3"], "optim.lr: 0.3 on rank 1, 0.1 on rank 0"),
    "schedule": (["run.dir=new"], ["run.eval_every=3"], "run.eval_every: 3 on rank 1, 1 on rank 0"),
    "data": (["run.dir=new"], ["data.val=other.beton"], "data.val: {'count': 64"),
    "weights": (
        ["run.dir=new", "model.init=a/w.safetensors"],
        ["model.init=b/w.safetensors"],
        "weights: '",
    ),
    "missing": (["run.dir=new"], ["data.val=/nowhere.beton"], "/nowhere.beton: no such file"),
    "earlier": (["resume=never"], [], "holds an earlier run"),
}


def start_differently(rank: int, world: int, port: int, data: Path, folder: Path) -> None:
    """Every case in one process group, which must be as good as new after each."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    ranks = connect()
    Run(load_config(None, small(data, Path("runs"), "run.max_steps=2")), ranks).train()
    said = {}
    for name, (both, one, _) in DIFFERENT_RANKS.items():
        words = small(data, Path("runs"), *both)
        if rank == 1:
            words += one
        try:
            Run(load_config(None, words), ranks)
        except ValueError as error:
            said[name] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(said))
    os._exit(0)


@pytest.mark.slow
def test_ranks_that_would_not_train_the_same_run_all_say_why(
    tiny_beton: Path, tmp_path: Path
) -> None:
    noise_beton(tmp_path / "other.beton", seed=3, count=64)
    for folder in ("a", "b"):  # other weights under one name
        (tmp_path / folder).mkdir()
        save_file(plain("cifar_resnet8", 10).state_dict(), tmp_path / folder / "w.safetensors")
    mp.spawn(start_differently, (2, free_port(), tiny_beton, tmp_path), nprocs=2)
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, (_, _, part) in DIFFERENT_RANKS.items():
            assert part in said.get(name, "nothing"), (rank, name)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "unshared").exists()


def start_two(data: Path, runs: Path, *more: str) -> tuple[list[subprocess.Popen], Path]:
    """Two ranks as torchrun starts them, training; and their folder."""
    port = str(free_port())
    argv = [sys.executable, "-m", "fap.cli.train", *small(data, runs, *more)]
    processes = []
    for rank in range(2):
        env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = subprocess.Popen(
            argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
    wait_for_a_record(runs / RUN, *processes)
    return processes, runs / RUN


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_and_ends_all(tiny_beton: Path, tmp_path: Path) -> None:
    processes, folder = start_two(tiny_beton, tmp_path)
    processes[1].send_signal(signal.SIGUSR2)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGUSR2] * 2, said
    last = records(folder)[-1]["step"]
    assert f"saved at step {last}; continue with resume=auto" in said[0]
    assert (folder / "checkpoints" / f"step_{last:08d}.safetensors").is_file()
    assert "Traceback" not in said[0] + said[1]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_sigterm_ends_a_rank_while_another_one_hangs(
    tiny_beton: Path, tmp_path: Path, where: str
) -> None:
    """Rank 1 is stopped at any moment, so rank 0 waits for it in some collective.

    It ends by itself within its patience, which is not that of a save.
    """
    more = []
    if where == "evaluation":  # 48 batches after each step
        more = ["run.eval_batch=2", "optim.clean_batch=64", "method.group_rows=32"]
    processes, _ = start_two(tiny_beton, tmp_path, *more)
    time.sleep(random.uniform(0, 1))
    processes[1].send_signal(signal.SIGSTOP)
    try:
        processes[0].send_signal(signal.SIGTERM)
        said, _ = processes[0].communicate(timeout=session.SAVING_PATIENCE / 2)
        assert processes[0].returncode == 143, said
        assert "SIGTERM, but no progress for" in said
    finally:
        processes[1].kill()
        processes[1].wait()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_at_once(tiny_beton: Path, tmp_path: Path) -> None:
    processes, _ = start_two(tiny_beton, tmp_path)
    processes[1].kill()
    said, _ = processes[0].communicate(timeout=300)
    processes[1].wait()
    assert processes[0].returncode == 1
    assert "fap-train: another rank is gone, its own output says why" in said
    assert "Traceback" not in said


# ------------------------------------------------------------------ the environment


TWO = {"WORLD_SIZE": "2"}
FIRST = TWO | {"RANK": "0"}
MET = FIRST | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "no"}
VARIABLES = (*MET, "LOCAL_RANK")


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (TWO, "WORLD_SIZE is set, but RANK is not: start the ranks with torchrun"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = '' in the environment: must be a whole number >= 1"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE = 'x' in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0' in the environment"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE = '²' in the environment"),
        (TWO | {"RANK": "2"}, "RANK = 2 in the environment: must be below WORLD_SIZE = 2"),
        (TWO | {"RANK": "-1"}, "RANK = '-1' in the environment: must be a whole number >= 0"),
        ({"RANK": "1"}, "RANK = 1 in the environment: must be below WORLD_SIZE = 1"),
        (FIRST, "MASTER_ADDR is not set"),
        (FIRST | {"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        (FIRST | {"LOCAL_RANK": "a"}, "LOCAL_RANK = 'a'"),
    ],
)
def test_an_environment_of_no_rank_is_one_clear_error(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert connect() is ONE_RANK
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        connect()
    assert says in str(error.value)


def test_others_that_are_not_met_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in MET.items():
        monkeypatch.setenv(name, value)
    says = r"rank 0 of 2 did not meet the others at 127\.0\.0\.1:no: "
    with pytest.raises(ConnectionError, match=says):
        connect()


def test_one_rank_agrees_with_itself() -> None:
    ONE_RANK.check_same({"a": 1})
    assert Votes(ONE_RANK).cast(15) == 15
    with pytest.raises(KeyError), ONE_RANK.together():
        raise KeyError
