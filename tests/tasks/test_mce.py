"""The means over corruptions, on numbers whose means are known."""

import pytest

from fap.tasks.mce import ALEXNET_ERRORS, EXTRA, MEANS, mce, raw_mean
from pipelines.corrupt import NAMES


def test_mce() -> None:
    assert mce(ALEXNET_ERRORS, 0) == pytest.approx(100.0)
    assert mce({name: e / 2 for name, e in ALEXNET_ERRORS.items()}, 0) == pytest.approx(50.0)
    one_worse = ALEXNET_ERRORS | {"fog": 2 * ALEXNET_ERRORS["fog"]}
    assert mce(one_worse, 0) == pytest.approx(100 * 16 / 15)
    assert mce(one_worse, 0.5) == mce(one_worse, 0)
    with pytest.raises(ValueError, match="missing: fog"):
        mce({name: e for name, e in ALEXNET_ERRORS.items() if name != "fog"}, 0)


def test_the_plain_mean_is_in_percent() -> None:
    assert raw_mean({"fog": 0.25, "snow": 0.5}, 0.1) == pytest.approx(37.5)


def test_every_mean_covers_known_corruptions() -> None:
    assert (*ALEXNET_ERRORS, *EXTRA) == NAMES
    assert [len(mean.corruptions) for mean in MEANS] == [15, 19, 15]
    assert all(set(mean.corruptions) <= set(NAMES) for mean in MEANS)
    assert [mean.paper for mean in MEANS] == ["", "imagenet_c", ""]
