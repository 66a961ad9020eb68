"""Packages that only one feature needs: the error that names the extra which installs them."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str, feature: str) -> Iterator[None]:
    """Around the import of a feature's packages.

    Raises ImportError that says how to install them.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{feature} needs a package that is missing ({error}): pip install 'fap[{extra}]'"
        ) from error
