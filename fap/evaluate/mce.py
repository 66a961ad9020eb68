"""Summaries of corruption benchmarks: unnormalised means over 15 and 19 corruptions, and mCE."""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

# AlexNet's top-1 errors, mean over severities (hendrycks/robustness): the 15 corruptions of mCE.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.92264, "defocus_blur": 0.81988,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.79836, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.71784, "jpeg_compression": 0.6065
}  # fmt: skip

EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")


def mce(errors: Mapping[str, float]) -> float:
    """Mean corruption error in percent: the mean of 15 errors (fractions), each divided by
    AlexNet's.

    Hendrycks & Dietterich (2019), section 4.2. Raises ValueError where one is missing.
    """
    if missing := [name for name in ALEXNET_ERRORS if name not in errors]:
        raise ValueError(f"mCE needs 15 corruptions; missing: {', '.join(missing)}")
    return 100 * fmean(errors[name] / alexnet for name, alexnet in ALEXNET_ERRORS.items())


def lacking(
    measured: Mapping[str, Mapping[int, Any]], names: Iterable[str] = ALEXNET_ERRORS
) -> str:
    """What a summary over `names` at five severities lacks, such as `snow lacks severity 4`; empty
    if nothing.
    """
    absent = [name for name in names if name not in measured]
    parts = []
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        parts.append(f"no {', '.join(absent[:3])}{more}")
    for name in names:
        missing = [
            str(severity)
            for severity in range(1, 6)
            if severity not in measured.get(name, range(1, 6))
        ]
        if missing:
            plural = "severity" if len(missing) == 1 else "severities"
            parts.append(f"{name} lacks {plural} {', '.join(missing)}")
    if len(parts) > 4:
        parts[3:] = [f"{len(parts) - 3} more lack some"]
    return "; ".join(parts)


def summarise(errors: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Percentages from top-1 errors (fractions) per corruption and severity, each only where its
    parts are complete.

    `mean` over whatever was measured; `raw_15`, `raw_19` (the unnormalised means; the latter is
    what the authors' code calls mCE) and `mce`. What an absent one lacks says `lacking`.
    """
    summary = {"mean": 100 * fmean(e for by in errors.values() for e in by.values())}
    full = {name: fmean(by.values()) for name, by in errors.items()}
    for key, names in (("raw_15", [*ALEXNET_ERRORS]), ("raw_19", [*ALEXNET_ERRORS, *EXTRA])):
        if not lacking(errors, names):
            summary[key] = 100 * fmean(full[name] for name in names)
    if "raw_15" in summary:
        summary["mce"] = mce(full)
    return summary
