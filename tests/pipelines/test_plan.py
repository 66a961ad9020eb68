"""Epoch plans: torchvision's distribution, partition over ranks, shuffles, determinism."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import Resize

from pipelines.plan import PADDING, EpochPlan, draw_epoch, eval_plan
from pipelines.plan_spec import PlanSpec

SPEC = PlanSpec(seed=1, size=32, clean_rows=128, adv_rows=64, shuffle_groups=4)
OF_ROWS = ("index", "window", "place", "flip", "mix_lam", "mix_box")
# The augmentation has a file of its own: augment/test_draws.py.
ARRAYS = [f.name for f in fields(EpochPlan) if f.name not in ("spec", "epoch", "augment")]


def sides(n: int, height: int = 40, width: int = 50) -> tuple[np.ndarray, np.ndarray]:
    return np.full(n, height, np.int32), np.full(n, width, np.int32)


def same(a: EpochPlan, b: EpochPlan) -> dict[str, bool]:
    return {name: np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS}


def measures(windows: np.ndarray) -> dict[str, np.ndarray]:
    top, left, height, width = windows.T
    return {
        "area": height * width,
        "ratio": width / height,
        "top": top,
        "left": left,
        "bottom": top + height,
        "right": left + width,
    }


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["random", (30, 400), (500, 60)])
def test_windows_have_torchvisions_distribution(shape: str | tuple[int, int]) -> None:
    seed = random.SystemRandom().randrange(2**31)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 600, 2).tolist() if shape == "random" else shape
    n = 6000
    image = torch.empty(1, height, width)
    draws = [RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(n)]
    theirs = np.array(draws, float)
    plan = draw_epoch(PlanSpec(seed, 32, n, clean_group_rows=n), *sides(n, height, width), epoch=0)
    ours = plan.window.reshape(n, 4).astype(float)
    expected = measures(theirs)
    for name, values in measures(ours).items():
        found = ks_2samp(values, expected[name], method="asymp")
        # A run has 18 of them: at 1e-6 each, one run in 60,000 would fail by chance.
        assert found.pvalue > 1e-9, (name, height, width, seed)


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=50),
    st.integers(0),
)
@settings(max_examples=50, deadline=None)
def test_windows_lie_inside_any_image(shapes: list[tuple[int, int]], seed: int) -> None:
    heights, widths = np.array(shapes, np.int32).T
    plan = draw_epoch(PlanSpec(seed, 32, len(shapes), clean_group_rows=1), heights, widths, epoch=0)
    top, left, height, width = plan.window[0].T.astype(int)
    assert (np.stack([top, left, height - 1, width - 1]) >= 0).all()
    assert (top + height <= heights[plan.index[0]]).all()
    assert (left + width <= widths[plan.index[0]]).all()


def test_pad_windows_are_uniform() -> None:
    n = 8100
    spec = PlanSpec(2, 32, n, clean_group_rows=n, crop="pad")
    plan = draw_epoch(spec, *sides(n, 32, 32), epoch=0)
    corner = plan.window[0, :, :2] + 4
    assert (plan.window[..., 2:] == 32).all()
    assert chisquare(np.bincount(corner[:, 0] * 9 + corner[:, 1], minlength=81)).pvalue > 1e-6
    assert abs(plan.flip.mean() - 0.5) < 0.03


def test_an_epoch_is_a_permutation_and_drops_the_partial_batch() -> None:
    n = 3 * 192 + 50
    plan = draw_epoch(SPEC, *sides(n), epoch=0)
    assert len(plan) == 3
    assert (plan.n_clean, plan.n_adv) == (128, 64)
    assert len(np.unique(plan.index)) == 3 * 192
    assert plan.index.max() < n
    # Else the same images would be dropped in every epoch.
    assert not np.array_equal(np.sort(plan.index.ravel()), np.arange(3 * 192))


def test_same_key_same_plan_and_other_epochs_and_seeds_differ() -> None:
    spec = replace(SPEC, mix="cutmix")

    def draw(spec: PlanSpec, epoch: int) -> EpochPlan:
        return draw_epoch(spec, *sides(600), epoch)

    assert all(same(draw(spec, 3), draw(spec, 3)).values())
    for other in (draw(spec, 4), draw(replace(spec, seed=2), 3)):
        equal = same(draw(spec, 3), other)
        assert equal.pop("place"), "all of the canvas, without a letterbox"
        assert not any(equal.values())
    # one stream per field: another crop or flip rate leaves the order and the noise alone
    other = same(draw(spec, 3), draw(replace(spec, crop="pad", flip=0.1), 3))
    assert [name for name, equal in other.items() if not equal] == ["window", "flip"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rank_slices_partition_the_epoch(world: int) -> None:
    spec = replace(SPEC, clean_rows=256, mix="either", mix_per="row", mix_on="both")
    plan = draw_epoch(spec, *sides(1000), epoch=0)
    ranks = [plan.for_rank(r, world) for r in range(world)]
    for name in ("index", "window", "place", "flip", "mix_lam", "mix_box"):
        clean = np.concatenate([getattr(p, name)[:, : p.n_clean] for p in ranks], 1)
        adv = np.concatenate([getattr(p, name)[:, p.n_clean :] for p in ranks], 1)
        np.testing.assert_array_equal(np.concatenate([clean, adv], 1), getattr(plan, name))
    np.testing.assert_array_equal(np.concatenate([p.noise_key for p in ranks], 1), plan.noise_key)
    clean = [p.mix_partner[:, : p.n_clean] + r * p.n_clean for r, p in enumerate(ranks)]
    np.testing.assert_array_equal(np.concatenate(clean, 1), plan.mix_partner[:, :256])
    adv = [p.mix_partner[:, p.n_clean :] - p.n_clean + r * p.n_adv for r, p in enumerate(ranks)]
    np.testing.assert_array_equal(np.concatenate(adv, 1), plan.mix_partner[:, 256:] - 256)
    np.testing.assert_array_equal(np.concatenate([p.shuffle for p in ranks], 1), plan.shuffle)
    assert all(p.mix_partner.min() == 0 and p.mix_partner.max() < p.index.shape[1] for p in ranks)


def slow_for_rank(plan: EpochPlan, rank: int, world: int) -> dict[str, list]:
    """What one rank gets of each array, step by step, group by group, row by row."""
    spec = plan.spec
    clean_groups = spec.clean_rows // spec.clean_group_rows
    adv_groups = spec.adv_rows // spec.adv_group_rows
    first_clean = rank * (clean_groups // world) * spec.clean_group_rows
    first_adv = rank * (adv_groups // world) * spec.adv_group_rows
    own: dict[str, list] = {name: [] for name in ARRAYS}
    for step in range(len(plan)):
        row: dict[str, list] = {name: [] for name in ARRAYS}
        loaded = []
        for place in range(first_clean, first_clean + spec.clean_rows // world):
            loaded.append(place)
            row["mix_partner"].append(plan.mix_partner[step, place] - first_clean)
        for place in range(first_adv, first_adv + spec.adv_rows // world):
            if not spec.adv_are_copies:
                loaded.append(spec.clean_rows + place)
                partner = plan.mix_partner[step, spec.clean_rows + place] - spec.clean_rows
                row["mix_partner"].append(spec.clean_rows // world + partner - first_adv)
            source = plan.shuffle[step, place]
            # All groups are one scope: rows come from all ranks, in their numbers.
            if spec.shuffle_groups != adv_groups:
                source -= first_adv
            row["shuffle"].append(source)
        for place in loaded:
            for name in OF_ROWS:
                if name in ("mix_lam", "mix_box") and spec.mix_per == "batch":
                    continue
                row[name].append(getattr(plan, name)[step, place])
        for group in range(adv_groups // world):
            row["noise_key"].append(plan.noise_key[step, rank * (adv_groups // world) + group])
        for name in ARRAYS:
            # The same on every rank.
            whole = name in ("mix_lam", "mix_box") and spec.mix_per == "batch"
            own[name].append(getattr(plan, name)[step] if whole else row[name])
    return own


@pytest.mark.parametrize("scope", ["off", "one rank", "all ranks"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_rank_gets_all_it_needs_as_in_plain_loops(world: int, scope: str) -> None:
    seed = random.SystemRandom().randrange(2**31)
    rng = np.random.default_rng(seed)
    groups_of_a_rank = int(rng.integers(1, 4))
    groups = groups_of_a_rank * world
    clean_group_rows = int(rng.integers(1, 6))
    adv_group_rows = int(rng.integers(1, 5))
    copies = bool(rng.integers(2))
    spec = PlanSpec(
        seed=seed,
        size=32,
        crop="letterbox",
        jitter=(0.5, 2.0),
        clean_rows=groups * clean_group_rows,
        clean_group_rows=clean_group_rows,
        adv_rows=groups * adv_group_rows,
        adv_group_rows=adv_group_rows,
        adv_are_copies=copies,
        mix=["mixup", "cutmix", "either"][rng.integers(3)],  # type: ignore[arg-type]
        mix_per=["batch", "row"][rng.integers(2)],  # type: ignore[arg-type]
        mix_on="both" if copies else ["clean", "adv", "both"][rng.integers(3)],  # type: ignore[arg-type]
        shuffle_groups={"off": 0, "one rank": groups_of_a_rank, "all ranks": groups}[scope],
    )
    plan = draw_epoch(spec, *sides(3 * spec.loaded_rows), epoch=0)
    gathered = np.arange(spec.adv_rows)  # adversarial rows of all ranks, one after the other
    for rank in range(world):
        own = plan.for_rank(rank, world)
        slow = slow_for_rank(plan, rank, world)
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(own, name), slow[name], str((name, rank, spec)))
        # As the step uses it: the rows of all ranks, or this rank's alone.
        rows = gathered
        if scope != "all ranks":
            rows = np.split(gathered, world)[rank]
        mine = slice(rank * own.n_adv, (rank + 1) * own.n_adv)
        np.testing.assert_array_equal(rows[own.shuffle], plan.shuffle[:, mine])


def test_a_scope_that_ends_inside_a_rank_is_numbered_over_all_ranks() -> None:
    spec = replace(SPEC, clean_rows=64 * 8, adv_rows=16 * 8, shuffle_groups=3)
    assert not spec.shuffles_within_ranks(2)
    assert not replace(spec, shuffle_groups=8).shuffles_within_ranks(2)
    for groups in (0, 1, 2, 4):
        assert replace(spec, shuffle_groups=groups).shuffles_within_ranks(2)
    plan = draw_epoch(spec, *sides(640), epoch=0)
    both = [plan.for_rank(rank, 2).shuffle for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate(both, 1), plan.shuffle)


def test_groups_that_do_not_divide_among_ranks_are_refused() -> None:
    plan = draw_epoch(SPEC, *sides(200), epoch=0)
    with pytest.raises(ValueError, match="2 clean and 4 adversarial groups"):
        plan.for_rank(0, 4)


@pytest.mark.parametrize("groups", [3, 4, 5, 8])
def test_every_row_leaves_its_group_in_equal_shares(groups: int) -> None:
    spec = replace(SPEC, clean_rows=64, adv_rows=16 * groups, shuffle_groups=groups)
    shuffle = draw_epoch(spec, *sides(2 * (64 + 16 * groups)), epoch=0).shuffle
    assert not np.array_equal(shuffle[0], shuffle[1])
    for rows in shuffle:
        assert sorted(rows) == list(range(16 * groups))
        source = rows.reshape(groups, 16) // 16
        for group, origin in enumerate(source):
            share = np.delete(np.bincount(origin, minlength=groups), group)
            assert (origin != group).all()
            assert share.max() - share.min() <= 1


def test_shuffle_of_two_groups_of_a_short_block_and_of_none() -> None:
    two = draw_epoch(replace(SPEC, adv_rows=32, shuffle_groups=2), *sides(400), epoch=0).shuffle[0]
    assert np.bincount(two[:16] // 16).tolist() == [8, 8]
    block = draw_epoch(replace(SPEC, shuffle_groups=3), *sides(400), epoch=0).shuffle[0]
    assert set(block[:48]) == set(range(48))
    assert set(block[48:]) == set(range(48, 64))
    for none in (0, 1):
        identity = draw_epoch(replace(SPEC, shuffle_groups=none), *sides(400), epoch=0).shuffle
        assert (identity == np.arange(64)).all()


def test_mix_stays_in_its_group_and_lambda_is_the_area_of_the_box() -> None:
    plan = draw_epoch(replace(SPEC, mix="cutmix"), *sides(192 * 40), epoch=0)
    groups = GROUPS
    assert (groups[plan.mix_partner] == groups).all()
    assert (np.sort(plan.mix_partner, 1) == np.arange(192)).all()
    assert (plan.mix_partner[:, 128:] == np.arange(128, 192)).all(), "clean rows only"
    top, left, bottom, right = plan.mix_box.T
    assert plan.mix_box.min() >= 0
    assert plan.mix_box.max() <= 32
    np.testing.assert_allclose(plan.mix_lam, 1 - (bottom - top) * (right - left) / 32**2, rtol=1e-6)
    assert plan.mix_lam.std() > 0.1
    plain = draw_epoch(SPEC, *sides(192), epoch=0)
    assert (plain.mix_lam == 1).all()
    assert (plain.mix_partner == np.arange(192)).all()
    assert plain.mix_partner.strides[0] == 0, "no memory where nothing is mixed"


# Of the rows of SPEC: two clean groups of 64, then four adversarial ones of 16.
GROUPS = np.concatenate([np.arange(128) // 64, 2 + np.arange(64) // 16])


def mixed_plan(mix: str, per: str, on: str, steps: int = 40, **more: float) -> EpochPlan:
    spec = replace(SPEC, mix=mix, mix_per=per, mix_on=on, **more)  # type: ignore[arg-type]
    return draw_epoch(spec, *sides(192 * steps), epoch=0)


@pytest.mark.parametrize("per", ["batch", "row"])
@pytest.mark.parametrize("mix", ["mixup", "cutmix", "either"])
def test_any_partition_is_mixed_in_its_own_groups(mix: str, per: str) -> None:
    plans = {on: mixed_plan(mix, per, on) for on in ("clean", "adv", "both")}
    own = np.arange(192)
    for on, plan in plans.items():
        moved = (plan.mix_partner != own).any(0)
        assert moved[:128].all() == (on != "adv")
        assert moved[128:].all() == (on != "clean")
        assert moved[:128].any() == (on != "adv")
        assert moved[128:].any() == (on != "clean")
        assert (GROUPS[plan.mix_partner] == GROUPS).all()
        assert (np.sort(plan.mix_partner, 1) == own).all()
        shape = (40,) if per == "batch" else (40, 192)
        assert plan.mix_lam.shape == shape
        assert plan.mix_box.shape == (*shape, 4)
        if per == "row":
            still = ~moved
            assert (plan.mix_lam[:, still] == 1).all()
            assert not plan.mix_box[:, still].any()
            assert (plan.mix_lam[:, moved].std(0) > 0.05).all(), "rows have shares of their own"
    # Mixing the adversarial rows too leaves the clean ones' draws as they are.
    for name in ("mix_partner", "mix_lam", "mix_box"):
        if per == "row" or name == "mix_partner":
            one = getattr(plans["clean"], name)[:, :128]
            np.testing.assert_array_equal(one, getattr(plans["both"], name)[:, :128])
            other = getattr(plans["adv"], name)[:, 128:]
            np.testing.assert_array_equal(other, getattr(plans["both"], name)[:, 128:])
        else:
            for on in ("adv", "both"):
                np.testing.assert_array_equal(
                    getattr(plans["clean"], name), getattr(plans[on], name)
                )


@pytest.mark.parametrize("per", ["batch", "row"])
def test_either_is_each_of_the_two_half_of_the_time(per: str) -> None:
    """With alphas of their own: 100 gives shares near 1/2, 0.02 near 0 or 1."""
    steps = 2000 if per == "batch" else 20
    plan = mixed_plan("either", per, "both", steps, mix_alpha=100.0, cutmix_alpha=0.02)
    box = plan.mix_box.reshape(-1, 4)
    lam = plan.mix_lam.reshape(-1)
    top, left, bottom, right = box.T
    area = (bottom - top) * (right - left) / 32**2
    near_half = (lam > 0.3) & (lam < 0.7) & (area == 0)
    assert abs(near_half.mean() - 0.5) < 0.05
    # CutMix: its share is what the box leaves, 1 where the box is empty.
    np.testing.assert_allclose(lam[~near_half], 1 - area[~near_half], rtol=1e-6)
    other = mixed_plan("either", per, "both", steps, mix_alpha=0.02, cutmix_alpha=0.02)
    of_mixup = other.mix_lam[~other.mix_box.any(-1)]
    assert (abs(of_mixup - 0.5) < 0.2).mean() < 0.1


def test_copies_are_those_of_mixed_rows() -> None:
    copies = replace(SPEC, adv_rows=128, adv_group_rows=64, adv_are_copies=True)
    with pytest.raises(ValueError, match="mix_on = 'clean' with adv_are_copies: must be 'both'"):
        replace(copies, mix="mixup")
    plan = draw_epoch(replace(copies, mix="mixup", mix_on="both"), *sides(128 * 3), epoch=0)
    alone = draw_epoch(PlanSpec(1, 32, 128, mix="mixup"), *sides(128 * 3), epoch=0)
    for name in ("mix_lam", "mix_partner"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(alone, name))


def test_evaluation_sees_every_image_once_in_order() -> None:
    heights, widths = np.random.default_rng(0).integers(20, 500, (2, 45)).astype(np.int32)
    plan = eval_plan(heights, widths, size=224, resize=256, batch=20)
    flat = plan.index.ravel()
    np.testing.assert_array_equal(flat[:45], np.arange(45))
    assert (flat[45:] == PADDING).all()
    assert not plan.flip.any()
    assert plan.spec.filter == "bilinear"
    for row, (height, width) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        assert plan.window.reshape(-1, 4)[row].tolist() == [0, 0, height, width]
        # As torchvision's Resize and CenterCrop compute it.
        picture = Resize(256)(Image.new("L", (width, height)))
        top = round((picture.height - 224) / 2.0)
        left = round((picture.width - 224) / 2.0)
        place = [-top, -left, picture.height, picture.width]
        assert plan.place.reshape(-1, 4)[row].tolist() == place
    parts = [plan.for_rank(r, 4).index for r in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), plan.index)
    whole = eval_plan(*sides(3, 32, 32), size=32, resize=32, batch=2)
    assert whole.window.reshape(-1, 4)[:3].tolist() == [[0, 0, 32, 32]] * 3
    assert whole.place.reshape(-1, 4)[:3].tolist() == [[0, 0, 32, 32]] * 3


def test_places_of_extreme_images_are_whole_or_refused() -> None:
    """One pixel high, 32767 wide: 8 million pixels once it is 256 high."""
    heights, widths = np.array([[1, 32767], [32767, 1]], np.int32)
    plan = eval_plan(heights, widths, size=224, resize=256, batch=2)
    wide = 256 * 32767
    left = round((wide - 224) / 2)
    assert plan.place[0].tolist() == [[-16, -left, 256, wide], [-left, -16, wide, 256]]
    message = "resize = 65539: an image of 1 x 32767 pixels would be resized to 65539 x 2147516413"
    with pytest.raises(ValueError, match=message):
        eval_plan(heights, widths, size=224, resize=65539, batch=2)


def test_places_that_are_the_whole_canvas_take_no_memory() -> None:
    for crop in ("random_resized", "pad"):
        plan = draw_epoch(replace(SPEC, crop=crop), *sides(5000), epoch=0)
        for part in (plan, plan.for_rank(1, 2)):
            assert part.place.shape == (*part.index.shape, 4)
            assert part.place.strides[:2] == (0, 0)
            assert (part.place == [0, 0, 32, 32]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean_rows": 100}, "clean_rows = 100: must be a multiple of clean_group_rows = 64"),
        ({"adv_rows": 8}, "adv_rows = 8"),
        ({"size": 0}, "size = 0: must be at least 1"),
        ({"scale": (0.5, 1.5)}, "scale = "),
        ({"crop": "middle"}, "crop = 'middle'"),
        ({"mix": "blend"}, "mix = 'blend': unknown"),
        ({"mix_per": "group"}, "mix_per = 'group': must be one of batch, row"),
        ({"mix_on": "noise"}, "mix_on = 'noise': must be one of clean, adv, both"),
        ({"filter": "box"}, "filter = 'box': must be one of area, bilinear, bicubic"),
        (
            {"crop": "center"},
            "filter = 'area' with crop = 'center': must be 'bilinear' or 'bicubic'",
        ),
        ({"crop": "center", "filter": "bilinear"}, "training plans take"),
        ({"crop": "pad", "size": 64}, "size = 64"),
        ({"clean_rows": 1024}, "the data hold only 500 images"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        draw_epoch(replace(SPEC, **change), *sides(500), epoch=0)  # type: ignore[arg-type]


def test_every_step_and_group_has_a_noise_key_of_its_own() -> None:
    """Constant keys would start every attack of an epoch at the same noise."""
    keys = draw_epoch(SPEC, *sides(192 * 40), epoch=0).noise_key
    assert keys.shape == (40, 4)
    assert len(np.unique(keys)) == keys.size
    assert keys.min() >= 0
