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
    ],
)
def test_epochs_and_milestones_of_the_paper(method: dict, epochs: int, milestones: tuple[int, ...] | None) -> None:
    b = budget(make_config({"method": method}), IMAGENET)
    assert b.epochs == epochs
    assert milestones in (None, b.milestones)


@pytest.mark.parametrize(("vanilla", "fast"), [((180, 60, 120), (150, 50, 100)), ((210, 75, 150, 180), (175, 62, 125, 150))])
def test_mixup_and_cutmix(vanilla: tuple[int, ...], fast: tuple[int, ...]) -> None:
    b = budget(make_config({"budget": {"epochs": vanilla[0], "milestones": vanilla[1:]}}), IMAGENET)
    assert (b.epochs, *b.milestones) == fast


def test_image_passes_count_every_forward_and_backward() -> None:
    fast = budget(make_config({}), IMAGENET)
    assert fast.image_passes_per_step == 256 + 64 + 64
    assert fast.steps_per_epoch == IMAGENET // 320
    assert budget(make_config({"method": {"name": "advprop"}}), IMAGENET).image_passes_per_step == 256 * 7
    vanilla = budget(make_config({"method": {"name": "vanilla"}}), IMAGENET)
    assert fast.image_passes / vanilla.image_passes == pytest.approx(87 * 1.2 / 105, abs=2e-4)


def test_learning_rate_at_milestones_and_in_the_warm_up() -> None:
    b = budget(make_config({"optim": {"clean_batch": 512}}), 10 * 640)
    assert b.steps_per_epoch == 10
    assert [b.lr_at(s) for s in (0, 249, 250, 500, 750, 830, 869)] == pytest.approx([0.2, 0.2, 0.02, 2e-3, 2e-4, 2e-5, 2e-5])
    b = budget(make_config({"optim": {"warmup_epochs": 2}}), 3200)
    assert [b.lr_at(s) for s in (0, 9, 19, 20)] == pytest.approx([0.005, 0.05, 0.1, 0.1])


def test_too_few_images_for_a_batch() -> None:
    with pytest.raises(ValueError, match=r"319 images.*320"):
        budget(make_config({}), 319)


@pytest.mark.parametrize("file", sorted(Path("configs").rglob("*.yaml")), ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_config_spends_the_formula(file: Path) -> None:
    config = load_config(file)
    m = config.method
    cost = {"vanilla": Fraction(1), "advprop": Fraction((m.attack_steps or 0) + 2)}.get(m.name, 1 + (m.p_adv or 0))
    assert cost_per_image(m) == cost
    assert f"{float(cost):.4g} image passes" in file.read_text()
    b = budget(config, IMAGENET)
    ideal = config.budget.epochs / cost if config.budget.same_budget else config.budget.epochs
    assert abs(b.epochs - ideal) <= Fraction(1, 2)
