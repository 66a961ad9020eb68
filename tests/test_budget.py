from fractions import Fraction
from pathlib import Path

import pytest

from fap.budget import budget, cost_per_image
from fap.config import load_config, make_config

IMAGENET = 1_281_167


@pytest.mark.parametrize(
    ("method", "epochs", "milestones"),
    [
        ({"name": "vanilla"}, 105, (30, 60, 90, 100)),
        ({"p_adv": "1/9"}, 94, None),  # Table 4
        ({"p_adv": "1/5"}, 87, (25, 50, 75, 83)),
        ({"p_adv": "1/3"}, 79, None),
        ({"p_adv": "1/2"}, 70, None),
        ({"name": "noise"}, 87, (25, 50, 75, 83)),
        ({"name": "decoupled"}, 87, (25, 50, 75, 83)),
        ({"name": "advprop", "attack_steps": 5}, 15, (4, 9, 13, 14)),
        ({"name": "advprop", "attack_steps": 1}, 35, (10, 20, 30, 33)),
        ({"name": "adversarial_training", "attack_steps": 1}, 52, (15, 30, 45, 50)),
    ],
)
def test_epochs_and_milestones_of_the_paper(
    method: dict, epochs: int, milestones: tuple[int, ...] | None
) -> None:
    b = budget(make_config({"method": method}), IMAGENET)
    assert b.epochs == epochs
    assert milestones in (None, b.milestones)


@pytest.mark.parametrize(
    ("vanilla", "fast"),
    [((180, 60, 120), (150, 50, 100)), ((210, 75, 150, 180), (175, 62, 125, 150))],
)
def test_mixup_and_cutmix(vanilla: tuple[int, ...], fast: tuple[int, ...]) -> None:
    b = budget(make_config({"budget": {"epochs": vanilla[0], "milestones": vanilla[1:]}}), IMAGENET)
    assert (b.epochs, *b.milestones) == fast


def test_image_passes_count_every_forward_and_backward() -> None:
    fast = budget(make_config({}), IMAGENET)
    assert fast.image_passes_per_step == 256 + 64 + 64
    assert fast.steps_per_epoch == IMAGENET // 320
    assert (
        budget(make_config({"method": {"name": "advprop"}}), IMAGENET).image_passes_per_step
        == 256 * 7
    )
    vanilla = budget(make_config({"method": {"name": "vanilla"}}), IMAGENET)
    assert fast.image_passes / vanilla.image_passes == pytest.approx(87 * 1.2 / 105, abs=2e-4)


def test_learning_rate_at_milestones_and_in_the_warm_up() -> None:
    b = budget(make_config({"optim": {"clean_batch": 512}}), 10 * 640)
    assert b.steps_per_epoch == 10
    assert [b.lr_at(s) for s in (0, 249, 250, 500, 750, 830, 869)] == pytest.approx(
        [0.2, 0.2, 0.02, 2e-3, 2e-4, 2e-5, 2e-5]
    )
    b = budget(make_config({"optim": {"warmup_epochs": 2}}), 3200)
    assert [b.lr_at(s) for s in (0, 9, 19, 20)] == pytest.approx([0.005, 0.05, 0.1, 0.1])


def lr_falls(**sections: dict) -> list[tuple]:
    b = budget(make_config(sections), IMAGENET)
    return [(f.epoch, f.milestones, f.step < b.steps) for f in b.falls]


def test_falls_are_where_the_learning_rate_changes() -> None:
    b = budget(make_config({"optim": {"clean_batch": 512}}), 10 * 640)
    found = [(0, b.lr_at(0))] + [
        (s, b.lr_at(s)) for s in range(1, b.steps) if b.lr_at(s) != b.lr_at(s - 1)
    ]
    assert [(f.step, f.lr) for f in b.falls] == found[1:]
    assert [f.epoch for f in b.falls] == [25, 50, 75, 83]


def test_milestones_that_meet_after_the_division() -> None:
    advprop = {"name": "advprop", "attack_steps": 5}  # cost 7
    assert lr_falls(method=advprop) == [(4, 1, True), (9, 1, True), (13, 1, True), (14, 1, True)]
    assert lr_falls(method=advprop, budget={"epochs": 30}) == [
        (1, 1, True),
        (2, 1, True),
        (4, 2, False),
    ]
    assert lr_falls(method=advprop, budget={"epochs": 30, "milestones": [9, 10, 11]}) == [
        (1, 2, True),
        (2, 1, True),
    ]
    assert lr_falls(method=advprop, budget={"epochs": 30, "same_budget": False}) == [
        (9, 1, True), (17, 1, True), (26, 1, True), (29, 1, True)
    ]  # fmt: skip


@pytest.mark.parametrize("epochs", [1, 2, 5, 12, 50, 300])
def test_unset_milestones_let_the_rate_fall_in_a_run_of_any_length(epochs: int) -> None:
    b = budget(make_config({"method": {"name": "vanilla"}, "budget": {"epochs": epochs}}), IMAGENET)
    expected = min(4, epochs - 1) if epochs < 4 else len(b.milestones)
    assert len(b.falls) == expected
    assert b.lr_at(b.steps - 1) == pytest.approx(0.1 * 0.1**expected)


@pytest.mark.parametrize(
    ("epochs", "enough"), [(4.999, True), (5, False), (5.5, False), (1e30, False)]
)
def test_a_warm_up_as_long_as_the_run(epochs: float, enough: bool) -> None:
    config = make_config(
        {"method": {"name": "vanilla"}, "budget": {"epochs": 5}, "optim": {"warmup_epochs": epochs}}
    )
    if enough:
        assert budget(config, IMAGENET).warmup_steps < budget(config, IMAGENET).steps
    else:
        with pytest.raises(
            ValueError, match=r"optim\.warmup_epochs = .* must be less than the 5 epoch"
        ):
            budget(config, IMAGENET)
    # What counts are the epochs of the run, 15 here, not those of vanilla training.
    advprop = make_config({"method": {"name": "advprop"}, "optim": {"warmup_epochs": 15}})
    with pytest.raises(ValueError, match="less than the 15 epoch"):
        budget(advprop, IMAGENET)


def test_too_few_images_for_a_batch() -> None:
    with pytest.raises(ValueError, match=r"319 images.*320"):
        budget(make_config({}), 319)


@pytest.mark.parametrize(
    "file", sorted(Path("configs").rglob("*.yaml")), ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_every_config_spends_the_formula(file: Path) -> None:
    config = load_config(file)
    m = config.method
    match m.name:
        case "vanilla":
            cost = Fraction(1)
        case "advprop":
            cost = Fraction((m.attack_steps or 0) + 2)
        case "adversarial_training":
            cost = Fraction((m.attack_steps or 0) + 1)
        case _:
            cost = 1 + (m.p_adv or Fraction(0))
    assert cost_per_image(m) == cost
    assert f"{float(cost):.4g} image passes" in file.read_text()
    b = budget(config, IMAGENET)
    ideal = config.budget.epochs / cost if config.budget.same_budget else config.budget.epochs
    assert abs(b.epochs - ideal) <= Fraction(1, 2)
