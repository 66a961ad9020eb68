"""The budget: the paper's epochs and milestones, image passes, and where the rate falls."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from fap.budget import Budget, budget, cost_per_image
from fap.config import load_config, make_config

IMAGENET = 1_281_167  # images


def budget_of(n_images: int = IMAGENET, **sections: dict[str, Any]) -> Budget:
    return budget(make_config(sections), n_images)


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
    method: dict[str, Any], epochs: int, milestones: tuple[int, ...] | None
) -> None:
    found = budget_of(method=method)
    assert found.epochs == epochs
    assert milestones in (None, found.rates.milestones)


@pytest.mark.parametrize(
    ("vanilla", "fast"),
    [((180, 60, 120), (150, 50, 100)), ((210, 75, 150, 180), (175, 62, 125, 150))],
)
def test_mixup_and_cutmix(vanilla: tuple[int, ...], fast: tuple[int, ...]) -> None:
    epochs, *milestones = vanilla
    found = budget_of(budget={"epochs": epochs, "milestones": milestones})
    assert (found.epochs, *found.rates.milestones) == fast


def test_image_passes_count_every_forward_and_backward() -> None:
    fast = budget_of()
    assert fast.image_passes_per_step == 256 + 64 + 64
    assert fast.steps_per_epoch == IMAGENET // 320
    assert budget_of(method={"name": "advprop"}).image_passes_per_step == 256 * 7
    vanilla = budget_of(method={"name": "vanilla"})
    assert fast.image_passes / vanilla.image_passes == pytest.approx(87 * 1.2 / 105, abs=2e-4)


def test_learning_rate_at_milestones_and_in_the_warm_up() -> None:
    found = budget_of(10 * 640, optim={"clean_batch": 512}).rates
    assert found.steps_per_epoch == 10
    rates = [found.at(step) for step in (0, 249, 250, 500, 750, 830, 869)]
    assert rates == pytest.approx([0.2, 0.2, 0.02, 2e-3, 2e-4, 2e-5, 2e-5])
    warm = budget_of(3200, budget={"warmup_epochs": 2.4}).rates
    rates = [warm.at(step) for step in (0, 9, 19, 20)]
    assert rates == pytest.approx([0.005, 0.05, 0.1, 0.1])


def test_falls_are_where_the_learning_rate_changes() -> None:
    found = budget_of(10 * 640, optim={"clean_batch": 512}).rates
    changes = [
        (step, found.at(step))
        for step in range(1, found.steps)
        if found.at(step) != found.at(step - 1)
    ]
    assert [(fall.step, fall.lr) for fall in found.falls] == changes
    assert [fall.epoch for fall in found.falls] == [25, 50, 75, 83]


ADVPROP = {"name": "advprop", "attack_steps": 5}  # cost 7


@pytest.mark.parametrize(
    ("section", "falls"),
    [
        ({}, [(4, 1, True), (9, 1, True), (13, 1, True), (14, 1, True)]),
        ({"epochs": 30}, [(1, 1, True), (2, 1, True), (4, 2, False)]),
        ({"epochs": 30, "milestones": [9, 10, 11]}, [(1, 2, True), (2, 1, True)]),
        (
            {"epochs": 30, "same_budget": False},
            [(9, 1, True), (17, 1, True), (26, 1, True), (29, 1, True)],
        ),
    ],
)
def test_milestones_that_meet_after_the_division(
    section: dict[str, Any],
    falls: list[tuple[int, int, bool]],  # epoch, how many meet there, is it before the run's end?
) -> None:
    run = budget_of(method=ADVPROP, budget=section)
    found = [(fall.epoch, fall.milestones, fall.step < run.steps) for fall in run.rates.falls]
    assert found == falls


@pytest.mark.parametrize("epochs", [1, 2, 5, 12, 50, 300])
def test_unset_milestones_let_the_rate_fall_in_a_run_of_any_length(epochs: int) -> None:
    found = budget_of(method={"name": "vanilla"}, budget={"epochs": epochs}).rates
    n_falls = len(found.milestones)
    if epochs < 4:
        n_falls = epochs - 1
    assert len(found.falls) == n_falls
    assert found.at(found.steps - 1) == pytest.approx(0.1 * 0.1**n_falls)


@pytest.mark.parametrize(
    ("epochs", "enough"), [(4.999, True), (5, False), (5.5, False), (1e30, False)]
)
def test_a_warm_up_as_long_as_the_run(epochs: float, enough: bool) -> None:
    sections: dict[str, Any] = {
        "method": {"name": "vanilla"},
        "budget": {"epochs": 5, "warmup_epochs": epochs},
    }
    if enough:
        found = budget_of(**sections).rates
        assert found.warmup_steps < found.steps
    else:
        says = r"budget\.warmup_epochs = .* must be less than its 5 \(budget\.epochs / cost\)"
        with pytest.raises(ValueError, match=says):
            budget_of(**sections)


def test_a_warm_up_is_measured_by_the_epochs_of_vanilla_training() -> None:
    """As the milestones, but to the nearest step: 105 become 15 here."""
    steps = IMAGENET // 256
    found = budget_of(method={"name": "advprop"}, budget={"warmup_epochs": 7.7}).rates
    assert found.warmup_steps == round(Fraction(11, 10) * steps)
    same = {"warmup_epochs": 7.7, "same_budget": False}
    found = budget_of(method={"name": "advprop"}, budget=same).rates
    assert found.warmup_steps == round(Fraction(77, 10) * steps)
    with pytest.raises(ValueError, match=r"= 105 gives 15 epochs of this run; .* than its 15 "):
        budget_of(method={"name": "advprop"}, budget={"warmup_epochs": 105})


# ---------------------------------------------------------------------- sizes

FOUR = [[0, 128], [30, 160], [60, 192], [90, 224]]


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("vanilla", ((0, 128), (30, 160), (60, 192), (90, 224))),
        ("fast_advprop", ((0, 128), (25, 160), (50, 192), (75, 224))),
        ("advprop", ((0, 128), (4, 160), (9, 192), (13, 224))),
    ],
)
def test_sizes_change_where_the_milestones_would(
    method: str, sizes: tuple[tuple[int, int], ...]
) -> None:
    found = budget_of(method={"name": method}, data={"sizes": FOUR})
    assert found.sizes == sizes
    same = {"same_budget": False}
    whole = budget_of(method={"name": method}, data={"sizes": FOUR}, budget=same)
    assert list(map(list, whole.sizes)) == FOUR
    assert budget_of(method={"name": method}).sizes == ((0, 224),)
    assert found.image_passes == budget_of(method={"name": method}).image_passes


def test_every_epoch_and_step_has_the_size_of_the_last_change_before_it() -> None:
    sizes = [[0, 8], [1, 16], [3, 24], [4, 32], [29, 40]]
    found = budget_of(10 * 256, method=ADVPROP, data={"sizes": sizes}, budget={"epochs": 30})
    # 30 / 7 epochs: 4; the changes divided come to 1, 1, 1 and 4, which is the end.
    assert found.sizes == ((0, 8), (1, 16), (1, 24), (1, 32), (4, 40))
    assert [found.size_in(epoch) for epoch in range(6)] == [8, 32, 32, 32, 32, 32]


def test_the_epochs_left_come_in_parts_of_one_size() -> None:
    vanilla = {"name": "vanilla"}
    found = budget_of(method=vanilla, data={"sizes": FOUR})
    assert found.by_size(range(105)) == [
        (128, range(30)), (160, range(30, 60)), (192, range(60, 90)), (224, range(90, 105)),
    ]  # fmt: skip
    assert found.by_size(range(60, 61)) == [(192, range(60, 61))]
    assert found.by_size(range(59, 95)) == [
        (160, range(59, 60)), (192, range(60, 90)), (224, range(90, 95)),
    ]  # fmt: skip
    assert found.by_size(range(105, 105)) == [(224, range(105, 105))], "nothing is left"
    assert budget_of(method=vanilla).by_size(range(3, 105)) == [(224, range(3, 105))]


def test_too_few_images_for_a_batch() -> None:
    with pytest.raises(ValueError, match=r"319 images.*320"):
        budget_of(319)


@pytest.mark.parametrize(
    "file", sorted(Path("configs").rglob("*.yaml")), ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_every_config_spends_the_formula(file: Path) -> None:
    """Written out again, and stated in the config's header."""
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
    ideal = Fraction(config.budget.epochs)
    if config.budget.same_budget:
        ideal /= cost
    assert abs(budget(config, IMAGENET).epochs - ideal) <= Fraction(1, 2)
