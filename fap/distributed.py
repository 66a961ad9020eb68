"""Ranks: who we are under torchrun, and the three collectives the step needs.

DistributedDataParallel does not fit: its hooks expect one backward in which every parameter takes part, while
a step here has several passes. All gradients are views of one flat buffer, so one explicit all-reduce after
the last pass replaces it.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fap.layout import image_order, memory_order


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, wanted: str) -> torch.device:
        """This rank's device for `run.device` = `wanted`. Raises ValueError for a GPU that is not there."""
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ValueError("run.device = 'cuda': torch sees no GPU here; fap-doctor says why, 'auto' falls back to the CPU")
        return torch.device("cuda", self.local_rank) if wanted != "cpu" and torch.cuda.is_available() else torch.device("cpu")

    def sum_(self, flat: Tensor) -> None:
        """Sum a flat tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(flat)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(n, ...) of every rank -> (world * n, ...), rank after rank."""
        if self.world == 1:
            return rows
        last = memory_order(rows)
        out = last.new_empty(self.world * len(last), *last.shape[1:])
        dist.all_gather_into_tensor(out, last.contiguous())
        return image_order(out)

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one: for decisions that all must take alike."""
        if self.world == 1:  # asked after every step
            return flag
        votes = torch.tensor([float(flag)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
        self.sum_(votes)
        return bool(votes)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


ONE_RANK = Ranks()


def connect(device_type: str) -> Ranks:
    """The ranks of this run: those of torchrun's environment, or a single one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ONE_RANK
    ranks = Ranks(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))
    if device_type == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return ranks


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
