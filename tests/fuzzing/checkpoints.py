"""Targets: a damaged checkpoint, and one whose checksum is right and whose metadata are false."""

# ruff: noqa: PT017  # an error is judged where it is met; not every input must raise one

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import numpy as np
import torch

from fap import checkpoint
from fap.evaluate import load
from fap.export.formats import export
from tests.fuzzing.damage import HOSTILE_JSON, mutate
from tests.fuzzing.intact import tiny_run
from tests.fuzzing.judge import ALLOWED, assert_says_where
from tests.hostile_meta import mutated, valid_meta

LENGTH = 8  # bytes of a safetensors file that hold the length of its header
CRC = b'"crc32":"'
LONGEST_MESSAGE = 1000  # characters


def fuzz_checkpoint(rng: np.random.Generator, folder: Path) -> str:
    """The newest of two: noticed, and the one before takes over."""
    said: list[str] = []
    keeper = checkpoint.Checkpoints(folder, say=said.append)
    for step in (1, 2):
        tensors = {
            "model.w": torch.full((5, 7), float(step)),
            "model.b": torch.arange(step),
            "loss": torch.tensor(0.5).half(),
        }
        path = keeper.save(step, tensors, {"config": {"seed": 1}, "step": step})
    good = path.read_bytes()
    end_of_header = LENGTH + int.from_bytes(good[:LENGTH], "little")
    end = len(good) if rng.random() < 0.5 else end_of_header
    bad, how = mutate(rng, good, 0, end)
    if rng.random() < 0.3:
        bad = with_false_value(rng, good, end_of_header)
        how = "value"
    if rng.random() < 0.6:
        forged = with_right_checksum(bad)
        if forged is not None:
            bad = forged
            how += " forged"
    path.write_bytes(bad)
    try:
        checkpoint.load(path)
    except ALLOWED as error:
        assert_says_where(error, path)
        assert bad != good
        found = keeper.newest()
        assert found is not None and found[2]["step"] == 1 and str(path) in said[0]
        return f"{how}: {error}"
    assert bad == good or "forged" in how, "damage was not noticed"
    return how


def with_false_value(rng: np.random.Generator, good: bytes, end_of_header: int) -> bytes:
    """One value of the header, or a whole entry, is something else."""
    tree = json.loads(good[LENGTH:end_of_header])
    node = tree
    if rng.random() < 0.7:
        node = tree[str(rng.choice(list(tree)))]
    node[str(rng.choice(list(node)))] = "@"
    text = json.dumps(tree, separators=(",", ":")).replace('"@"', str(rng.choice(HOSTILE_JSON)))
    header = text.encode()
    return len(header).to_bytes(LENGTH, "little") + header + good[end_of_header:]


def with_right_checksum(bad: bytes) -> bytes | None:
    """As another program might write it; None where there is no place for a checksum."""
    found = bad.find(CRC)
    at = found + len(CRC)
    if found < 0 or len(bad) < at + 8:
        return None
    zeros = bad[:at] + b"0" * 8 + bad[at + 8 :]
    return zeros[:at] + b"%08x" % zlib.crc32(zeros) + zeros[at + 8 :]


def fuzz_metadata(rng: np.random.Generator, folder: Path) -> str:
    """A checkpoint whose checksum is right and whose metadata are not a run's."""
    config, state = tiny_run()
    path = folder / "step_00000005.safetensors"
    valid = valid_meta(config, ["a", "b", "c"])
    meta = mutated(valid, random.Random(int(rng.integers(1 << 30))))
    checkpoint.save(path, state, meta)
    try:
        load.load_model(path)
        export(path, folder / "plain.safetensors")
    except (ValueError, checkpoint.DamagedCheckpoint) as error:
        assert path.name in str(error), repr(error)
        assert len(str(error)) < LONGEST_MESSAGE, str(error)[:3000]
        return f"{type(error).__name__}: {str(error)[-150:]}"
    return "accepted"
