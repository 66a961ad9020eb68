"""The start-up lines show the numbers that would reveal a mistake."""

from typing import Any

import pytest
from timm.layers import LayerNorm2d
from torch import nn

from fap.budget import budget
from fap.config import make_config, with_classes
from fap.nets.build import plain, prepare
from fap.run.summary import _mix, describe
from fap.step.step import Step

IMAGENET = 1_281_167


def lines(
    tree: dict[str, Any], images: int = IMAGENET, model: nn.Module | None = None
) -> dict[str, str]:
    """The start-up lines by their first word; those that go on from the one before under 'more'."""
    small = {"name": "cifar_resnet8"}
    data = {"size": 32, "resize": 32, "pipeline": "ffcv"} | tree.get("data", {})
    config = with_classes(make_config(tree | {"model": small, "data": data}), 7)
    method = config.method
    model = model or plain(config.model.name, config.model.classes)
    model = prepare(model, aux=method.has_aux, size=32, any_norm=method.any_norm)
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


def test_what_is_mixed() -> None:
    """Nothing is said where nothing is."""
    assert "mix" not in lines({})
    config = make_config({"data": {"mix": "cutmix", "mix_alpha": 0.5}})
    assert _mix(config.data) == "mix        cutmix, alpha 0.5, drawn per batch, of clean rows"
    either = {"mix": "either", "mix_alpha": 0.2, "mix_per": "row", "mix_on": "both"}
    assert _mix(make_config({"data": either}).data) == (
        "mix        either, Mixup of alpha 0.2 or CutMix of alpha 1, drawn per row, "
        "of clean and adversarial rows"
    )


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
    ("sizes", "max_steps", "said", "more"),
    [
        (
            [[0, 16], [35, 24], [70, 32]],
            None,
            "0.604 x the pixels of 32 px; 16 px; 24 px from epoch 29 (step 116,087); 32 px from"
            " epoch 58 (step 232,174)",
            None,
        ),
        (
            [[0, 16], [35, 24], [70, 32]],
            232_174,
            "0.604 x the pixels of 32 px; 16 px; 24 px from epoch 29 (step 116,087)",
            "WITHOUT EFFECT, run.max_steps = 232,174 ends the run before: 32 px from epoch 58"
            " (step 232,174)",
        ),
        ([[0, 48]], None, "2.250 x the pixels of 32 px; 48 px", None),
    ],
)
def test_sizes_are_told_with_their_epochs_and_what_they_save(
    sizes: list[list[int]], max_steps: int | None, said: str, more: str | None
) -> None:
    constant = {"lr_schedule": "constant"}
    tree = {"data": {"sizes": sizes}, "run": {"max_steps": max_steps}, "budget": constant}
    found = lines(tree)
    assert found["sizes"] == said
    assert found.get("more") == more
    assert "sizes" not in lines({})


def test_sizes_that_meet_or_never_come_are_named() -> None:
    """At cost 7: 34 and 35 of 105 epochs become 5 of 15, and 104 the end."""
    sizes = [[0, 32], [34, 16], [35, 32], [104, 48]]
    constant = {"lr_schedule": "constant"}
    method = {"name": "advprop"}
    found = lines({"data": {"sizes": sizes}, "budget": constant, "method": method})
    assert found["sizes"] == (
        "1.000 x the pixels of 32 px; 32 px; 16 px from epoch 5 (step 25,020), WITHOUT EFFECT: the"
        " next one begins there too; 32 px from epoch 5 (step 25,020)"
    )
    assert found["more"] == (
        "WITHOUT EFFECT, the run ends after 15 epochs: 48 px from epoch 15 (step 75,060)"
    )


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


def test_norms_are_counted_by_class() -> None:
    said = lines({})
    assert said["norms"] == "9 BatchNorm2d with auxiliary twins"
    assert said["parameters"].endswith("main BN 672, aux BN 672")
    assert lines({"method": {"name": "vanilla"}})["norms"] == "9 BatchNorm2d"
    without = lines({"method": {"aux": "none"}})
    assert without["norms"] == "9 BatchNorm2d without auxiliary twins (method.aux = none)"
    assert without["parameters"].endswith("main BN 672, aux BN 0")
    assert without["BN"] == "groups  4 main of 64 rows, 4 main of 16 rows"


def net(*norms: nn.Module) -> nn.Module:
    """Of 8 channels and 7 classes."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), *norms, *head)


SEPARATE = {"method": {"name": "decoupled"}}


def test_a_model_of_several_kinds_of_norms() -> None:
    said = lines(SEPARATE, model=net(nn.BatchNorm2d(8), LayerNorm2d(8), LayerNorm2d(8)))
    assert said["norms"] == "1 BatchNorm2d, 2 LayerNorm2d with auxiliary twins"
    assert said["parameters"] == "shared 455, main norms 48, aux norms 48"
    assert said["BN"] == "groups  4 main of 64 rows, 4 auxiliary of 16 rows"
    assert "through running statistics" in said["attack"]


def test_a_model_without_batch_norms_has_no_batch_norm_groups() -> None:
    said = lines(SEPARATE | {"optim": {}}, model=net(LayerNorm2d(8)))
    assert said["norms"] == "1 LayerNorm2d with auxiliary twins"
    assert "BN" not in said
    assert said["groups"] == (
        "4 main of 64 rows, 4 auxiliary of 16 rows; no statistics of a group are taken"
    )
    assert "statistics" not in said["attack"]
    shuffle = {"method": {"name": "decoupled", "shuffle": "ranks"}}
    said = lines(shuffle, model=net(LayerNorm2d(8)))
    assert said["shuffle"].startswith("ranks: WITHOUT EFFECT")
    assert "no statistics" in said["shuffle"]


def test_a_model_without_norms_says_that_nothing_is_auxiliary() -> None:
    said = lines({}, model=net())
    assert said["norms"] == "none, so all rows train the same parameters, and none are auxiliary"
    assert said["parameters"] == "shared 455, main norms 0, aux norms 0"
    assert said["groups"] == "4 of 64 rows, 4 of 16 rows; no statistics of a group are taken"
    assert lines({"method": {"name": "vanilla"}}, model=net())["norms"] == "none"


def test_norms_that_see_a_whole_pass_are_named() -> None:
    norms = (nn.BatchNorm2d(8), nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8, affine=False))
    said = lines({"method": {"name": "vanilla"}}, model=net(*norms))
    assert said["norms"] == "1 BatchNorm2d; 2 BatchNorm2d that see a whole pass as one batch"


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
