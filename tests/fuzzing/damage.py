"""What may happen to bytes on their way: flipped bits, cuts, exchanged parts, false numbers."""

from __future__ import annotations

import numpy as np

# Numbers at which programs break: the borders of the integer types.
EXTREME = [
    0, 1, 2, 3, 127, 128, 255, 32767, 32768, 65535,
    1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1,
]  # fmt: skip

HOSTILE_JSON = [
    "null", "-1", "0", "1e999", "NaN", "Infinity", '""', '"!"', "[]", "{}", "[1]", "9" * 40,
    "9" * 5000, "true", "[" * 100_000, '"AAAA"', '"\\ud800"', '{"a": 1}', "12", "13", "1.5",
]  # fmt: skip

# Listed as often as they shall come.
WAYS = [
    "flip", "flip", "truncate", "zero", "swap", "integer", "integer", "garbage", "replace",
    "insert",
]  # fmt: skip
NEAR_THE_START = 700  # bytes: headers and tables lie there
LONGEST_SWAP = 1000  # bytes: a whole image that changed places cannot be told from the right one


def mutate(
    rng: np.random.Generator, data: bytes, low: int = 0, high: int | None = None
) -> tuple[bytes, str]:
    """`data` with one damage inside [low, high), and its name. Half of them are near the start."""
    bad = bytearray(data)
    if high is None:
        high = len(bad)
    longest = max(2, min(high - low, int(rng.choice([4, 64, 1024, 1 << 20]))))
    length = min(int(rng.integers(1, longest)), high - low)

    def place(size: int) -> int:
        end = high - size + 1
        if rng.random() < 0.5:
            end = min(end, low + NEAR_THE_START)
        return int(rng.integers(low, max(low + 1, end)))

    how = str(rng.choice(WAYS))
    at = place(length)
    match how:
        case "flip":
            for _ in range(rng.integers(1, 9)):
                bad[place(1)] ^= 1 << int(rng.integers(8))
        case "truncate":
            del bad[at:]
        case "zero":
            bad[at : at + length] = bytes(length)
        case "swap":
            length = max(1, min(length, (high - low) // 2, LONGEST_SWAP))
            exchange(bad, place(length), place(length), length)
        case "integer":
            size = int(rng.choice([1, 2, 4, 8]))
            near = [len(data) - 1, len(data), len(data) + 1]
            value = int(rng.choice(np.array(EXTREME + near, np.uint64))) % (1 << 8 * size)
            at = place(size)
            order = "little" if rng.random() < 0.6 else "big"
            bad[at : at + size] = value.to_bytes(size, order)[: len(bad) - at]
        case "garbage":
            bad[at : at + length] = rng.bytes(length)
        case "insert":
            bad[at:at] = rng.bytes(length)
        case "replace":
            bad = bytearray()
            if rng.random() < 0.5:
                bad += rng.bytes(int(rng.integers(0, 4000)))
    return bytes(bad), how


def exchange(bad: bytearray, a: int, b: int, length: int) -> None:
    """Two parts of this length change places, unless they overlap."""
    if abs(a - b) >= length:
        former = bad[a : a + length]
        bad[a : a + length] = bad[b : b + length]
        bad[b : b + length] = former
