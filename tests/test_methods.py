"""The methods as data: costs against the paper's formulas, and entries that mean nothing."""

from fractions import Fraction
from typing import Any

import pytest

from fap.config import make_config
from fap.methods import ATTACK, DEFAULT_METHOD, METHODS, Method
from fap.sections import MethodConfig

P = Fraction(1, 5)


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("vanilla", lambda p, k: 1),  # eq. 1
        ("advprop", lambda p, k: k + 2),  # eq. 2
        ("decoupled", lambda p, k: 1 + p * k),  # eq. 4
        ("fast_advprop", lambda p, k: 1 + p * k),
        ("noise", lambda p, k: 1 + p * k),  # the control costs what it controls
        ("adversarial_training", lambda p, k: k + 1),  # Madry et al.: no clean row is trained
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("p_adv", [Fraction(1, 9), P, Fraction(1, 3), Fraction(1, 2)])
def test_cost_is_the_papers_formula(name: str, cost: Any, steps: int, p_adv: Fraction) -> None:
    method = METHODS[name]
    if method.recycles:
        steps = 1
    assert method.cost_per_image(p_adv, steps) == cost(p_adv, steps)


def test_every_method_has_a_formula() -> None:
    mark = test_cost_is_the_papers_formula.pytestmark[-1]  # type: ignore[attr-defined]
    assert {name for name, _ in mark.args[1]} == METHODS.keys()


def test_a_random_direction_costs_no_passes() -> None:
    norms: dict[Any, Any] = {"clean": "main", "adv": "aux"}
    method = Method(norms, "own rows", "random", ATTACK | {"p_adv": P})
    assert method.cost_per_image(P, 1) == 1
    assert not method.takes_gradients


CLEAN_AND_AUX = {"clean": "main", "adv": "aux"}
RECYCLED = {"clean": "main", "noise": "aux", "adv": "aux"}
OWN_ATTACK = ATTACK | {"targeted": False, "attack_bn": "batch", "attack_loss": "total"}


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


@pytest.mark.parametrize(
    ("norms", "attacked", "defaults", "why"),
    [
        (CLEAN_AND_AUX, "nothing", {}, "where they are trained"),
        ({"clean": "main"}, "copies", {}, "where they are trained"),
        ({"adv": "main"}, "own rows", {}, "loaded rows are trained"),
        ({"clean": "main", "noise": "aux"}, "nothing", {}, "start of an attack"),
        # Otherwise than it says: noise would go through the norms of adv.
        (RECYCLED | {"noise": "main"}, "own rows", {}, "may share a group"),
        (CLEAN_AND_AUX, "own rows", OWN_ATTACK, "p_adv"),
        (CLEAN_AND_AUX, "copies", OWN_ATTACK | {"p_adv": P}, "p_adv"),
        ({"clean": "main"}, "nothing", {"eps_255": 1.0}, "eps_255"),
        (CLEAN_AND_AUX, "copies", without(OWN_ATTACK, "eps_255"), "eps_255"),
        (CLEAN_AND_AUX, "copies", without(OWN_ATTACK, "random_start"), "random_start"),
        # Otherwise than it seems: adversarial rows would be trained before they are made.
        (RECYCLED, "copies", ATTACK, "schedule"),
        (CLEAN_AND_AUX, "copies", OWN_ATTACK | {"schedule": "fused"}, "schedule"),
        # Silently the batch's statistics, and away from the target.
        (CLEAN_AND_AUX, "copies", without(OWN_ATTACK, "attack_bn"), "attack_bn"),
        (CLEAN_AND_AUX, "copies", without(OWN_ATTACK, "targeted"), "targeted"),
        (RECYCLED, "copies", OWN_ATTACK | {"schedule": "fused"}, "targeted"),
        (CLEAN_AND_AUX, "copies", OWN_ATTACK | {"weight_noise": 1.0}, "weight_noise"),
    ],
)
def test_an_entry_that_means_nothing_cannot_be_made(
    norms: dict[Any, Any], attacked: Any, defaults: dict[str, Any], why: str
) -> None:
    with pytest.raises(AssertionError, match=why):
        Method(norms, attacked, defaults=defaults)


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_fields_and_valid(name: str) -> None:
    entry = METHODS[name]
    of_any_method = {"name", "group_rows", "aux"}
    assert entry.defaults.keys() <= MethodConfig.model_fields.keys() - of_any_method
    config = MethodConfig.model_validate({"name": name})
    for field in MethodConfig.model_fields.keys() - of_any_method:
        assert getattr(config, field) == entry.defaults.get(field)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("aux", ["auto", "norms", "none"])
def test_auxiliary_norms_are_said_in_one_place(name: str, aux: str) -> None:
    entry = METHODS[name]
    tree = {"method": {"name": name, "aux": aux}}
    if not entry.has_aux and aux != "auto":
        says = rf"method\.aux = '{aux}' has no meaning for method\.name = '{name}'"
        with pytest.raises(ValueError, match=says):
            make_config(tree)
        return
    method = make_config(tree).method
    assert method.norms.keys() == entry.norms.keys()
    if aux == "none":
        assert set(method.norms.values()) == {"main"}
    else:
        assert method.norms == entry.norms
    assert method.has_aux == (entry.has_aux and aux != "none")
    assert method.any_norm == (name == "vanilla")


@pytest.mark.parametrize("name", METHODS)
def test_a_field_without_meaning_is_refused(name: str) -> None:
    values = {
        "p_adv": "1/5",
        "targeted": True,
        "schedule": "fused",
        "attack_bn": "batch",
        "attack_loss": "total",
    }
    for field, value in values.items():
        tree = {"method": {"name": name, field: value}}
        if field in METHODS[name].defaults:
            make_config(tree)
        else:
            with pytest.raises(ValueError, match=rf"method\.{field} = .* has no meaning for"):
                make_config(tree)


def test_the_default_method_and_an_unknown_one() -> None:
    assert make_config({}).method.name == DEFAULT_METHOD
    with pytest.raises(ValueError, match=r"method\.name = 'madry': must be 'vanilla', .* or "):
        make_config({"method": {"name": "madry"}})


def test_adversarial_training_mixes_nothing() -> None:
    """Its rows are copies of unmixed images, so Mixup would have no effect."""
    with pytest.raises(ValueError, match=r"data\.mix .*'adversarial_training'.*unmixed"):
        make_config({"method": {"name": "adversarial_training"}, "data": {"mix": "mixup"}})
