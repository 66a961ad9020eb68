"""What is drawn has torchvision's distribution, and depends on nothing but seed and epoch."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, ks_2samp
from torchvision.transforms import ColorJitter, RandomErasing

from pipelines.augment.draws import AugmentDraws
from pipelines.augment.policies import CHAIN_DEPTH, CHAINS, SIGNED, SPACES, Op, Policy, magnitudes
from pipelines.augment.spec import AugmentSpec, magnitude_range
from pipelines.plan import EpochPlan, draw_epoch, eval_plan
from pipelines.plan_spec import PlanSpec
from tests.pipelines.augment.twin import SEED, TORCHVISION, name_of

ROWS = 3000
LEAST_P = 1e-9  # of a test: by chance one run in millions
ARRAYS = [field.name for field in fields(AugmentDraws)]
EVERYTHING = AugmentSpec("randaugment", color_jitter=(0.4, 0.3, 0.2, 0.1), erase=0.5)


def plan_of(
    spec: AugmentSpec, *, rows: int = ROWS, seed: int = SEED, epoch: int = 0, **more: object
) -> EpochPlan:
    clean = {"clean_rows": rows, "clean_group_rows": rows}
    sides = np.full(2 * rows, 40, np.int32)
    made = PlanSpec(seed, 32, augment=spec, **clean | more)  # type: ignore[arg-type]
    return draw_epoch(made, sides, sides, epoch)


def theirs(policy: Policy, n: int, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple]]:
    """The names and magnitudes that torchvision draws for n images."""
    transform = TORCHVISION[policy]
    seen: list[list[tuple]] = []

    def noted(image: torch.Tensor, name: str, magnitude: float, **_: object) -> torch.Tensor:
        if name != "Identity":
            seen[-1].append((name, round(magnitude, 5)))
        return image

    monkeypatch.setattr(transform, "_apply_image_or_video_transform", noted)
    torch.manual_seed(SEED)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    for _ in range(n):
        seen.append([])
        transform(image)
    return seen


def ours(policy: Policy, plan: EpochPlan) -> list[list[tuple]]:
    """The same, of a plan."""
    table = magnitudes(policy, 32, 32)
    found = []
    draws = plan.augment
    n_ops = draws.op.shape[2]
    pairs = zip(draws.op.reshape(-1, n_ops), draws.level.reshape(-1, n_ops), strict=True)
    for ops, levels in pairs:
        row = []
        for op, level in zip(ops.tolist(), levels.tolist(), strict=True):
            if op != Op.IDENTITY:
                magnitude = float(np.copysign(table[op, abs(level)].item(), level or 1))
                row.append((name_of(Op(op)), round(magnitude, 5)))
        found.append(row)
    return found


def assert_same_frequencies(a: list, b: list) -> None:
    """Chi-square of two samples; what is rare is put together."""
    counts = Counter(a), Counter(b)
    common = [key for key in counts[0] | counts[1] if counts[0][key] + counts[1][key] >= 20]
    table = [[count[key] for key in common] for count in counts]
    for row, sample in zip(table, (a, b), strict=True):
        row.append(len(sample) - sum(row) + 1)
    assert chi2_contingency(table).pvalue > LEAST_P, (table, common, SEED)


@pytest.mark.parametrize("policy", TORCHVISION)
def test_operations_and_magnitudes_are_torchvisions_by_distribution(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = AugmentSpec(policy, magnitude=3 if policy == "augmix" else 9)
    found = ours(policy, plan_of(spec))
    wanted = theirs(policy, ROWS, monkeypatch)
    # Translations are cut to whole pixels there only when they act.
    wanted = [[(n, float(int(m)) if "Trans" in n else m) for n, m in row] for row in wanted]
    wanted = [[(n, m + 0.0) for n, m in row] for row in wanted]
    found = [[(n, m + 0.0) for n, m in row] for row in found]
    assert_same_frequencies([len(row) for row in found], [len(row) for row in wanted])
    assert_same_frequencies(sum(found, []), sum(wanted, []))  # noqa: RUF017
    if policy in ("randaugment", "autoaugment"):
        pairs = [tuple(n for n, _ in row) for row in found]
        assert_same_frequencies(pairs, [tuple(n for n, _ in row) for row in wanted])


def test_augmix_mixes_in_torchvisions_shares() -> None:
    share = plan_of(AugmentSpec("augmix", magnitude=3)).augment.share.reshape(-1, 1 + CHAINS)
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-6)
    assert share.min() >= 0
    torch.manual_seed(SEED)
    own = torch._sample_dirichlet(torch.ones(ROWS, 2))
    chains = torch._sample_dirichlet(torch.ones(ROWS, CHAINS)) * own[:, 1:]
    for column, wanted in enumerate(torch.cat([own[:, :1], chains], 1).T):
        assert ks_2samp(share[:, column], wanted.numpy()).pvalue > LEAST_P, (column, SEED)


def test_chains_are_one_to_three_operations_deep() -> None:
    op = plan_of(AugmentSpec("augmix", magnitude=3)).augment.op.reshape(-1, CHAIN_DEPTH)
    depth = (op != Op.IDENTITY).sum(1)
    assert set(depth) == {1, 2, 3}
    assert_same_frequencies(depth.tolist(), [1, 2, 3] * ROWS)
    # What is left out is at the end.
    assert ((op != Op.IDENTITY) == (np.arange(3) < depth[:, None])).all()


def test_signs_are_those_of_operations_with_two_ways() -> None:
    draws = plan_of(AugmentSpec("trivialaugment")).augment
    signed = np.isin(draws.op, list(SIGNED))
    assert (draws.level[~signed] >= 0).all()
    assert (draws.level[signed] < 0).mean() == pytest.approx(0.5, abs=0.1)
    assert np.abs(draws.level).max() == 30


def test_colours_are_torchvisions_by_distribution() -> None:
    spec = AugmentSpec(color_jitter=(0.4, 1.5, 0.2, 0.1))
    draws = plan_of(spec).augment
    jitter = ColorJitter(0.4, 1.5, 0.2, 0.1)
    torch.manual_seed(SEED)
    drawn = [
        ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(ROWS)
    ]
    for kind in range(4):
        values = draws.colour[..., kind].ravel()
        wanted = [one[1 + kind] for one in drawn]
        assert ks_2samp(values, wanted).pvalue > LEAST_P, (kind, SEED)
    assert draws.colour[..., 1].min() >= 0
    orders = [tuple(order) for order in draws.colour_order.reshape(-1, 4).tolist()]
    assert_same_frequencies(orders, [tuple(one[0].tolist()) for one in drawn])


def test_boxes_are_torchvisions_by_distribution() -> None:
    draws = plan_of(AugmentSpec(erase=0.25)).augment
    top, left, bottom, right = draws.erase_box.reshape(-1, 4).T.astype(int)
    erased = bottom > top
    assert erased.mean() == pytest.approx(0.25, abs=0.06)
    torch.manual_seed(SEED)
    image = torch.zeros(3, 32, 32)
    params = [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0]) for _ in range(ROWS)]
    t, l, h, w = np.array([one[:4] for one in params]).T  # noqa: E741
    for values, wanted in ((top, t), (left, l), (bottom - top, h), (right - left, w)):
        found = ks_2samp(values[erased], wanted, method="asymp")
        assert found.pvalue > LEAST_P, SEED
    assert (top >= 0).all() and (left >= 0).all()
    assert bottom.max() <= 32 and right.max() <= 32
    keys = draws.erase_key.ravel()
    assert len(np.unique(keys)) > 0.99 * len(keys)


# ---------------------------------------------------------------------- as part of the plan


def same(a: AugmentDraws, b: AugmentDraws) -> list[str]:
    return [name for name in ARRAYS if np.array_equal(getattr(a, name), getattr(b, name))]


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    mixed = replace(EVERYTHING, policy="augmix")
    for spec in (EVERYTHING, mixed):
        one = plan_of(spec, rows=300, epoch=3).augment
        assert same(one, plan_of(spec, rows=300, epoch=3).augment) == ARRAYS
        # Of randaugment the bin is always the same, and nothing is shared.
        levels = {"share"} if spec is EVERYTHING else set[str]()
        for change in ({"epoch": 4}, {"epoch": 3, "seed": SEED + 1}):
            other = plan_of(spec, rows=300, **change).augment  # type: ignore[arg-type]
            assert set(same(one, other)) == levels
    # One stream for each part: it does not depend on the others.
    alone = plan_of(replace(EVERYTHING, policy=None, erase=0), rows=300, epoch=3).augment
    both = plan_of(EVERYTHING, rows=300, epoch=3).augment
    assert {"colour", "colour_order"} <= set(same(alone, both))


def test_the_rest_of_a_plan_is_as_without_augmentation() -> None:
    with_it = plan_of(EVERYTHING, rows=100)
    without = plan_of(AugmentSpec(), rows=100)
    for field in fields(EpochPlan):
        if field.name not in ("spec", "epoch", "augment"):
            ours, theirs = getattr(with_it, field.name), getattr(without, field.name)
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("policy", ["randaugment", "augmix"])
def test_ranks_get_the_draws_of_their_rows(policy: Policy) -> None:
    spec = replace(EVERYTHING, policy=policy)
    groups = {"clean_rows": 24, "clean_group_rows": 4, "adv_rows": 12, "adv_group_rows": 2}
    plan = plan_of(spec, rows=200, **groups)
    for world in (1, 2, 3):
        ranks = [plan.for_rank(rank, world) for rank in range(world)]
        for name in ARRAYS:
            parts = [getattr(rank.augment, name) for rank in ranks]
            clean = [part[:, : 24 // world] for part in parts]
            adv = [part[:, 24 // world :] for part in parts]
            whole = np.concatenate([*clean, *adv], 1)
            np.testing.assert_array_equal(whole, getattr(plan.augment, name))


@pytest.mark.parametrize("policy", ["randaugment", "augmix"])
def test_one_partition_gets_what_it_gets_beside_the_other(policy: Policy) -> None:
    groups = {"clean_rows": 200, "clean_group_rows": 100, "adv_rows": 100, "adv_group_rows": 50}
    spec = replace(EVERYTHING, policy=policy)
    both = plan_of(spec, rows=200, **groups).augment
    for on, kept, left in (
        ("clean", slice(200), slice(200, 300)),
        ("adv", slice(200, 300), slice(200)),
    ):
        part = plan_of(replace(spec, on=on), rows=200, **groups).augment  # type: ignore[arg-type]
        for name in ARRAYS:
            found, wanted = getattr(part, name), getattr(both, name)
            np.testing.assert_array_equal(found[:, kept], wanted[:, kept])
        assert not part.op[:, left].any()
        assert not part.erase_box[:, left].any()
        assert (part.colour[:, left] == [1, 1, 1, 0]).all()
        assert (part.share[:, left, 1:] == 0).all()


def test_what_is_not_used_takes_no_memory() -> None:
    plain = plan_of(AugmentSpec()).augment
    evaluation = eval_plan(*np.full((2, 50), 40), size=32, resize=36, batch=7).augment
    for draws in (plain, evaluation):
        assert sum(getattr(draws, name).nbytes for name in ARRAYS) == 0
    # Of 1.28 million images a plan of 34 bytes a row has 44 MB.
    for spec, most in (
        (AugmentSpec("randaugment"), 4),
        (AugmentSpec("augmix"), 34),
        (AugmentSpec(color_jitter=(1, 1, 1, 0.1)), 20),
        (AugmentSpec(erase=0.1), 12),
    ):
        draws = plan_of(spec).augment
        assert sum(getattr(draws, name).nbytes for name in ARRAYS) == most * 2 * ROWS


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "fastaugment"}, "policy = 'fastaugment': must be one of randaugment, "),
        ({"n_ops": 0}, "n_ops = 0: must be from 1 to 10"),
        ({"policy": "randaugment", "magnitude": 31}, "magnitude = 31: must be from 0 to 30"),
        ({"policy": "augmix", "magnitude": 0}, "magnitude = 0: must be from 1 to 10"),
        ({"erase": 1.5}, "erase = 1.5"),
        ({"color_jitter": (0, 0, 0, 0)}, "color_jitter = (0, 0, 0, 0)"),
        ({"color_jitter": (0.1, 0, 0, 0.6)}, "hue at most 0.5"),
        ({"on": "noise"}, "on = 'noise'"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        AugmentSpec(**change)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_a_plan_refuses_what_has_no_meaning() -> None:
    letterbox = {"crop": "letterbox", "size": (32, 48), "clean_rows": 64}
    for spec in (AugmentSpec("trivialaugment"), AugmentSpec(erase=0.1)):
        with pytest.raises(ValueError, match="boxes do not follow"):
            PlanSpec(0, augment=spec, **letterbox)  # type: ignore[arg-type]
    PlanSpec(0, augment=AugmentSpec(color_jitter=(0.1, 0, 0, 0)), **letterbox)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no adversarial rows are loaded"):
        PlanSpec(0, 32, 64, augment=AugmentSpec(erase=0.1, on="adv"))


def test_magnitudes_count_bins() -> None:
    assert magnitude_range("randaugment") == (0, SPACES["randaugment"].bins - 1)
    assert magnitude_range("augmix") == (1, SPACES["augmix"].bins)
