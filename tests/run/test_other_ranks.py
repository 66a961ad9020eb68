"""A run goes on on another number of ranks as on its own, or is refused with the reason.

Sums of floating-point numbers are taken in another order, so the weights agree as far as that
allows: here in float64 to nine digits. What is drawn, shown and counted is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fap.checkpoint import Checkpoints, save
from fap.config import load_config
from fap.run.resume import check_same_groups
from fap.run.train import Run
from fap.run_meta import RunMeta, run_meta
from fap.tasks.classification import Classification
from tests.hostile_meta import valid_meta
from tests.run.runs import assert_same, final_state, records, run, words
from tests.test_distributed import free_port, join

# Four groups of 4 clean and 2 adversarial rows, and 4 steps an epoch; 6 / (4/3) = 4 epochs.
GROUPS = ("method.group_rows=4", "method.p_adv=1/3", "budget.milestones=[3]")
STEPS = 16
PARTS = ((1, 3), (2, 6), (4, 9), (1, STEPS))  # ranks, and the step until which they train


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """New models and inputs; not what a process has made before."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


def train(rank: int, world: int, port: int, settings: list[str]) -> None:
    ranks = join(rank, world, port)
    with in_float64():
        Run(load_config(None, settings), ranks).train()
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    ["pipelined", pytest.param("fused", marks=pytest.mark.soak)],  # the first has a carry too
)
def test_a_run_goes_on_on_more_and_on_fewer_ranks(
    tiny_beton: Path, tmp_path: Path, schedule: str
) -> None:
    method = (*GROUPS, f"method.schedule={schedule}")
    train(0, 1, 0, words(tiny_beton, tmp_path / "whole", *method))
    for world, stop in PARTS:
        more = (*method, "resume=auto", f"run.max_steps={stop}")
        settings = words(tiny_beton, tmp_path / "parts", *more)
        if world == 1:
            train(0, 1, 0, settings)
        else:
            mp.spawn(train, (world, free_port(), settings), nprocs=world)

    whole = tmp_path / "whole" / "fast_advprop" / "seed0"
    parts = tmp_path / "parts" / "fast_advprop" / "seed0"
    expected, meta = newest(whole)
    found, meta_of_parts = newest(parts)
    assert (meta["step"], meta_of_parts["step"]) == (STEPS, STEPS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-11), name
    if schedule == "pipelined":
        assert torch.equal(found["carry.targets"], expected["carry.targets"])
    epochs = [[r for r in records(folder) if "val_top1" in r] for folder in (whole, parts)]
    # Two of the parts end inside an epoch, which evaluates once more.
    closed = [r for r in epochs[1] if r["step"] % 4 == 0]
    for ours, theirs in zip(closed, epochs[0], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-9), name


def newest(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    found = Checkpoints(folder / "checkpoints").newest()
    assert found is not None
    _, tensors, meta = found
    return tensors, meta


def as_if_by_two_ranks(folder: Path) -> None:
    """The newest checkpoint of a run says that two ranks wrote it, which would hold the same."""
    tensors, meta = newest(folder)
    path = folder / "checkpoints" / f"step_{meta['step']:08d}.safetensors"
    save(path, tensors, meta | {"world": 2})


def test_what_a_checkpoint_holds_does_not_depend_on_the_ranks(
    tiny_beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So one rank goes on bit for bit with what two wrote in the same order of sums."""
    method = ("method.schedule=pipelined",)
    whole, _ = run(tiny_beton, tmp_path / "whole", *method)
    folder, _ = run(tiny_beton, tmp_path / "two", *method, "run.max_steps=7")
    as_if_by_two_ranks(folder)
    run(tiny_beton, tmp_path / "two", *method, "resume=auto")
    said = capsys.readouterr().out
    assert "step_00000007.safetensors at step 7, written by 2 ranks" in said
    assert_same(final_state(folder), final_state(whole))


# ---------------------------------------------------------------------- refusals


class WithDropout(Classification):
    """Registered nowhere: tests put its model in the place of the other's."""

    def plain_model(self) -> nn.Module:
        model: Any = super().plain_model()
        model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
        return model


@pytest.mark.parametrize("dropout", [False, True])
def test_a_run_with_dropout_stays_on_its_number_of_ranks(
    tiny_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: bool
) -> None:
    if dropout:
        monkeypatch.setattr("fap.run.train.make_task", WithDropout)
    folder, _ = run(tiny_beton, tmp_path, "run.max_steps=2")
    run(tiny_beton, tmp_path, "run.max_steps=3", "resume=auto")
    assert newest(folder)[1]["dropout"] == dropout
    as_if_by_two_ranks(folder)
    goes_on = contextlib.nullcontext()
    if dropout:
        goes_on = pytest.raises(ValueError, match=r"by 2 ranks, this run has 1: .* has dropout")
    with goes_on:
        run(tiny_beton, tmp_path, "run.max_steps=4", "resume=auto")


def meta_of(world: int, dropout: bool | None, *more: str) -> RunMeta:
    groups = ("optim.clean_batch=32", "method.group_rows=8", "model.num_classes=10")
    config = load_config(None, ["name=x", *groups, *more])
    return run_meta("c", valid_meta(config) | {"world": world, "dropout": dropout})


@pytest.mark.parametrize(
    ("before", "now", "shuffle", "says"),
    [
        (1, 2, "ranks", ""),
        (4, 1, "ranks", ""),
        (2, 4, "off", ""),
        (2, 2, "groups", ""),
        (1, 2, "groups", "written by 1 rank, this run has 2: method.shuffle = 'groups' lets rows"),
        (4, 2, "groups", "rows change places among the groups of one rank, 0 then and 2 now"),
    ],
)
def test_rows_that_stay_on_their_rank_keep_it(
    before: int, now: int, shuffle: str, says: str
) -> None:
    meta = meta_of(before, False, f"method.shuffle={shuffle}")
    refused = contextlib.nullcontext()
    if says:
        refused = pytest.raises(ValueError, match=says)
    with refused:
        check_same_groups(meta, meta.config, now, Path("c"))


def test_an_earlier_versions_checkpoint_says_nothing_of_dropout() -> None:
    meta = meta_of(2, None)
    check_same_groups(meta, meta.config, 2, Path("c"))
    with pytest.raises(
        ValueError, match=r"c was written by 2 ranks.*earlier version.*as many rank"
    ):
        check_same_groups(meta, meta.config, 1, Path("c"))
