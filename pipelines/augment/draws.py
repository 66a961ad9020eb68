"""The augmentation of an epoch, drawn row by row: bytes beside an image's window, no pixels."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from pipelines.augment.policies import AUTOAUGMENT, CHAIN_DEPTH, CHAINS, SIGNED, SPACES, Op
from pipelines.augment.spec import AugmentSpec, ColorJitter

NO_CHANGE = (1.0, 1.0, 1.0, 0.0)  # of the colours
ERASE_AREA = (0.02, 0.33)  # of the canvas, as torchvision's RandomErasing
ERASE_RATIO = (0.3, 3.3)  # height / width
ERASE_TRIES = 10
KEYS = 2**31  # as those of the attack's noise: int32, not negative


@dataclass(frozen=True, eq=False)
class AugmentDraws:
    """What is done to each row, in this order. What a run does without takes no memory: (.., 0)."""

    # uint8 (steps, B, n): operations, one after the other; `Op.IDENTITY` changes nothing. With
    # augmix CHAINS times CHAIN_DEPTH of them, chain after chain.
    op: np.ndarray
    # int8 (steps, B, n): bins of their magnitudes, with a sign where the operation has two ways.
    level: np.ndarray
    # float32 (steps, B, 1 + CHAINS), sums to 1: shares of the image and its chains. Of augmix.
    share: np.ndarray
    # float32 (steps, B, 4): factors of brightness, contrast, saturation; turn of the hue.
    colour: np.ndarray
    # uint8 (steps, B, 4): which of the four comes first, second, ...
    colour_order: np.ndarray
    # int16 (steps, B, 4): top, left, bottom, right of what is erased, in pixels; may be empty.
    erase_box: np.ndarray
    # int32 (steps, B, 1), >= 0: seeds the noise in the box.
    erase_key: np.ndarray

    def of_rows(self, rows: np.ndarray) -> AugmentDraws:
        """Of some rows of every step."""
        taken = {field.name: getattr(self, field.name)[:, rows] for field in fields(self)}
        return AugmentDraws(**taken)


def drawn(
    spec: AugmentSpec,
    ops_rng: np.random.Generator,
    colour_rng: np.random.Generator,
    erase_rng: np.random.Generator,
    *,
    steps: int,
    chosen: np.ndarray,  # bool (B,): the rows of a step that are augmented
    sides: tuple[int, int],  # of the canvas: height, width
) -> AugmentDraws:
    """Draw an epoch. What a row gets does not depend on which others are chosen."""
    n = steps * len(chosen)
    op, level, share = _operations(spec, ops_rng, n)
    colour, colour_order = _colours(spec.color_jitter, colour_rng, n)
    erase_box, erase_key = _erasing(spec.erase, erase_rng, n, sides)

    def by_step(values: np.ndarray) -> np.ndarray:
        return values.reshape(steps, len(chosen), values.shape[1])

    found = AugmentDraws(
        op=by_step(op),
        level=by_step(level),
        share=by_step(share),
        colour=by_step(colour),
        colour_order=by_step(colour_order),
        erase_box=by_step(erase_box),
        erase_key=by_step(erase_key),
    )
    others = ~chosen
    found.op[:, others] = Op.IDENTITY
    if spec.policy == "augmix":
        found.share[:, others] = [1.0, *[0.0] * CHAINS]
    if spec.color_jitter is not None:
        found.colour[:, others] = NO_CHANGE
    found.erase_box[:, others] = 0
    return found


# ---------------------------------------------------------------------- operations


def _operations(
    spec: AugmentSpec, rng: np.random.Generator, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`op` (n, k), `level` (n, k) and `share` (n, 1 + CHAINS or 0) of n rows."""
    share = np.empty((n, 0), np.float32)
    match spec.policy:
        case None:
            return np.empty((n, 0), np.uint8), np.empty((n, 0), np.int8), share
        case "autoaugment":
            op, bins = _pairs(rng, n)
        case "augmix":
            op = _any_of(SPACES["augmix"].ops, rng, (n, CHAINS, CHAIN_DEPTH))
            depth = rng.integers(1, CHAIN_DEPTH + 1, (n, CHAINS, 1), dtype=np.int8)
            op[np.arange(CHAIN_DEPTH) >= depth] = Op.IDENTITY
            op = op.reshape(n, -1)
            bins = rng.integers(0, spec.magnitude, op.shape, dtype=np.int8)
            share = _shares(rng, n)
        case "trivialaugment":
            space = SPACES["trivialaugment"]
            op = _any_of(space.ops, rng, (n, 1))
            bins = rng.integers(0, space.bins, op.shape, dtype=np.int8)
        case "randaugment":
            op = _any_of(SPACES["randaugment"].ops, rng, (n, spec.n_ops))
            bins = np.full(op.shape, spec.magnitude, np.int8)
    signed = np.isin(op, list(SIGNED))
    backwards = signed & (rng.random(op.shape, dtype=np.float32) < 0.5)
    return op, np.where(backwards, -bins, bins), share


def _any_of(ops: tuple[Op, ...], rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """uint8: one of `ops` in each place, all as likely."""
    return np.array(ops, np.uint8)[rng.integers(0, len(ops), shape, dtype=np.uint8)]


def _pairs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Operations and bins (n, 2) of AutoAugment: of one pair each that happens."""
    table = np.array(AUTOAUGMENT)  # (pairs, 2, 3): operation, probability, bin
    pair = rng.integers(0, len(table), n, dtype=np.uint8)
    happens = rng.random((n, 2)) <= table[pair, :, 1]
    op = np.where(happens, table[pair, :, 0], Op.IDENTITY).astype(np.uint8)
    return op, table[pair, :, 2].astype(np.int8)


def _shares(rng: np.random.Generator, n: int) -> np.ndarray:
    """float32 (n, 1 + CHAINS): of AugMix with alpha = 1, all of whose distributions are uniform."""
    own = rng.random((n, 1), dtype=np.float32)
    # Of uniform numbers that are sorted the distances have the flat Dirichlet distribution.
    edges = np.sort(rng.random((n, CHAINS - 1), dtype=np.float32), 1)
    chains = np.diff(edges, axis=1, prepend=np.float32(0), append=np.float32(1))
    return np.concatenate([own, (1 - own) * chains], 1)


# ---------------------------------------------------------------------- colours


def _colours(
    jitter: ColorJitter | None, rng: np.random.Generator, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """`colour` and `colour_order` (n, 4), as torchvision's ColorJitter.get_params draws them."""
    if jitter is None:
        return np.empty((n, 0), np.float32), np.empty((n, 0), np.uint8)
    low = np.maximum(np.subtract(NO_CHANGE, jitter), [0.0, 0.0, 0.0, -0.5])
    high = np.add(NO_CHANGE, jitter)
    share = rng.random((n, 4), dtype=np.float32)
    colour = low.astype(np.float32) + share * (high - low).astype(np.float32)
    order = rng.permuted(np.tile(np.arange(4, dtype=np.uint8), (n, 1)), axis=1)
    return colour, order


# ---------------------------------------------------------------------- erasing


def _erasing(
    probability: float, rng: np.random.Generator, n: int, sides: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """`erase_box` (n, 4) and `erase_key` (n, 1), as torchvision's RandomErasing.get_params draws.

    Area and ratio are drawn until the box is smaller than the canvas, ten times at most; else
    nothing is erased.
    """
    if not probability:
        return np.empty((n, 0), np.int16), np.empty((n, 0), np.int32)
    height, width = sides
    box = np.zeros((n, 4), np.int16)
    key = rng.integers(0, KEYS, (n, 1), dtype=np.int32)
    todo = np.flatnonzero(rng.random(n, dtype=np.float32) < probability)
    # The ratio is uniform in its logarithm. Its root suffices, as for windows.
    log_root_low, log_root_high = 0.5 * np.log(ERASE_RATIO)
    for _ in range(ERASE_TRIES):
        side = np.sqrt(rng.uniform(*ERASE_AREA, len(todo)) * height * width)
        root = np.exp(rng.uniform(log_root_low, log_root_high, len(todo)))
        down = np.rint(side * root)
        across = np.rint(side / root)
        top = np.floor(rng.random(len(todo)) * (height - down + 1))
        left = np.floor(rng.random(len(todo)) * (width - across + 1))
        fits = (down < height) & (across < width)
        found = np.stack([top, left, top + down, left + across], 1)
        box[todo[fits]] = found[fits]
        todo = todo[~fits]
    return box, key
