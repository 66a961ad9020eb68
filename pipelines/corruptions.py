"""The definitions of ImageNet-C's 19 corruptions; their constants are in `corrupt.py`.

Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019) and its published generators. Motion blur is ImageMagick's, which the
generators call.

It imports packages that only corruptions need, and is imported when one is computed.

A definition takes an image x, float (H, W, 3) where 0 is black and 1 white, its constants and a
random generator. It returns the same, not yet clipped.
"""

import importlib.util
import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.corrupt import is_small
from pipelines.extras import needs
from pipelines.pixel_moves import copy_neighbours

with needs("corruptions", "computing corruptions"):
    import cv2
    from scipy.ndimage import gaussian_filter, map_coordinates

Rng = np.random.Generator

RGB_TO_GREY = (0.299, 0.587, 0.114)
MUD_255 = np.array([63, 42, 20])  # colours of spatter
WATER_255 = np.array([175, 238, 238])


# ------------------------------------------------------------------ noise


def gaussian_noise(x: np.ndarray, sigma: float, rng: Rng) -> np.ndarray:
    return x + sigma * rng.standard_normal(x.shape)


def shot_noise(x: np.ndarray, photons: float, rng: Rng) -> np.ndarray:
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, share: float, rng: Rng) -> np.ndarray:
    hit = rng.random(x.shape) <= share
    salt = rng.random(x.shape) <= 0.5  # else pepper
    return np.where(hit, salt, x)


def speckle_noise(x: np.ndarray, sigma: float, rng: Rng) -> np.ndarray:
    return x + x * sigma * rng.standard_normal(x.shape)


# ------------------------------------------------------------------ blur


def _gauss(
    x: np.ndarray, sigma: float, cut: float = 4, border: int = cv2.BORDER_REPLICATE
) -> np.ndarray:
    """A Gaussian filter with scipy's kernel, which ends `cut` sigmas from its centre."""
    side = 2 * int(cut * sigma + 0.5) + 1
    # OpenCV takes a sigma of 0 for "choose one". The kernel is then a single 1, whatever sigma.
    kernel = cv2.getGaussianKernel(side, sigma or 1)
    return cv2.sepFilter2D(x, -1, kernel, kernel, borderType=border)


def gaussian_blur(x: np.ndarray, sigma: float, rng: Rng) -> np.ndarray:
    return _gauss(x, sigma)


def defocus_blur(x: np.ndarray, radius: float, sigma: float, rng: Rng) -> np.ndarray:
    """A disk whose edge is smoothed a little."""
    reach = max(8, int(radius))
    line = np.arange(-reach, reach + 1) ** 2
    disk = (line[:, None] + line <= radius**2).astype(np.float32)
    side = 3 if radius <= 8 else 5
    return cv2.filter2D(x, -1, cv2.GaussianBlur(disk / disk.sum(), (side, side), sigma))


def glass_blur(x: np.ndarray, sigma: float, reach: int, rounds: int, rng: Rng) -> np.ndarray:
    """Pixels change places with neighbours up to `reach` away, between two Gaussian filters."""
    h, w = x.shape[:2]
    cells = np.arange(h * w).reshape(h, w)  # pixels by number, row by row
    visit = cells[h - reach : reach : -1, w - reach : reach : -1].ravel()  # from the last one back
    pixel = cells.ravel()  # place -> the pixel that lies there
    for _ in range(rounds):
        dx, dy = rng.integers(-reach, reach, (2, len(visit)))
        # The generator's swap, being one of numpy views, only copies the neighbour.
        copy_neighbours(pixel, visit, visit + dy * w + dx)
    grey_levels = np.floor(_gauss(x, sigma) * 255)
    moved = grey_levels.reshape(-1, 3)[pixel].reshape(x.shape)
    return _gauss(moved / 255, sigma)


def _streak(x: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """One-sided motion blur of (H, W, C); pixels of the edge are repeated."""
    h, w = x.shape[:2]
    n = 2 * radius + 1
    taps = np.arange(n)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    weights /= weights.sum()
    # The margin is as wide as the streak is long, so that no tap leaves the padded image.
    angle = np.deg2rad(degrees)
    tops = n + np.ceil(taps * np.sin(angle) - 0.5).astype(int)
    lefts = n + np.ceil(taps * np.cos(angle) - 0.5).astype(int)
    padded = np.pad(x, ((n, n), (n, n), (0, 0)), mode="edge")
    total = np.zeros(x.shape)
    for weight, top, left in zip(weights, tops, lefts, strict=True):
        total += weight * padded[top : top + h, left : left + w]
    return total


def motion_blur(x: np.ndarray, radius: int, sigma: float, rng: Rng) -> np.ndarray:
    return np.rint(_streak(x, radius, sigma, rng.uniform(-45, 45)) * 255) / 255


def _zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """The centre of (H, W, C) enlarged by `factor` >= 1, trimmed to (H, W, C).

    Linear, corners aligned: as scipy.ndimage.zoom of order 1.
    """
    for _ in range(2):  # along the rows, then along the columns
        side = len(x)
        crop = int(np.ceil(side / factor))
        full = round(crop * factor)
        # Of `full` enlarged pixels the middle `side` are kept; `at` is where each lies in the crop.
        step = (crop - 1) / max(1, full - 1)
        at = (side - crop) // 2 + (np.arange(side) + (full - side) // 2) * step
        low = at.astype(int).clip(0, max(0, side - 2))
        high = np.minimum(low + 1, side - 1)
        share = (at - low)[:, None, None]
        x = (x[low] * (1 - share) + x[high] * share).swapaxes(0, 1)
    return x


def zoom_blur(x: np.ndarray, end: float, step: float, rng: Rng) -> np.ndarray:
    factors = np.arange(1, end, step)
    zoomed = sum(_zoom(x, factor) for factor in factors)
    return (x + zoomed) / (len(factors) + 1)


# ------------------------------------------------------------------ weather


def snow(
    x: np.ndarray,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    keep: float,  # of the image; the rest of it is whitened
    rng: Rng,
) -> np.ndarray:
    flakes = _zoom(rng.normal(mean, deviation, (*x.shape[:2], 1)), zoom)
    flakes = np.floor(np.where(flakes < threshold, 0, flakes).clip(0, 1) * 255)
    flakes = np.rint(_streak(flakes, radius, sigma, rng.uniform(-135, -45))) / 255
    grey = (x @ RGB_TO_GREY)[..., None]
    return keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5) + flakes + flakes[::-1, ::-1]


@lru_cache
def _frost_photos(scale: float) -> list[np.ndarray]:
    """Five photos of frost, RGB; the published generators never draw the sixth."""
    # Found and not imported: its photos are all we need.
    package = importlib.util.find_spec("imagecorruptions")
    if package is None or package.origin is None:
        raise ValueError(
            "corruption 'frost' needs photos: pip install --no-deps imagecorruptions-imaug"
        )
    folder = Path(package.origin).with_name("frost")
    names = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
    photos = [np.asarray(Image.open(folder / name).convert("RGB")) for name in names]
    return [cv2.resize(photo, None, fx=scale, fy=scale) for photo in photos]


def frost(x: np.ndarray, image: float, overlay: float, rng: Rng) -> np.ndarray:
    """A part of a photo of frost over the image."""
    h, w = x.shape[:2]
    photos = _frost_photos(0.2 if is_small(x) else 1.0)
    ice = photos[rng.integers(len(photos))]
    # The published images are smaller than every photo; larger ones need it enlarged.
    grow = max(h / ice.shape[0], w / ice.shape[1])
    if grow > 1:
        ice = cv2.resize(ice, None, fx=grow, fy=grow)
    top = rng.integers(ice.shape[0] - h + 1)
    left = rng.integers(ice.shape[1] - w + 1)
    return image * x + overlay * ice[top : top + h, left : left + w] / 255


def _plasma(side: int, decay: float, rng: Rng) -> np.ndarray:
    """Diamond-square height map on a torus, (side, side) in [0, 1]; `side` a power of two."""
    field = np.zeros((side, side))
    step = side
    swing = 100.0
    while step > 1:
        # Points `step` apart are known. Those in the middle of four of them come first, then those
        # in the middle of an edge, which also lie between two of the former.
        half = step // 2
        corners = field[::step, ::step]
        jitter = swing * rng.uniform(-swing, swing, (3, *corners.shape))
        below = np.roll(corners, -1, 0)
        right = np.roll(corners, -1, 1)
        below_right = np.roll(below, -1, 1)
        centres = (corners + below + right + below_right) / 4 + jitter[0]
        above_centres = np.roll(centres, 1, 0)
        left_centres = np.roll(centres, 1, 1)
        field[half::step, half::step] = centres
        field[::step, half::step] = (corners + right + centres + above_centres) / 4 + jitter[1]
        field[half::step, ::step] = (corners + below + centres + left_centres) / 4 + jitter[2]
        step = half
        swing /= decay
    return (field - field.min()) / np.ptp(field)


def fog(x: np.ndarray, thickness: float, decay: float, rng: Rng) -> np.ndarray:
    h, w = x.shape[:2]
    side = 1 << (max(x.shape) - 1).bit_length()  # the next power of two
    haze = thickness * _plasma(side, decay, rng)
    return (x + haze[:h, :w, None]) * x.max() / (x.max() + thickness)


def spatter(
    x: np.ndarray,
    mean: float,
    deviation: float,
    sigma: float,
    threshold: float,
    strength: float,
    mud: int,  # 1 for mud, 0 for water
    rng: Rng,
) -> np.ndarray:
    liquid = _gauss(rng.normal(mean, deviation, x.shape[:2]), sigma)
    if mud:
        cover = _gauss((liquid > threshold).astype(np.float64), strength)[..., None]
        return np.where(cover < 0.8, x, x * (1 - cover) + cover * MUD_255 / 255)
    # Water: bright where a drop is thick, and shaded along its edge by an embossing filter.
    drops = (np.where(liquid < threshold, 0, liquid).clip(0, 1) * 255).astype(np.uint8)
    from_edge = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
    depth = np.minimum(from_edge, 20)
    relief = cv2.equalizeHist(cv2.blur(depth, (3, 3)).astype(np.uint8))
    light = np.array([(-2, -1, 0), (-1, 1, 1), (0, 1, 2)], np.float32)
    embossed = cv2.blur(cv2.filter2D(relief, cv2.CV_8U, light), (3, 3))
    shade = drops * embossed.astype(np.float64)
    # Without a drop the published generator divides by zero.
    shade *= strength / max(shade.max(), 1)
    return x + shade[..., None] * WATER_255 / 255


# ------------------------------------------------------------------ colour


def _hsv(x: np.ndarray, channel: int, factor: float, offset: float) -> np.ndarray:
    hsv = cv2.cvtColor(x.astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., channel] = (hsv[..., channel] * factor + offset).clip(0, 1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def brightness(x: np.ndarray, offset: float, rng: Rng) -> np.ndarray:
    return _hsv(x, channel=2, factor=1, offset=offset)


def saturate(x: np.ndarray, factor: float, offset: float, rng: Rng) -> np.ndarray:
    return _hsv(x, channel=1, factor=factor, offset=offset)


def contrast(x: np.ndarray, factor: float, rng: Rng) -> np.ndarray:
    return x * factor + x.mean((0, 1)) * (1 - factor)


# ------------------------------------------------------------------ digital


def elastic_transform(
    x: np.ndarray, amplitude: float, sigma: float, jitter: float, rng: Rng
) -> np.ndarray:
    """Three points move and the image with them; then every pixel does, as its neighbours do."""
    h, w = x.shape[:2]
    # Pixels in which the constants count; 244 (sic, not 224). They are for sides of 32 and 224
    # pixels: what is narrower would be torn to pieces by them.
    shorter = min(h, w)
    unit = 244 * min(224, shorter) / 224
    if is_small(x):
        unit = min(32, shorter)
    amplitude *= unit
    sigma *= unit
    jitter *= unit

    middle = np.array([w, h]) // 2
    corners = np.array([(1, 1), (1, -1), (-1, -1)])
    before = (middle + max(1, shorter // 3) * corners).astype(np.float32)
    after = (before + rng.uniform(-jitter, jitter, before.shape)).astype(np.float32)
    affine = cv2.getAffineTransform(before, after)
    moved = cv2.warpAffine(x, affine, (w, h), borderMode=cv2.BORDER_REFLECT_101)

    dx = _gauss(rng.uniform(-1, 1, (h, w)), sigma, 3, cv2.BORDER_REFLECT) * amplitude
    dy = _gauss(rng.uniform(-1, 1, (h, w)), sigma, 3, cv2.BORDER_REFLECT) * amplitude
    at = np.mgrid[:h, :w] + [dy, dx]
    channels = [map_coordinates(moved[..., k], at, order=1, mode="reflect") for k in range(3)]
    return np.stack(channels, 2)


def elastic_warp(x: np.ndarray, amplitude: float, rng: Rng) -> np.ndarray:
    """COCO-C's elastic_transform: every pixel moves a little, as its neighbours do.

    ImageNet-C's moves whole photographs by tens of pixels, and objects away from their boxes.
    """
    h, w = x.shape[:2]
    most = 0.005 * h  # pixels, before smoothing; of the height along both axes, as published
    dx, dy = (
        gaussian_filter(rng.uniform(-most, most, (h, w)), (0.01 * h, 0.01 * w), truncate=3)
        for _ in range(2)
    )
    at = np.mgrid[:h, :w] + amplitude * np.stack([dy, dx])
    channels = [map_coordinates(x[..., k], at, order=1, mode="reflect") for k in range(3)]
    return np.stack(channels, 2)


def _pil(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(x * 255).astype(np.uint8))


def pixelate(x: np.ndarray, share: float, rng: Rng) -> np.ndarray:
    h, w = x.shape[:2]
    sides = (max(1, int(w * share)), max(1, int(h * share)))
    coarse = _pil(x).resize(sides, Image.Resampling.BOX)
    return np.asarray(coarse.resize((w, h), Image.Resampling.BOX)) / 255


def jpeg_compression(x: np.ndarray, quality: int, rng: Rng) -> np.ndarray:
    file = io.BytesIO()
    _pil(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255
