"""The rows of a step, the epochs and the rate of a recipe, fitted to the number of images.

A recipe that comes with the package cannot know whether it will see 60 photographs or a million.
What a user gives stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from fap.config import Config, config_tree, load_config
from fap.fields import fraction
from fap.methods import DEFAULT_METHOD, METHODS, Method
from fap.run.data import open_data

LEAST_STEPS = 8  # of an epoch, where there are enough images
FEWEST_STEPS = 4  # of an epoch, below which even a step of two groups is too much
STEPS = 1000  # of a run, that epochs are chosen for
EPOCHS = (10, 50)  # the least and the most of them
MANY_IMAGES = 1_000_000_000  # for which the most rows are chosen
MOST_ROWS = 128  # clean rows of a step
LEAST_GROUP = 8  # clean rows that are normalised together: fewer give poor statistics
MOST_GROUP = 64  # as in the paper

# Rate for ROWS clean rows, and the power of the rows with which it grows: linear for SGD, the root
# for optimisers that divide by the gradient's own size.
ROWS = 64
LR_ROWS = 256  # that `optim.lr` is given for
RATES = {"sgd": (0.01, 1.0), "adamw": (1e-4, 0.5), "lamb": (1e-3, 0.5)}


class Fitted(NamedTuple):
    """The fields that are fitted, by the names that they have in a config."""

    clean_batch: int
    group_rows: int
    epochs: int
    lr: float  # per LR_ROWS clean rows


FIELDS = {
    "clean_batch": "optim.clean_batch",
    "group_rows": "method.group_rows",
    "epochs": "budget.epochs",
    "lr": "optim.lr",
}


def fit(
    n_images: int,  # to train on
    method: Method,
    p_adv: Fraction | None,  # the method's field
    optimiser: str,  # a key of RATES
    given: Mapping[str, int | float],  # what stays, by the names of `Fitted`
    world: int = 1,  # ranks; each has whole groups
) -> Fitted:
    """As many rows as leave LEAST_STEPS steps an epoch, in two groups or more.

    One auxiliary group alone could not be shuffled. With few images there are fewer steps, then one
    group, but never groups in which p_adv makes less than two adversarial rows.
    """
    per_clean = method.adv_per_clean(p_adv)
    least = _least_group(per_clean)
    loaded = Fraction(1)  # rows per clean row
    if method.attacked == "own rows":
        loaded += per_clean
    clean_batch = int(given.get("clean_batch", 0))
    if not clean_batch:
        of_a_rank = int(given.get("group_rows", least))
        clean_batch = of_a_rank * world
        if world == 1 and n_images >= FEWEST_STEPS * 2 * clean_batch * loaded:
            clean_batch *= 2  # so that there is a second group to shuffle with
        while 2 * clean_batch <= MOST_ROWS and n_images >= LEAST_STEPS * 2 * clean_batch * loaded:
            clean_batch *= 2
    group_rows = int(given.get("group_rows", 0))
    if not group_rows:
        group_rows = _group_of(clean_batch, world, per_clean)
    steps = max(1, n_images // math.ceil(clean_batch * loaded))
    fewest, most = EPOCHS
    epochs = int(given.get("epochs", min(max(math.ceil(STEPS / steps), fewest), most)))
    rate, power = RATES[optimiser]
    here = rate * (clean_batch / ROWS) ** power
    lr = float(given.get("lr", float(f"{here * LR_ROWS / clean_batch:.3g}")))
    return Fitted(clean_batch, group_rows, epochs, lr)


def described(n_images: int, fitted: Fitted, given: Mapping[str, int | float]) -> str:
    """A line of the start: every number, and which of them the user gave."""
    told = []
    for name, field in FIELDS.items():
        value = getattr(fitted, name)
        of_whom = " (given)" if name in given else ""
        told.append(f"{field} {value:g}{of_whom}")
    return f"fitted     to {n_images:,} training images: {', '.join(told)}"


def _least_group(per_clean: Fraction) -> int:
    """Clean rows of the smallest group: LEAST_GROUP or more, with two whole adversarial rows."""
    least = LEAST_GROUP
    if per_clean:
        least = max(least, math.ceil(2 / per_clean))
    return math.ceil(least / per_clean.denominator) * per_clean.denominator


def _group_of(clean_batch: int, world: int, per_clean: Fraction) -> int:
    """The largest group, at most MOST_GROUP, of which a step has two or more; else the batch.

    Raises ValueError for a batch without whole groups, which only a user can ask for.
    """
    least = _least_group(per_clean)
    unit = per_clean.denominator
    fewest = math.ceil(2 / per_clean) if per_clean else 1
    of_a_rank = clean_batch // world
    for group in range(min(MOST_GROUP, of_a_rank), least - 1, -1):
        whole = of_a_rank % group == 0 and group % unit == 0
        if whole and clean_batch // group >= 2:
            return group
    if of_a_rank % unit or clean_batch % world or of_a_rank < fewest:
        raise ValueError(
            f"optim.clean_batch = {clean_batch}: must be a multiple of {unit * world} and at least "
            f"{fewest * world}, for whole groups of which p_adv makes two adversarial rows or more"
        )
    return of_a_rank


# ---------------------------------------------------------------------- of a recipe


def fitted_config(file: Path, words: Sequence[str], world: int = 1) -> tuple[Config, str]:
    """The config of a recipe with `key=value` words, fitted to its data; and what was fitted.

    Equal data and words give an equal config, so a run is resumed by the same command. Raises as
    `load_config` and `open_data`.
    """
    if not any(word.startswith(("model=", "model.name=", "model.init=")) for word in words):
        raise ValueError(
            f"{file.stem}: say which model: model=timm:convnext_tiny starts from published weights,"
            " model=convnext_tiny from random ones"
        )
    words = [*_in_place_of_a_part(words), *words]
    given = _given(words)
    config = _before_fitting(file, words, given, world)
    data = open_data(config)
    n_images = len(data.train)
    data.train.close()
    data.val.close()
    fitted = fit(
        n_images, config.method.entry, config.method.p_adv, config.optim.name, given, world
    )
    return load_config(file, [*_words_of(fitted), *words]), described(n_images, fitted, given)


def _before_fitting(
    file: Path, words: Sequence[str], given: Mapping[str, int | float], world: int
) -> Config:
    """The config with the most rows and epochs that are ever fitted, to open the data with.

    What a user's words contradict here, they contradict whatever the number of images.
    """
    method = config_tree(file, words).get("method", {})
    try:
        entry = METHODS[method.get("name", DEFAULT_METHOD)]
        p_adv = method.get("p_adv", entry.defaults.get("p_adv"))
        share = None if p_adv is None else fraction(p_adv)
    except (AttributeError, KeyError, TypeError, ValueError):
        return load_config(file, words)  # which says what is wrong with them
    fitted = fit(MANY_IMAGES, entry, share, "adamw", given, world)
    if "epochs" not in given:
        fitted = fitted._replace(epochs=EPOCHS[1])
    return load_config(file, [*_words_of(fitted), *words])


def _words_of(fitted: Fitted) -> list[str]:
    return [f"{FIELDS[name]}={value}" for name, value in fitted._asdict().items()]


def _in_place_of_a_part(words: Sequence[str]) -> list[str]:
    """Data to validate on replace the part that a recipe holds out."""
    named = {word.partition("=")[0] for word in words}
    if "data.val" in named and "data.val_share" not in named:
        return ["data.val_share=null"]
    return []


def _fitted_field(word: str) -> str | None:
    """Which field of `Fitted` a word sets."""
    key, _, _ = word.partition("=")
    for name, field in FIELDS.items():
        if field == key:
            return name
    return None


def _given(words: Sequence[str]) -> dict[str, int | float]:
    """The fields of `Fitted` that words set; what is no such number is left to the config."""
    given: dict[str, int | float] = {}
    for word in words:
        name = _fitted_field(word)
        if name is None:
            continue
        given.pop(name, None)
        try:
            value = float(word.partition("=")[2])
        except ValueError:
            continue
        if name == "lr" and 0 < value < math.inf:
            given[name] = value
        elif value >= 1 and value.is_integer():
            given[name] = int(value)
    return given
