"""A `.beton`, or another store, that is converted: to add a sidecar, to shrink, or to re-encode."""

from collections.abc import Callable, Iterator

import numpy as np

from pipelines.files import readable
from pipelines.intake.collection import Collection, Content, Image
from pipelines.store import JPG, RAW, DamagedData, Store


class Samples(Collection):
    """The samples of a store, in their order.

    Raises:
        ValueError: data with boxes, whose annotations would be lost; decoded planes.
    """

    def __init__(self, store: Store) -> None:
        if store.annotations is not None:
            raise ValueError(
                f"{readable(store.path)}: has boxes, which this would lose: convert its images and"
                " annotations again, with `fap-convert coco`"
            )
        if not np.isin(store.modes, (JPG, RAW)).all():
            raise ValueError(
                f"{readable(store.path)}: holds decoded planes: convert what it was made from"
            )
        self.path = store.path
        self.described_as = store.described_as
        self.classes = store.classes
        self.labels = store.labels
        self.ignored = {}
        self.notes = store.notes
        self._store = store

    def name(self, number: int) -> str:
        return f"sample {number}"

    def contents(self, numbers: np.ndarray) -> Iterator[Content]:
        for number in numbers.tolist():
            yield number, self._reading(number)

    def _reading(self, number: int) -> Callable[[], Image]:
        def read() -> Image:
            try:
                data = self._store.read(number)
            except DamagedData as error:
                raise ValueError(str(error)) from error
            if self._store.modes[number] == JPG:
                return data.tobytes()
            height = int(self._store.heights[number])
            width = int(self._store.widths[number])
            return data.reshape(height, width, 3)

        return read

    def close(self) -> None:
        self._store.close()
