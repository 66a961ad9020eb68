"""Attacks by name: what the options of a command ask for."""

import re
from collections.abc import Sequence

from fap.evaluate.attacks import LinfAttack, SignSteps, number
from fap.evaluate.autoattack import AutoAttack, package

MOST_STEPS = 10_000
MOST_EPS = 255  # grey levels: nothing of the image is left
FGSM = "fgsm"
PGD = re.compile(r"pgd([1-9][0-9]{0,5})")
AUTOATTACK = "autoattack"
STEP_OF_EPS = 2.5  # Madry et al. (2018): steps of 2.5 eps / K reach every corner of the ball


def attacks_of(
    methods: Sequence[str],
    eps: Sequence[str],  # grey levels
    *,
    step: float | None,  # grey levels, of pgd; None: 2.5 eps / K
    restarts: int | None,  # of pgd; None: 1
    seed: int,
) -> tuple[LinfAttack, ...]:
    """Each method at each strength. Raises ValueError, and ImportError without AutoAttack."""
    if AUTOATTACK in methods:
        package()  # now, not after the clean images
    if not any(PGD.fullmatch(method) for method in methods):
        for option, given in (("--attack-step", step), ("--restarts", restarts)):
            if given is not None:
                raise ValueError(f"{option} is about pgd<K>, which --attack does not name")
    if step is not None and not 0 < step <= MOST_EPS:
        raise ValueError(f"--attack-step {step:g}: must be above 0 and at most {MOST_EPS}")
    if restarts is not None and restarts < 1:
        raise ValueError(f"--restarts {restarts}: must be at least 1")
    # One of each, as they are written: 1 and 1.0 are one strength.
    strengths = {number(value): value for value in map(_grey_levels, eps)}.values()
    return tuple(
        _attack(method, eps_255, step, restarts or 1, seed)
        for method in dict.fromkeys(methods)
        for eps_255 in strengths
    )


def _grey_levels(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= MOST_EPS:
        raise ValueError(
            f"--eps {text}: must be grey levels, 0 to {MOST_EPS}; "
            "4 is what the literature writes as 4/255"
        )
    return value


def _attack(
    method: str, eps_255: float, step: float | None, restarts: int, seed: int
) -> LinfAttack:
    if method == FGSM:
        return SignSteps(method, eps_255, seed, 1, eps_255, random_start=False, restarts=1)
    if method == AUTOATTACK:
        return AutoAttack(method, eps_255, seed)
    found = PGD.fullmatch(method)
    if found is None:
        raise ValueError(
            f"--attack {method[:60]}: must be fgsm, pgd<K> such as pgd10, or autoattack"
        )
    steps = int(found[1])
    if steps > MOST_STEPS:
        raise ValueError(f"--attack {method}: must have at most {MOST_STEPS:,} steps")
    if step is None:
        step = STEP_OF_EPS * eps_255 / steps
    return SignSteps(method, eps_255, seed, steps, step, random_start=True, restarts=restarts)
