"""ImageNet-C's 19 corruptions (15 and 4 extra) at 5 severities, and CIFAR-10-C's for small images.

Constants: those of the published generators (see `corruptions.py`). Images computed here are new
draws of the published distribution, not the published files: those had other random numbers and,
for ImageNet-C, passed through JPEG at quality 85.
"""

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import numpy as np

# Pixels: images up to this side get CIFAR-10-C's constants, as ImageNet-C's destroy them.
SMALL = 64


def is_small(x: np.ndarray) -> bool:
    return max(x.shape[:2]) <= SMALL


class Corruption(NamedTuple):
    """The constants for severity 1 to 5: a number or several, in the definition's order.

    The definition is the function of the corruption's name in `corruptions.py`.
    """

    imagenet_c: tuple[float | tuple[float, ...], ...]
    cifar10_c: tuple[float | tuple[float, ...], ...]


CORRUPTIONS = {
    # The 15 of ImageNet-C.
    "gaussian_noise": Corruption((0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption((60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption((0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": Corruption(
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": Corruption(
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "zoom_blur": Corruption(
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    "snow": Corruption(
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Corruption(
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ),
    "fog": Corruption(
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "brightness": Corruption((0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption((0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": Corruption((0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption((25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    # The 4 extra ones.
    "speckle_noise": Corruption((0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": Corruption((1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1)),
    "spatter": Corruption(
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
    ),
    "saturate": Corruption(
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    ),
}
NAMES = tuple(CORRUPTIONS)
DEFINITIONS = 1  # to be raised when an image comes out otherwise: kept copies are of one of them
PUBLISHED = NAMES[:15]  # those that ImageNet-C's mCE is of
EXTRA = NAMES[15:]
# What COCO-C's generator (`imagecorruptions`, Michaelis et al., 2019) has otherwise than
# ImageNet-C's and would matter to boxes, with constants for severity 1 to 5. Its snow, frost and
# motion blur differ too, by how they are drawn and not by how strong they are.
COCO_C = {"elastic_transform": ("elastic_warp", (12.5, 16.25, 21.25, 25.0, 30.0))}
QUICK = ("gaussian_noise", "defocus_blur", "contrast", "jpeg_compression")  # one of each family
SEVERITIES = range(1, 6)


def definitions() -> ModuleType:
    """`pipelines.corruptions`. ImportError if a package that it needs is missing."""
    return import_module("pipelines.corruptions")


def check_corruption(name: str, severity: int) -> None:
    """Raises ValueError for an unknown name or severity."""
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(
            f"corruption {name!r} at severity {severity}: known are {', '.join(NAMES)} at 1 to 5"
        )


def corrupt(
    image: np.ndarray,
    name: str,
    severity: int,
    seed: int = 0,
    index: int = 0,
    *,
    as_coco_c: bool = False,
) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (H, W, 3); a function of its arguments alone.

    `index` is the image's number: images of one seed draw differently. `as_coco_c`: as photographs
    for detection are corrupted.

    Raises:
        ValueError: an unknown name or severity.
        ImportError: a package that computes them is missing.
    """
    check_corruption(name, severity)
    corruption = CORRUPTIONS[name]
    definition = name
    of_all_severities = corruption.cifar10_c if is_small(image) else corruption.imagenet_c
    if as_coco_c and name in COCO_C:
        definition, of_all_severities = COCO_C[name]
    constants = of_all_severities[severity - 1]
    if not isinstance(constants, tuple):
        constants = (constants,)
    rng = np.random.default_rng([seed, index, NAMES.index(name), severity])
    define = getattr(definitions(), definition)
    x = define(image / 255, *constants, rng)
    return (x.clip(0, 1) * 255).astype(np.uint8)  # truncates, as published
