"""Execute an epoch plan on CPU cores with libjpeg-turbo from a wheel: pip alone installs it.

It shows the pixels of `ffcv`, whose decoder is the same library at the same settings.
"""

import numpy as np

from pipelines import turbojpeg
from pipelines.loaders.cpu import CpuLoader


class TurboJpegLoader(CpuLoader):
    """See `CpuLoader`."""

    stops_early = True

    def _decode_jpeg(
        self, encoded: np.ndarray, sides: tuple[int, int], divisor: int, image: np.ndarray
    ) -> None:
        if len(image) * divisor < sides[0]:
            turbojpeg.decode_top(encoded, image, divisor, fast_dct=True)
        else:
            turbojpeg.decode(encoded, image, divisor, fast_dct=True)
