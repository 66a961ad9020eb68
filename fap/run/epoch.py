"""One epoch as a rank meets it: its part of the plan, drawn ahead, and what its steps are fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import pipelines
from fap.config import Config
from fap.distributed import ONE_RANK, Ranks
from fap.sections import DataConfig
from fap.tasks.base import Task
from pipelines.ahead import run_ahead
from pipelines.augment.spec import AugmentSpec
from pipelines.sizes import Size

# Fields of the config's data that the plan's spec has under the same name.
AUGMENTATION = {"size", "crop", "scale", "ratio", "pad", "jitter", "flip"}
ORDER = {"sampling", "repeats"}
MIX = {"mix", "mix_alpha", "cutmix_alpha", "mix_per", "mix_on"}
# Fields of a plan that the step's inputs have under the same name, a row per step.
DRAWS = ("shuffle", "noise_key")
MIX_DRAWS = ("mix_lam", "mix_box", "mix_partner")
LETTERBOX_DRAWS = ("place",)  # elsewhere every picture fills the canvas
AHEAD = 2  # plans: the one in use, and the next one


def augment_spec(data: DataConfig) -> AugmentSpec:
    """What is done to the pixels of the loaded rows."""
    of_policy = {"n_ops": data.shown_ops, "magnitude": data.shown_magnitude}
    return AugmentSpec(
        policy=data.augment,
        color_jitter=data.color_jitter,
        erase=data.erase,
        on=data.augment_on,
        **{name: value for name, value in of_policy.items() if value is not None},
    )


def plan_spec(
    config: Config,
    ranks: Ranks = ONE_RANK,
    size: Size | None = None,  # of training, where it is not data.size
) -> pipelines.PlanSpec:
    """The plan of a run: rows of one step over all ranks, groups, augmentation, shuffle."""
    method = config.method
    clean_rows = config.optim.clean_batch
    n_groups = 0
    if method.adv_group_rows:
        n_groups = clean_rows // method.group_rows
    match method.shuffle:
        case "ranks":
            shuffle_groups = n_groups
        case "groups":
            shuffle_groups = n_groups // ranks.world
        case _:
            shuffle_groups = 0
    of_data = config.data.model_dump(include=ORDER | AUGMENTATION | MIX)
    if size is not None:
        of_data["size"] = size
    return pipelines.PlanSpec(
        **of_data,
        augment=augment_spec(config.data),
        filter=config.data.shown_filter,
        seed=config.seed,
        clean_rows=clean_rows,
        adv_rows=n_groups * method.adv_group_rows,
        clean_group_rows=method.group_rows,
        adv_group_rows=method.adv_group_rows or 1,
        adv_are_copies=method.entry.attacked == "copies",
        shuffle_groups=shuffle_groups,
    )


def check_sizes(config: Config, ranks: Ranks) -> None:
    """Raise ValueError for a size of training that no plan takes, before one is drawn."""
    for _, size in config.data.sizes or ():
        try:
            plan_spec(config, ranks, size)
        except ValueError as error:
            raise ValueError(f"data.sizes: {error}") from None


@dataclass(frozen=True)
class Epoch:
    """What the steps of an epoch need on one rank, a row per step."""

    plan: pipelines.EpochPlan  # this rank's part, for the loader
    targets: Tensor  # (steps, B, ...), on the device
    draws: dict[str, Tensor]  # (steps, ...), on the device, by the names of the step's inputs

    @property
    def number(self) -> int:
        return self.plan.epoch

    def draws_of(self, row: int) -> dict[str, Tensor]:
        """What the plan drew for one step."""
        return {name: values[row] for name, values in self.draws.items()}


def epochs(
    config: Config,
    ranks: Ranks,
    train: pipelines.Store,
    task: Task,
    device: torch.device,
    numbers: range,
    size: Size | None = None,  # of training, where it is not data.size
) -> Iterator[Epoch]:
    """This rank's epochs of these numbers. The next one's plan is drawn while one is trained."""
    spec = plan_spec(config, ranks, size)

    def drawing(number: int) -> Callable[[], pipelines.EpochPlan]:
        def draw() -> pipelines.EpochPlan:
            return pipelines.draw_epoch(spec, train.heights, train.widths, number, train.labels)

        return draw

    calls = (drawing(number) for number in numbers)
    for whole in run_ahead(calls, threads=1, ahead=AHEAD):
        plan = whole.for_rank(ranks.rank, ranks.world)
        # Once per epoch: no step waits for a copy to the device.
        targets = task.targets(train, plan).to(device)
        yield Epoch(plan, targets, step_draws(plan, config, device))


def step_draws(
    plan: pipelines.EpochPlan,  # of this rank
    config: Config,
    device: torch.device,
) -> dict[str, Tensor]:
    """The plan's draws for the step, on the device: (steps, ...) by the names of the inputs."""
    names = [*DRAWS]
    if config.data.mix is not None:
        names += MIX_DRAWS
    if config.data.crop == "letterbox":
        names += LETTERBOX_DRAWS
    draws: dict[str, Tensor] = {}
    for name in names:
        # A copy: what the plan has may be a read-only view, which torch does not take.
        draws[name] = torch.from_numpy(getattr(plan, name).copy()).to(device)
    return draws
