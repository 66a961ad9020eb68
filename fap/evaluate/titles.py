"""What the keys of sets mean, and how tables and plots call sets and metrics.

A key that nobody has named here is a set all the same: it is told under its own name.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fap.evaluate.published import CORRUPTION_TITLES, MADE_HERE, SEVERITIES, SINGLE_TITLES
from pipelines.files import readable

NOT_KNOWN = "not known"
CLEAN = "clean"
ATTACK = "attack"
FOLDER = "folder"

# Benchmarks of one set.
SINGLE = {CLEAN: "clean", "cue_conflict": "cue conflict", **SINGLE_TITLES}
# Benchmarks of corruptions at five severities.
CORRUPTIONS = {
    "computed": "computed here, not the published files",
    MADE_HERE: "made by fap-corrupt, not the published files",
    **CORRUPTION_TITLES,
}
# Metrics beside a task's own, of any set; all are fractions.
CALIBRATION = "ece"
METRICS = {
    CALIBRATION: "calibration error (ECE)",
    "shape_bias": "shape bias",
    "texture": "decided by texture",
}
# The families of ImageNet-C's corruptions, each with the extra one that was published beside it.
FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    "weather": ("snow", "frost", "fog", "brightness", "spatter"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"),
}


class Corrupted(NamedTuple):
    """A set of a benchmark of corruptions."""

    benchmark: str
    corruption: str
    severity: int


class Attacked(NamedTuple):
    """Clean images under attack."""

    method: str
    eps: str  # grey levels, as the user wrote it


def corrupted(key: str) -> Corrupted | None:
    """None for a set of another kind."""
    benchmark, *rest = key.split("/")
    if benchmark in (ATTACK, FOLDER) or len(rest) != 2:
        return None
    name, severity = rest
    if severity not in map(str, SEVERITIES):
        return None
    return Corrupted(benchmark, name, int(severity))


def attacked(key: str) -> Attacked | None:
    """None for a set of another kind."""
    match key.split("/"):
        case [kind, method, eps] if kind == ATTACK:
            return Attacked(method, eps)
    return None


def title_of_single(key: str) -> str:
    """`ImageNet-R`; `folder NAME` of a user's own, an unknown key as it is."""
    if key in SINGLE:
        return SINGLE[key]
    if key.startswith(f"{FOLDER}/"):
        return f"folder {readable(key.removeprefix(f'{FOLDER}/'), 60)}"
    return readable(key, 60)


def title_of_benchmark(benchmark: str) -> str:
    return CORRUPTIONS.get(benchmark, readable(benchmark, 60))


def title_of_method(method: str) -> str:
    """`PGD-10`."""
    match = re.fullmatch(r"pgd([0-9]+)", method)
    if match:
        return f"PGD-{match[1]}"
    return {"fgsm": "FGSM", "autoattack": "AutoAttack"}.get(method, readable(method, 60))


def title_of_attack(attack: Attacked) -> str:
    return f"accuracy under {title_of_method(attack.method)}, eps {readable(attack.eps, 20)} / 255"


def title_of_metric(metric: str) -> str:
    return METRICS.get(metric, readable(metric, 60))


def family_of(corruption: str) -> str:
    """Empty for one that is none of ImageNet-C's."""
    for family, names in FAMILIES.items():
        if corruption in names:
            return family
    return ""
