"""The training methods as data: this is the only file that knows a method by its name.

Config, budget, plan and step read the entries of `METHODS`. To add a method, add an entry
(docs/extend.md); its name is then a value of `method.name`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

Kind = Literal["clean", "noise", "adv"]
"""Of a row: an image as it was loaded, at the attack's start, at its end."""
KINDS: tuple[Kind, ...] = ("clean", "noise", "adv")


# eps 1 and one step: section 4.1.
ATTACK = {"eps_255": 1.0, "step_255": 1.0, "attack_steps": 1, "random_start": True}

# Where the attack takes gradients for itself: what it aims at, the statistics that it sees, and
# the loss that it follows.
OWN_GRADIENT = ("targeted", "attack_bn", "attack_loss")


@dataclass(frozen=True)
class Method:
    """What distinguishes one way of training from another."""

    norms: Mapping[Kind, Literal["main", "aux"]]
    """The kinds of rows that are trained, each with the norms that it goes through.

    With `noise` among them the attack is recycled: the gradient of the pass that trains the noise
    rows also makes the adversarial ones. Without it adversarial rows cost passes of their own.
    Two kinds that go through the same norms still have groups of their own. They move the running
    statistics one after the other, but those of the clean rows' norms all at once.
    """
    attacked: Literal["nothing", "own rows", "copies"] = "nothing"
    """The images that become adversarial rows: rows that the loader delivers for it
    (`method.p_adv`), or the clean rows' images again."""
    direction: Literal["gradient", "random"] = "gradient"
    """What an attack follows: the sign of the loss's gradient, or a random sign."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `method` that have a meaning here, with the values they have when unset."""

    def __post_init__(self) -> None:
        """An entry that the step would read otherwise than it was meant cannot be made."""
        attacks = self.attacked != "nothing"
        assert attacks == ("adv" in self.norms), "adversarial rows are made where they are trained"
        assert "clean" in self.norms or self.attacked == "copies", "loaded rows are trained"
        if self.recycles:
            assert attacks, "noise rows are the start of an attack"
            assert self.norms["noise"] == self.norms["adv"], "noise and adv may share a group"
        self._only(attacks, ATTACK, "an attack has a radius, steps and a start")
        self._only(self.attacked == "own rows", ["p_adv"], "it says how many own rows there are")
        self._only(self.recycles, ["schedule"], "it orders noise and adversarial rows")
        self._only(self.takes_gradients, OWN_GRADIENT, "an attack with gradients of its own")
        for kind in KINDS:
            if f"weight_{kind}" in self.defaults:
                assert kind in self.norms, f"weight_{kind} is that of rows which are trained"

    def _only(self, wanted: bool, fields: Collection[str], why: str) -> None:
        """`fields` have defaults where they are `wanted`, and no meaning elsewhere."""
        for name in fields:
            assert (name in self.defaults) == wanted, f"{name}: {why}"

    @property
    def recycles(self) -> bool:
        """Are adversarial rows made with a gradient that training takes anyway?"""
        return "noise" in self.norms

    @property
    def takes_gradients(self) -> bool:
        """Does making adversarial rows take passes of its own?"""
        return self.attacked != "nothing" and not self.recycles and self.direction == "gradient"

    @property
    def has_aux(self) -> bool:
        return "aux" in self.norms.values()

    def adv_per_clean(self, p_adv: Fraction | None) -> Fraction:
        """Adversarial rows per clean row; `p_adv` is the method's field of that name."""
        match self.attacked:
            case "nothing":
                return Fraction(0)
            case "copies":
                return Fraction(1)
            case "own rows":
                assert p_adv is not None
                return p_adv / (1 - p_adv)

    def cost_per_image(
        self, p_adv: Fraction | None, attack_steps: int | None, attack_loss: str | None = None
    ) -> Fraction:
        """Image passes, one image forward and backward once, per image of the epoch.

        That is 1 for vanilla training (eq. 1 of the paper), K + 2 for AdvProp (eq. 2) and
        1 + p_adv K for decoupled training and Fast AdvProp (eq. 4), with K = attack_steps. An
        attack that chooses between two images (`max`) makes both, and compares them by two
        forwards, which are counted as one pass: 2 K + 1 in place of K.
        """
        n_adv = self.adv_per_clean(p_adv)
        rows_per_clean = {"clean": Fraction(1), "noise": n_adv, "adv": n_adv}
        passes = sum((rows_per_clean[kind] for kind in self.norms), Fraction(0))
        if self.takes_gradients:
            assert attack_steps is not None
            if attack_loss == "max":
                attack_steps = 2 * attack_steps + 1
            passes += attack_steps * n_adv
        loaded = 1 + n_adv if self.attacked == "own rows" else 1
        return passes / loaded


# Fast AdvProp (section 3.2).
RECYCLED = ATTACK | {
    "p_adv": Fraction(1, 5),
    "schedule": "fused",
    "weight_clean": 1.0,
    "weight_noise": 0.5,
    "weight_adv": 0.5,
    "sync": True,
    "combine": "sum",
    "shuffle": "ranks",
}

# Read from section 3.2.2: Fast AdvProp must "switch the attack mode from targeted attack to
# untargeted", so the others are targeted; and attackers "by default attack models using their
# testing mode", with the running statistics.
SEPARATE = ATTACK | {
    "targeted": True,
    "attack_bn": "running",
    "attack_loss": "total",
    "weight_clean": 1.0,
    "weight_adv": 1.0,
    "sync": False,
    "shuffle": "off",
}

# AdvProp's attack (Xie et al., 2020): step 1, 5 steps; eps 4 is assumed, Fast AdvProp states none.
PGD_5 = {"eps_255": 4.0, "step_255": 1.0, "attack_steps": 5}

METHODS: dict[str, Method] = {
    "vanilla": Method(norms={"clean": "main"}),
    "fast_advprop": Method(
        norms={"clean": "main", "noise": "aux", "adv": "aux"},
        attacked="own rows",
        defaults=RECYCLED,
    ),
    # The control: Fast AdvProp's passes with a random sign in place of the gradient's.
    "noise": Method(
        norms={"clean": "main", "noise": "aux", "adv": "aux"},
        attacked="own rows",
        direction="random",
        defaults=RECYCLED,
    ),
    # Section 3.2.1: AdvProp with few adversarial rows, but still with attacks of their own.
    "decoupled": Method(
        norms={"clean": "main", "adv": "aux"},
        attacked="own rows",
        defaults=SEPARATE | {"p_adv": Fraction(1, 5)},
    ),
    "advprop": Method(
        norms={"clean": "main", "adv": "aux"}, attacked="copies", defaults=SEPARATE | PGD_5
    ),
    # Madry et al. (2018): every image is attacked, untargeted, and nothing else is trained. One
    # set of norms; with the statistics of evaluation during the attack, as in the "robustness"
    # library (Engstrom et al., 2019), whose eps for ImageNet is 4 too.
    "adversarial_training": Method(
        norms={"adv": "main"},
        attacked="copies",
        defaults=ATTACK
        | PGD_5
        | {"targeted": False, "attack_bn": "running", "attack_loss": "total"},
    ),
}

DEFAULT_METHOD = "fast_advprop"
