"""The start-up lines show the numbers that would reveal a mistake."""

from typing import Any

import pytest

from fap.budget import budget
from fap.config import make_config, with_classes
from fap.nets.build import build
from fap.run.summary import describe
from fap.step.step import Step

IMAGENET = 1_281_167


def lines(tree: dict[str, Any], images: int = IMAGENET) -> dict[str, str]:
    """The start-up lines by their first word; those that go on from the one before under 'more'."""
    small = {"name": "cifar_resnet8"}
    data = {"size": 32, "resize": 32, "pipeline": "ffcv"} | tree.get("data", {})
    config = with_classes(make_config(tree | {"model": small, "data": data}), 7)
    model = build(config.model.name, config.model.classes, aux=config.method.entry.has_aux, size=32)
    found: dict[str, str] = {}
    for line in describe(config, budget(config, images), Step(model, config), 2).splitlines():
        word, _, rest = line.partition(" ")
        word = word or "more"
        found[word] = f"{found[word]}\n{rest.strip()}" if word in found else rest.strip()
    return found


def test_every_learning_rate_with_epoch_and_step() -> None:
    said = lines({"name": "mine"})
    assert said["run"] == "mine, seed 0: fast_advprop fused"
    assert said["model"] == "cifar_resnet8, 7 classes, 32 px"
    assert said["images"] == (
        "random_resized, area filter; evaluation shorter side 32, centre 32, bilinear filter"
    )
    falls = (
        "0.01 from epoch 25 (step 100,075); 0.001 from epoch 50 (step 200,150); 0.0001 from epoch"
        " 75 (step 300,225); "
    )
    assert said["rate"] == f"lr 0.1; {falls}1e-05 from epoch 83 (step 332,249)"
    assert "more" not in said
    assert (
        "87 epochs of 4,003 steps at 1.2 image passes per image = 133,732,224 image passes"
        in said["budget"]
    )
    assert said["budget"].endswith(", 0.994 x vanilla's")


def test_a_schedule_without_falls() -> None:
    assert lines({"budget": {"epochs": 1}})["rate"] == "lr 0.1"


@pytest.mark.parametrize(
    ("tree", "rate", "more"),
    [
        (  # cost 7: milestones 9, 17, 26, 29 of 30 epochs become 1, 2, 4, 4 of 4
            {"method": {"name": "advprop"}, "budget": {"epochs": 30}},
            "lr 0.1; 0.01 from epoch 1 (step 5,004); 0.001 from epoch 2 (step 10,008)",
            (
                "WITHOUT EFFECT, the run ends after 4 epochs: 1e-05 from epoch 4 (step 20,016), 2"
                " falls at once"
            ),
        ),
        (
            {"method": {"name": "advprop"}, "budget": {"epochs": 30, "milestones": [9, 10]}},
            "lr 0.1; 0.001 from epoch 1 (step 5,004), 2 falls at once",
            None,
        ),
        (
            {"run": {"max_steps": 200_150}},
            "lr 0.1; 0.01 from epoch 25 (step 100,075)",
            (
                "WITHOUT EFFECT, run.max_steps = 200,150 ends the run before: 0.001 from epoch 50"
                " (step 200,150); 0.0001 from epoch 75 (step 300,225); 1e-05 from epoch 83 (step"
                " 332,249)"
            ),
        ),
        (
            {"run": {"max_steps": 10**9}, "budget": {"milestones": [30]}},
            "lr 0.1; 0.01 from epoch 25 (step 100,075)",
            None,
        ),
        (
            {"budget": {"milestones": [30], "warmup_epochs": 3}},
            "lr rises to 0.1 over 10,008 steps (2.5 epochs); 0.01 from epoch 25 (step 100,075)",
            None,
        ),
        (
            {"budget": {"milestones": [30], "warmup_epochs": 36}, "run": {"max_steps": 500}},
            (
                "lr rises to 0.1 over 120,090 steps (30 epochs), run.max_steps = 500 ends the run"
                " before"
            ),
            (
                "WITHOUT EFFECT, run.max_steps = 500 ends the run before: 0.01 from epoch 25 (step"
                " 100,075), within the warm-up"
            ),
        ),
    ],
)
def test_falls_that_meet_or_never_come_are_named(
    tree: dict[str, Any], rate: str, more: str | None
) -> None:
    said = lines(tree)
    assert said["rate"] == rate
    assert said.get("more") == more


@pytest.mark.parametrize(
    ("section", "max_steps", "rate"),
    [
        ({"lr_schedule": "constant"}, None, "lr 0.1, constant"),
        (
            {"lr_schedule": "cosine"},
            None,
            "lr 0.1; half a cosine to 0; 0.08536 in epoch 21 (step 87,065); 0.05 in epoch 43"
            " (step 174,130); 0.01464 in epoch 65 (step 261,195); 2.034e-12 in epoch 86 (step"
            " 348,260)",
        ),
        (
            {"lr_schedule": "linear", "final_lr": 0.1, "warmup_epochs": 6},
            200_150,
            "lr rises to 0.1 over 20,015 steps (5 epochs); a straight line to 0.01; 0.0775 in epoch"
            " 25 (step 102,076); 0.055 in epoch 46 (step 184,138); 0.05061 in epoch 49 (step"
            " 200,149), where run.max_steps = 200,150 ends the run",
        ),
    ],
)
def test_rates_that_fall_with_every_step_show_a_few(
    section: dict[str, Any], max_steps: int | None, rate: str
) -> None:
    assert lines({"budget": section, "run": {"max_steps": max_steps}})["rate"] == rate


@pytest.mark.parametrize(
    ("method", "groups"),
    [
        ("vanilla", "4 main of 64 rows"),
        ("fast_advprop", "4 main of 64 rows, 4 auxiliary of 16 rows"),
        ("advprop", "4 main of 64 rows, 4 auxiliary of 64 rows"),
        ("adversarial_training", "4 main of 64 rows"),
    ],
)
def test_groups_are_told_by_the_norms_that_they_go_through(method: str, groups: str) -> None:
    said = lines({"method": {"name": method}})
    assert said["BN"] == f"groups  {groups}"
    assert ("attack" in said) == (method != "vanilla")
    assert ("shuffle" in said) == (method not in ("vanilla", "adversarial_training"))


def test_augmentation_is_told_in_its_order() -> None:
    assert "augment" not in lines({})
    everything = {
        "augment": "randaugment",
        "augment_magnitude": 12,
        "color_jitter": [0.4, 0, 0.2, 0.1],
        "erase": 0.25,
        "augment_on": "clean",
    }
    assert lines({"data": everything})["augment"] == (
        "randaugment of 2 operations, magnitude 12 of 30, then colour jitter (brightness 0.4,"
        " saturation 0.2, hue 0.1), then 0.25 erased; on clean rows"
    )
    assert (
        lines({"data": {"augment": "trivialaugment"}})["augment"] == "trivialaugment; on all rows"
    )
