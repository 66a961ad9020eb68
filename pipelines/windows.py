"""The windows of a plan: what of each image a row shows, and where on the canvas.

A window is (top, left, height, width) in pixels of the image; it may reach outside. A place is the
same of the canvas, which is what a row shows: there the window lands. Only `letterbox` leaves some
of the canvas empty; the places of `centred` reach outside it.
"""

from __future__ import annotations

import numpy as np

CROP_TRIES = 10  # as torchvision's RandomResizedCrop


def random_resized(
    rng: np.random.Generator,
    heights: np.ndarray,  # (n,) pixels
    widths: np.ndarray,  # (n,) pixels
    scale: tuple[float, float],  # of the image's area
    ratio: tuple[float, float],  # width / height
) -> np.ndarray:
    """Windows (n, 4) as torchvision's RandomResizedCrop.get_params draws them.

    Area and aspect ratio are drawn until the window lies inside the image, ten times at most; then
    the centre is taken.
    """
    window = np.empty((len(heights), 4), np.int32)
    # The ratio is uniform in its logarithm. Its root suffices: width = side * root and
    # height = side / root have the ratio root^2.
    log_root_low, log_root_high = 0.5 * np.log(ratio)

    # Each try draws for all rows that are still without a window at once.
    todo = np.arange(len(heights))
    for _ in range(CROP_TRIES):
        n = len(todo)
        H, W = heights[todo], widths[todo]
        side = np.sqrt(rng.uniform(*scale, n) * H * W)
        root = np.exp(rng.uniform(log_root_low, log_root_high, n))
        width = np.rint(side * root)
        height = np.rint(side / root)
        top = np.floor(rng.random(n) * (H - height + 1))
        left = np.floor(rng.random(n) * (W - width + 1))
        # Rows that failed hold nonsense until a later try or the fallback overwrites them.
        window[todo] = np.stack([top, left, height, width], 1)
        todo = todo[(width < 1) | (width > W) | (height < 1) | (height > H)]

    # The largest centred window whose ratio is allowed.
    H, W = heights[todo], widths[todo]
    height = np.minimum(H, np.rint(W / ratio[0]))
    width = np.minimum(W, np.rint(H * ratio[1]))
    window[todo] = np.stack([(H - height) // 2, (W - width) // 2, height, width], 1)
    return window


def padded(
    rng: np.random.Generator,
    heights: np.ndarray,  # (n,) pixels
    widths: np.ndarray,  # (n,) pixels
    size: int,
    pad: int,  # pixels on each side
) -> np.ndarray:
    """Windows (n, 4) of the output's size, anywhere in the image with `pad` pixels around it.

    Raises:
        ValueError: an image that is smaller than a window, its padding included.
    """
    room = np.stack([heights, widths], 1) + 2 * pad - size + 1  # (n, 2) places
    if room.min() < 1:
        at = np.argmin(room.min(1))
        raise ValueError(
            f"size = {size}: an image of {heights[at]}x{widths[at]} plus pad {pad} is smaller"
        )
    corner = np.floor(rng.random(room.shape) * room) - pad
    return np.concatenate([corner, np.full_like(corner, size)], 1)


def centred(
    heights: np.ndarray,  # (n,) pixels
    widths: np.ndarray,  # (n,) pixels
    size: int,
    resize: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Windows (n, 4) and places (n, 4) of torchvision's Resize(resize), then CenterCrop(size).

    The windows are whole images; the places, where these lie once their shorter side is `resize`,
    as seen from the centre square that is cut out. So a place covers the canvas, and may reach
    outside it on all sides.
    """
    image = np.stack([heights, widths], 1).astype(np.float64)  # (n, 2), as all below
    shorter = image.min(1, keepdims=True)
    # Both round as Python's int() and round() do there: down, and halves to even.
    resized = np.where(image == shorter, resize, np.floor(resize * image / shorter))
    corner = np.rint((resized - size) / 2)
    window = np.concatenate([np.zeros_like(image), image], 1)
    place = np.concatenate([-corner, resized], 1)
    return window, place


def letterbox(
    rng: np.random.Generator,
    heights: np.ndarray,  # (n,) pixels
    widths: np.ndarray,  # (n,) pixels
    canvas: tuple[int, int],  # height, width
    jitter: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Windows (n, 4) and places (n, 4): whole images that keep their aspect ratio.

    Each is enlarged or shrunk until it just fits into the canvas, then by a random factor in
    `jitter`, and lies at the canvas' top left corner. Along a side on which it is then larger than
    the canvas a random part of it fills the canvas. With a jitter of (1, 1) nothing is random.
    """
    image = np.stack([heights, widths], 1).astype(np.float64)  # (n, 2), as all below
    room = np.array(canvas, np.float64)
    factor = (room / image).min(1) * rng.uniform(*jitter, len(image))
    factor = factor[:, None]
    fitted = np.maximum(np.rint(image * factor), 1)
    shown = np.minimum(fitted, room)

    too_large = fitted > room
    part = np.where(too_large, np.rint(room / factor).clip(1, image), image)
    corner = np.floor(rng.random(image.shape) * (image - part + 1))
    window = np.concatenate([corner, part], 1)
    place = np.concatenate([np.zeros_like(shown), shown], 1)
    return window, place
