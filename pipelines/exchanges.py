"""How rows of a step change places: shuffling BN."""

from __future__ import annotations

import numpy as np


def shuffled(
    rng: np.random.Generator,
    steps: int,
    n_groups: int,
    group_rows: int,
    scope: int,  # so many adjacent groups exchange rows; below 2 none do
) -> np.ndarray:
    """(steps, n_groups * group_rows): the row that comes to each place (section 3.2.2).

    A step permutes the rows inside each group at random. Then they are dealt to the groups of their
    scope, always in the same way: the random part decides which rows share a group.
    """
    n_rows = n_groups * group_rows
    dealt = np.arange(n_rows)  # place -> place before the dealing
    if scope < 2:
        return np.broadcast_to(dealt, (steps, n_rows))
    for first_group in range(0, n_groups, scope):
        # The last scope is short where the groups do not divide into whole scopes.
        of_this_scope = min(scope, n_groups - first_group)
        first_row = first_group * group_rows
        end_row = first_row + of_this_scope * group_rows
        dealt[first_row:end_row] = first_row + _dealt(of_this_scope, group_rows)
    return permuted(rng, steps, n_groups, group_rows)[:, dealt]


def _dealt(n_groups: int, group_rows: int) -> np.ndarray:
    """(n_groups * group_rows,): which row comes to each place of a scope, without chance."""
    group, row = np.divmod(np.arange(n_groups * group_rows), group_rows)
    if n_groups >= 3:
        # To the other groups in turn: every row leaves its group.
        target = (group + 1 + row % (n_groups - 1)) % n_groups
    else:
        # Two groups exchange every other row: moving all would shuffle nothing.
        target = (group + row % n_groups) % n_groups
    # Sorted by target, the first `group_rows` entries are what the first group receives, and so on.
    return np.argsort(target, kind="stable")


def permuted(rng: np.random.Generator, steps: int, n_groups: int, group_rows: int) -> np.ndarray:
    """(steps, n_groups * group_rows): the rows of every group permuted inside it."""
    keys = rng.random((steps, n_groups, group_rows), dtype=np.float32)
    inside = keys.argsort(-1, kind="stable")
    first_row = np.arange(n_groups)[:, None] * group_rows
    return (inside + first_row).reshape(steps, n_groups * group_rows)
