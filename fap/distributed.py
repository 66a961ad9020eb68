"""Ranks: who we are under torchrun, the step's collectives, and starting and stopping together.

DistributedDataParallel does not fit: its hooks expect one backward in which every parameter takes
part, while a step here has several passes. All gradients are views of one flat buffer, so one
explicit all-reduce after the last pass replaces it.

On GPUs there are two back ends in one group: NCCL for the step's tensors, gloo for what ranks agree
on. The latter are tensors of the host, so that no agreement waits for the device.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fap.layout import image_order, memory_order
from pipelines.files import shown

MOST_DIFFERENCES = 20  # named in one message
MOST_DIGITS = 9  # of a number in the environment


T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One rank of `world`, which all call the same methods in the same order."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on its machine: the number of its GPU

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, wanted: str) -> torch.device:
        """This rank's device for `run.device` = `wanted`.

        Raises ValueError for a GPU that is not there.
        """
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "run.device = 'cuda': torch sees no GPU here; "
                "fap-doctor says why, 'auto' falls back to the CPU"
            )
        if wanted == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK = {self.local_rank}, "
                f"but torch sees {torch.cuda.device_count()} GPU(s) here"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def sum_(self, flat: Tensor) -> None:
        """Sum a flat tensor over all ranks, in place."""
        if self.world > 1 and flat.numel():  # a model without batch norms has no statistics
            dist.all_reduce(flat)

    def gather_rows(
        self,
        rows: Tensor,  # (n, ...) of every rank
    ) -> Tensor:  # (world * n, ...)
        """The rows of all ranks, rank after rank."""
        if self.world == 1:
            return rows
        # Images lie in channels_last; the collective takes them as they lie, without a copy.
        lying = memory_order(rows).contiguous()
        everyones = lying.new_empty(self.world * len(lying), *lying.shape[1:])
        dist.all_gather_into_tensor(everyones, lying)
        return image_order(everyones)

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one. Waits for all.

        For decisions that all must take alike.
        """
        if self.world == 1:
            return flag
        votes = torch.tensor([int(flag)])
        dist.all_reduce(votes)
        return bool(votes)

    def gather(self, fact: Any) -> list[Any]:
        """What every rank says, by rank."""
        facts: list[Any] = [fact] * self.world
        if self.world > 1:
            dist.all_gather_object(facts, fact)
        return facts

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block without collectives that fails on every rank if it fails on one.

        So none waits for another for ever. Raises the block's own error, on the other ranks
        ValueError with its text.
        """
        failure: Exception | None = None
        reason: str | None = None
        try:
            yield
        except Exception as error:
            failure = error
            reason = str(error) or type(error).__name__
        reasons = self.gather(reason)
        if failure is not None:
            raise failure
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise ValueError(f"rank {rank} of {self.world} cannot go on: {reason}")

    def in_turns(self, work: Callable[[], T]) -> T:
        """What `work`, a block without collectives, returns; it fails on all ranks as `together`.

        The first rank works first, then one rank of each other machine, then the rest: what the
        first one downloads the others find in the cache.
        """
        turn = 2
        if self.first:
            turn = 0
        elif self.local_rank == 0:
            turn = 1
        done: list[T] = []
        for now in range(3):
            with self.together():
                if now == turn:
                    done.append(work())
        return done[0]

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise ValueError on every rank, naming each fact in which a rank differs from rank 0."""
        everyone = self.gather(facts)
        first = everyone[0]
        differ = []
        for rank, theirs in enumerate(everyone):
            for name in first.keys() | theirs.keys():
                here = first.get(name)
                there = theirs.get(name)
                if here != there:
                    differ.append(
                        f"  {name}: {shown(there)} on rank {rank}, {shown(here)} on rank 0"
                    )
        if differ:
            raise ValueError(
                "the ranks would not train the same run "
                "(is the run folder or the data not shared?):\n"
                + "\n".join(sorted(differ)[:MOST_DIFFERENCES])
            )


ONE_RANK = Ranks()


class Votes:
    """For which signal do all ranks leave, after the same step?

    A vote is one all-reduce of a number on the host, and it is counted one call later, so that its
    travel (some 100 microseconds) hides behind a step and neither host nor device waits for it. A
    rank that dies closes its connections, so the others' next count raises instead of waiting.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._former: tuple[Tensor, Any] | None = None

    def cast(self, number: int) -> int:
        """The largest `number` of any rank; 0: none.

        Where there are several ranks, it is that of the call before.
        """
        if self.ranks.world == 1:
            return number
        votes = torch.tensor([number])
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True)
        former = self._former
        self._former = (votes, work)
        if former is None:
            return 0
        former_votes, former_work = former
        former_work.wait()
        return int(former_votes)

    def drain(self) -> None:
        """Wait for the vote that is still under way.

        A rank that leaves earlier resets the others' connections.
        """
        if self._former is not None:
            _, work = self._former
            self._former = None
            work.wait()


def lost_a_rank(error: BaseException) -> bool:
    """Is this what a collective raises because another rank is gone?"""
    if isinstance(error, dist.DistError):
        return True
    # gloo has no error of its own; its messages begin with the path of its source.
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)


def connect() -> Ranks:
    """The ranks of this run: those of torchrun's environment, or a single one.

    Raises ValueError for an environment that is no rank's, and ConnectionError if the others are
    not met.
    """
    world = _whole("WORLD_SIZE", 1, least=1)
    if world == 1:
        _whole("RANK", 0, most=0)
        return ONE_RANK
    ranks = Ranks(_whole("RANK", None, most=world - 1), world, _local_rank())
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(
                f"WORLD_SIZE = {world}, but {name} is not set: "
                "start the ranks with torchrun, or set it"
            )
    back_end = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        back_end = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(back_end, rank=ranks.rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = shown(str(error).split("\n")[0])
        raise ConnectionError(
            f"rank {ranks.rank} of {world} did not meet the others at {where}: {reason}"
        ) from error
    return ranks


def _local_rank() -> int:
    several_gpus = torch.cuda.is_available() and torch.cuda.device_count() > 1
    if "LOCAL_RANK" not in os.environ and several_gpus:
        raise ValueError(
            "LOCAL_RANK is not set, so it is unknown which GPU is this rank's: "
            "start the ranks with torchrun"
        )
    return _whole("LOCAL_RANK", 0)


def _whole(name: str, unset: int | None, *, least: int = 0, most: int | None = None) -> int:
    """A whole number of the environment, `unset` where it is not set (None: it must be).

    Raises ValueError for anything else.
    """
    text = os.environ.get(name)
    if text is None:
        if unset is None:
            raise ValueError(
                f"WORLD_SIZE is set, but {name} is not: "
                "start the ranks with torchrun, or unset WORLD_SIZE"
            )
        return unset
    is_whole = text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS
    if not is_whole or int(text) < least:
        raise ValueError(
            f"{name} = {shown(text)} in the environment: must be a whole number >= {least}; "
            "unset it for one process"
        )
    if most is not None and int(text) > most:
        raise ValueError(
            f"{name} = {text} in the environment: must be below WORLD_SIZE = {most + 1}"
        )
    return int(text)


def disconnect() -> None:
    """Leave the group. Secondary by then: a failure is no failure of the run."""
    with contextlib.suppress(Exception):
        if dist.is_initialized():
            dist.destroy_process_group()
