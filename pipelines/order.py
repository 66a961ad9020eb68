"""Which image each row of an epoch shows: shuffled or balanced, once or several times.

An epoch has as many steps whatever is drawn: where images are repeated, fewer of them are shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from pipelines.plan_spec import PlanSpec

Sampling = Literal["shuffle", "balanced"]


def drawn(
    spec: PlanSpec,
    rng: np.random.Generator,
    n_images: int,
    steps: int,
    labels: np.ndarray | None,  # integers (n_images,): for `sampling: balanced`
) -> np.ndarray:
    """uint32 (steps, B): sample numbers.

    Raises:
        ValueError: balanced, and there are no labels.
    """
    of_a_step = -(-spec.loaded_rows // spec.repeats)  # the last one may be repeated less often
    n_shown = steps * of_a_step
    if spec.sampling == "balanced":
        if labels is None:
            raise ValueError("sampling = 'balanced': takes the labels of the images")
        order = balanced(rng, labels, n_shown).astype(np.uint32)
    else:
        order = rng.permutation(np.arange(n_images, dtype=np.uint32))[:n_shown]
    if spec.repeats == 1:
        return order.reshape(steps, spec.loaded_rows)
    in_a_row = np.repeat(order.reshape(steps, of_a_step), spec.repeats, axis=1)
    return in_a_row[:, : spec.loaded_rows][:, _dealt(spec)]


def balanced(
    rng: np.random.Generator,
    labels: np.ndarray,  # integers (n_images,)
    n_shown: int,
) -> np.ndarray:  # int64 (n_shown,)
    """Every class that has images equally often, to one; which classes get one more is drawn.

    Of a class no image is shown again before all of it have been shown; with more images than
    places a random part of them is.
    """
    _, class_of, n_images_of = np.unique(labels, return_inverse=True, return_counts=True)
    n_classes = len(n_images_of)
    quota = np.full(n_classes, n_shown // n_classes)
    quota[rng.permutation(n_classes)[: n_shown % n_classes]] += 1
    # The images of a class one after the other, in random order inside it.
    order = rng.permutation(len(labels))
    order = order[np.argsort(class_of[order], kind="stable")]
    of_class = class_of[order]
    first = np.cumsum(n_images_of) - n_images_of
    place = np.arange(len(order)) - first[of_class]
    whole, rest = np.divmod(quota, n_images_of)
    n_times = whole[of_class] + (place < rest[of_class])
    return rng.permutation(np.repeat(order, n_times))


def _dealt(spec: PlanSpec) -> np.ndarray:
    """(B,): which place of a sequence comes to each row of a step.

    Neighbours go to groups that follow each other, as repeated augmentation deals them to ranks
    (Hoffer et al., CVPR 2020; DeiT's RASampler). So the repeats of an image are trained in one
    step, and meet in no batch norm if there are as many groups as repeats.
    """
    clean = _in_turn(spec.clean_groups, spec.clean_group_rows)
    if spec.loaded_rows == spec.clean_rows:
        return clean
    adv = _in_turn(spec.adv_groups, spec.adv_group_rows)
    return np.concatenate([clean, spec.clean_rows + adv])


def _in_turn(n_groups: int, group_rows: int) -> np.ndarray:
    """(n_groups * group_rows,): row r of group g has place r * n_groups + g."""
    return np.arange(n_groups * group_rows).reshape(group_rows, n_groups).T.ravel()
