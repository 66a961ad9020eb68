"""Epochs on ranks: what each is fed, and that the shuffle keeps to its scope."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from fap.config import Config, load_config
from fap.distributed import ONE_RANK, Ranks
from fap.nets.build import build
from fap.run.epoch import plan_spec, step_draws
from fap.step.step import Step
from pipelines.plan import EpochPlan, draw_epoch
from tests.run.wiring import adversarial_rows

IMAGES = 144
pytestmark = pytest.mark.usefixtures("one_thread")


class Exchange:
    """What threads that play ranks pass through: everyone's value, in the order of the ranks."""

    def __init__(self, world: int) -> None:
        self.values: list[Tensor] = [torch.empty(0)] * world
        self.barrier = threading.Barrier(world, timeout=60)

    def all_of(self, rank: int, value: Tensor) -> list[Tensor]:
        self.values[rank] = value.clone()
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """A rank that is a thread of this process."""

    exchange: Exchange = field(default_factory=lambda: Exchange(1))

    def sum_(self, flat: Tensor) -> None:
        flat.copy_(torch.stack(self.exchange.all_of(self.rank, flat)).sum(0))

    def gather_rows(self, rows: Tensor) -> Tensor:
        return torch.cat(self.exchange.all_of(self.rank, rows))


MIXED = ("data.mix=either", "data.mix_per=row", "data.mix_on=both")


def ranks_config(shuffle: str, schedule: str, mix: Sequence[str] = ()) -> Config:
    """8 clean and 8 adversarial groups, of 4 and 2 rows."""
    words = [
        "model.name=cifar_resnet8", "model.num_classes=5", "data.size=8", "data.resize=8",
        "data.crop=pad", "optim.lr=0.8", "optim.clean_batch=32", "method.group_rows=4",
        "method.p_adv=1/3", f"method.shuffle={shuffle}", f"method.schedule={schedule}", *mix,
    ]  # fmt: skip
    return load_config(None, words)


def train_on(
    config: Config, ranks: Ranks, plan: EpochPlan, model: torch.nn.Module, out: dict[int, Step]
) -> None:
    """The steps of `plan` in float64 as the loop does them, but for the loader."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (IMAGES, 3, 8, 8), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 5, IMAGES))
    step = Step(model, config, ranks)
    own = plan.for_rank(ranks.rank, ranks.world)
    draws = step_draws(own, config, torch.device("cpu"))
    for k in range(len(own)):
        rows = torch.from_numpy(own.index[k].astype(np.int64))
        step.feed(images[rows], labels[rows], 0.1, **{name: v[k] for name, v in draws.items()})
        step()
    out[ranks.rank] = step


def on_two_ranks(config: Config, plan: EpochPlan, model: torch.nn.Module) -> dict[int, Step]:
    """The same on two ranks, each in a thread."""
    exchange = Exchange(2)
    out: dict[int, Step] = {}
    threads = []
    for rank in range(2):
        ranks = ThreadRanks(rank, 2, rank, exchange)
        arguments = (config, ranks, plan, copy.deepcopy(model), out)
        threads.append(threading.Thread(target=train_on, args=arguments))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["fused", "pipelined"])
@pytest.mark.parametrize("shuffle", ["ranks", "groups"])
@pytest.mark.parametrize("mix", [(), MIXED], ids=["", "mixed"])
def test_two_ranks_shuffle_within_their_scope_and_train_like_one(
    shuffle: str, schedule: str, mix: tuple[str, ...]
) -> None:
    """`ranks`: over all groups. `groups`: inside each rank.

    One rank that executes the same plan gets the same weights.
    """
    config = ranks_config(shuffle, schedule, mix)
    spec = plan_spec(config, Ranks(0, 2))
    in_reach = {"ranks": 8, "groups": 4}
    assert spec.shuffle_groups == in_reach[shuffle]
    sides = np.full(IMAGES, 8)
    plan = draw_epoch(spec, sides, sides, epoch=0)
    crosses = (plan.shuffle // 8) != (np.arange(16) // 8)  # 8 adversarial rows a rank
    assert crosses.any() == (shuffle == "ranks")
    assert ((plan.shuffle // 2) != (np.arange(16) // 2)).all()  # every row leaves its group

    torch.manual_seed(0)
    model = build("cifar_resnet8", 5, size=8).double()
    one: dict[int, Step] = {}
    train_on(config, ONE_RANK, plan, copy.deepcopy(model), one)
    two = on_two_ranks(config, plan, model)
    assert set(two) == {0, 1}
    alone = one[0].network.flat
    weights = alone.param.data
    for step in two.values():
        flat = step.network.flat
        torch.testing.assert_close(flat.param.data, weights, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(flat.stats, alone.stats, rtol=1e-9, atol=1e-12)
    both = torch.cat([adversarial_rows(two[rank]) for rank in range(2)])
    torch.testing.assert_close(both, adversarial_rows(one[0]), rtol=1e-9, atol=1e-9)
    # Without the shuffle the same step trains otherwise, so the above can tell.
    off: dict[int, Step] = {}
    train_on(ranks_config("off", schedule, mix), ONE_RANK, plan, copy.deepcopy(model), off)
    assert (off[0].network.flat.param.data - weights).abs().max() > 1e-6


def test_a_step_is_fed_what_it_reads() -> None:
    """Draws of the mix only where a run mixes; a row per step."""
    sides = np.full(IMAGES, 8)
    for mix, names in (
        ("null", {"shuffle", "noise_key"}),
        ("mixup", {"shuffle", "noise_key", "mix_lam", "mix_box", "mix_partner"}),
    ):
        config = load_config(None, [f"data.mix={mix}", "optim.clean_batch=64", "data.size=8"])
        plan = draw_epoch(plan_spec(config), sides, sides, epoch=0)
        draws = step_draws(plan, config, torch.device("cpu"))
        assert draws.keys() == names
        assert {len(values) for values in draws.values()} == {len(plan)}
