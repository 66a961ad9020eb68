"""What sums up a classifier's errors on a corruption benchmark: plain means, mCE, relative mCE."""

from collections.abc import Mapping
from statistics import fmean

from fap.tasks.base import CorruptionMean

# AlexNet's top-1 errors, mean over severities (hendrycks/robustness): the 15 corruptions of mCE.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.92264,
    "defocus_blur": 0.81988,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.79836,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.71784,
    "jpeg_compression": 0.6065,
}
# Its error on clean images: torchvision's AlexNet, whose table of weights has 56.522% right.
ALEXNET_CLEAN_ERROR = 0.43478
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # published beside the 15


def raw_mean(
    errors: Mapping[str, float],  # corruption: top-1 error, a fraction
    clean_error: float,
) -> float:
    """The plain mean in percent. That of 19 corruptions is what the authors' code calls mCE."""
    return 100 * fmean(errors.values())


def mce(
    errors: Mapping[str, float],  # corruption: top-1 error, a fraction
    clean_error: float,
) -> float:
    """Mean corruption error in percent: the mean of 15 errors, each divided by AlexNet's.

    Hendrycks & Dietterich (2019), section 4.2. Raises ValueError where one is missing.
    """
    _check_complete(errors)
    return 100 * fmean(errors[name] / alexnet for name, alexnet in ALEXNET_ERRORS.items())


def relative_mce(
    errors: Mapping[str, float],  # corruption: top-1 error, a fraction
    clean_error: float,
) -> float:
    """Relative mCE in percent: as mCE, but of what corruption adds to both errors on clean images.

    Hendrycks & Dietterich (2019), section 4.2: a model that is only more accurate gains nothing by
    it. Raises ValueError where one is missing.
    """
    _check_complete(errors)
    return 100 * fmean(
        (errors[name] - clean_error) / (alexnet - ALEXNET_CLEAN_ERROR)
        for name, alexnet in ALEXNET_ERRORS.items()
    )


def _check_complete(errors: Mapping[str, float]) -> None:
    missing = [name for name in ALEXNET_ERRORS if name not in errors]
    if missing:
        raise ValueError(f"mCE needs 15 corruptions; missing: {', '.join(missing)}")


OTHER_IMAGES = "AlexNet's errors are those of ImageNet-C"
MEANS = (
    CorruptionMean("15 corruptions", tuple(ALEXNET_ERRORS), raw_mean),
    CorruptionMean("19 corruptions", (*ALEXNET_ERRORS, *EXTRA), raw_mean, paper="imagenet_c"),
    CorruptionMean("mCE, AlexNet = 100", tuple(ALEXNET_ERRORS), mce, only_imagenet_c=OTHER_IMAGES),
    CorruptionMean(
        "relative mCE, AlexNet = 100",
        tuple(ALEXNET_ERRORS),
        relative_mce,
        only_imagenet_c=OTHER_IMAGES,
        of_clean=True,
    ),
)
