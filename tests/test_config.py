"""What a config means: unset fields, milestones, names of runs and of fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fap.config import SECTIONS, Config, load_config, make_config, with_classes
from fap.renamed import RENAMED, with_current_names
from fap.sections import MethodConfig
from fap.sections.budget import paper_milestones

# ---------------------------------------------------------------------- unset fields


@pytest.mark.parametrize(
    ("epochs", "milestones"),
    [
        (105, (30, 60, 90, 100)),
        (210, (60, 120, 180, 200)),
        (50, (14, 29, 43, 48)),
        (12, (3, 7, 10, 11)),
        (3, (1, 2)),
        (1, ()),
    ],
)
def test_unset_milestones_are_the_papers_scaled(epochs: int, milestones: tuple[int, ...]) -> None:
    assert make_config({"budget": {"epochs": epochs}}).budget.milestones == milestones


def test_milestones_of_a_file_do_not_follow_other_epochs() -> None:
    assert Config().budget.milestones == (30, 60, 90, 100)
    file = "configs/imagenet/vanilla.yaml"
    says = r"\[30, 60, 90, 100\] with budget.epochs = 50.*scaled: \[14, 29, 43, 48\]"
    with pytest.raises(ValueError, match=says):
        load_config(file, ["budget.epochs=50"])
    unset = load_config(file, ["budget.epochs=50", "budget.milestones=null"])
    assert unset.budget.epochs == 50
    assert unset.budget.milestones == (14, 29, 43, 48)


@given(st.integers(1, 10**6))
def test_scaled_milestones_are_a_schedule(epochs: int) -> None:
    scaled = paper_milestones(epochs)
    assert list(scaled) == sorted(set(scaled))
    assert all(1 <= milestone < epochs for milestone in scaled)
    exact = [milestone * epochs / 105 for milestone in (30, 60, 90, 100)]  # section 4.1
    assert all(min(abs(milestone - e) for e in exact) <= 0.5 for milestone in scaled)
    if epochs >= 12:
        assert len(scaled) == 4


def test_an_unset_field_means_the_paper() -> None:
    method = Config().method
    assert method.name == "fast_advprop"
    assert method.schedule == "fused"
    assert method.combine == "sum"
    assert method.shuffle == "ranks"
    assert method.eps_255 == 1
    assert method.step_size_255 == 1
    assert method.weight_noise == 0.5
    assert method.weight_adv == 0.5
    assert method.sync is True
    assert method.group_rows == 64
    assert method.adv_group_rows == 16


def test_the_steps_of_an_attack_reach_the_edge_of_the_ball() -> None:
    assert make_config({"method": {"name": "advprop"}}).method.step_size_255 == 1
    assert make_config({"method": {"name": "advprop", "attack_steps": 1}}).method.step_size_255 == 4


# ---------------------------------------------------------------------- names of fields


def test_a_field_that_was_renamed_names_the_new_one() -> None:
    for old, new in RENAMED.items():
        with pytest.raises(ValueError, match=f"{old}: is now called {new}$"):
            load_config(None, [f"{old}=1"])
        section, _, field = new.partition(".")
        assert field in SECTIONS[section].model_fields


def test_a_config_of_an_earlier_version_is_read_by_the_new_names() -> None:
    earlier = {"name": "run", "method": {"name": "vanilla", "group": 32}}
    found = make_config(with_current_names(earlier))
    assert found.method.group_rows == 32
    assert earlier["method"] == {"name": "vanilla", "group": 32}  # a copy was changed
    now = found.model_dump(mode="json")
    assert with_current_names(now) == now


@pytest.mark.parametrize(
    ("method", "same_budget", "vanilla"),
    [
        ({"name": "vanilla"}, True, 0.169),
        ({"name": "fast_advprop"}, True, 0.2028),
        ({"name": "advprop"}, True, 1.183),
        ({"name": "advprop"}, False, 0.169),
    ],
)
def test_a_warm_up_of_an_earlier_version_was_in_epochs_of_the_run(
    method: dict[str, Any], same_budget: bool, vanilla: float
) -> None:
    """And means as many steps as it did: those of vanilla training are divided by the cost."""
    earlier = {
        "method": method,
        "optim": {"lr": 0.2, "warmup_epochs": 0.169},
        "budget": {"same_budget": same_budget},
    }
    found = make_config(with_current_names(earlier))
    assert found.optim.lr == 0.2
    assert found.budget.warmup_epochs == vanilla
    now = found.model_dump(mode="json")
    assert with_current_names(now) == now


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_another_schedule_of_the_rate_has_no_milestones(schedule: str) -> None:
    budget = make_config({"budget": {"lr_schedule": schedule}}).budget
    assert (budget.milestones, budget.gamma) == (None, None)
    assert budget.final_lr == (None if schedule == "constant" else 0.0)
    paper = Config().budget
    assert (paper.lr_schedule, paper.gamma, paper.final_lr) == ("milestones", 0.1, None)


@pytest.mark.parametrize("odd", [None, 3, [], {"method": None}, {"method": 3}])
def test_what_is_no_config_keeps_its_shape(odd: Any) -> None:
    assert with_current_names(odd) == odd


# ---------------------------------------------------------------------- classes and seeds


def test_the_classes_are_known_once_the_data_are() -> None:
    config = load_config(None, ["method.p_adv=1/9", "budget.epochs=50", "name=x"])
    with pytest.raises(ValueError, match=r"model\.num_classes is not set"):
        _ = config.model.classes
    seven = with_classes(config, 7)
    assert seven.model.classes == seven.model.num_classes == 7
    assert with_classes(seven, 9).model.num_classes == 9
    assert seven.model_copy(update={"model": config.model}) == config
    with pytest.raises(ValueError, match=r"model\.num_classes = 0"):
        with_classes(config, 0)


def test_the_largest_seed_serves_every_generator() -> None:
    torch.manual_seed(2**32 - 1)
    np.random.seed(2**32 - 1)
    np.random.SeedSequence([2**32 - 1, 0, 0])


# ---------------------------------------------------------------------- the name of a run


@pytest.mark.parametrize(
    ("text", "overrides", "name"),
    [
        (None, [], "fast_advprop"),
        (None, ["method.name=vanilla"], "vanilla"),
        (None, ["method.name=vanilla", "name=mine"], "mine"),
        ("{}", [], "stem"),
        ("{}", ["method.name=fast_advprop"], "stem"),
        ("{}", ["method.name=noise"], "noise"),
        ("method: {name: vanilla}", [], "stem"),
        ("method: {name: vanilla}", ["method.name=vanilla"], "stem"),
        ("method: {name: vanilla}", ["method.name=advprop"], "advprop"),
        ("method: {name: vanilla}", ["method.name=advprop", "name=mine"], "mine"),
        ("name: given\nmethod: {name: vanilla}", ["method.name=advprop"], "given"),
        ("name:\nmethod: {name: vanilla}", [], "stem"),
    ],
)
def test_the_name_says_what_the_run_is(
    tmp_path: Path, text: str | None, overrides: list[str], name: str
) -> None:
    file = None
    if text is not None:
        file = tmp_path / "stem.yaml"
        file.write_text(text)
    assert load_config(file, overrides).name == name


def test_a_config_made_in_python_is_named_too() -> None:
    assert Config().name == "fast_advprop"
    assert Config(method=MethodConfig(name="noise")).name == "noise"
    assert make_config({"method": {"name": "decoupled"}}).name == "decoupled"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/x",
        "a/b",
        "a\\b",
        ".x",
        "a b",
        "a\n",
        "ü",
        "a" * 101,
        "~",
        "\0",
        7,
        None,
        [],
    ],
)
def test_a_name_leads_nowhere_else(name: Any, tmp_path: Path) -> None:
    """Wherever it comes from: the command line, a file, a file's stem, a checkpoint."""
    if name is not None:
        with pytest.raises(ValueError, match=r"^name = "):
            make_config(Config().model_dump(mode="json") | {"name": name})
    if isinstance(name, str):
        with pytest.raises(ValueError, match=r"^name = .*not starting with"):
            load_config(None, [f"name={name}"])


def test_a_stem_that_is_no_name_asks_for_one(tmp_path: Path) -> None:
    file = tmp_path / "my run.yaml"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"'my run' cannot name a run .*; give name="):
        load_config(file)
    assert load_config(file, ["name=my_run"]).name == "my_run"
    assert load_config(file, ["method.name=vanilla"]).name == "vanilla"
