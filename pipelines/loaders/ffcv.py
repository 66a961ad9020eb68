"""Execute an epoch plan on CPU cores with FFCV's JPEG decoder. All but the decoder is in cpu.py."""

import importlib.util
from ctypes import CDLL, c_bool, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.loaders.cpu import CpuLoader

WHOLE_IMAGE = (0, 0)  # x and y of the decoder's crop, which we do not use


def _load_decoder() -> Any:
    """libffcv's `imdecode`: 0, or -1 on any error or warning of TurboJPEG.

    Loaded without `import ffcv`, which takes seconds and sets torch's threads to 1.
    """
    spec = importlib.util.find_spec("ffcv")
    libraries: list[Path] = []
    if spec and spec.origin:
        libraries = list(Path(spec.origin).parent.glob("_libffcv*.so"))
    if not libraries:
        raise ImportError("no module named 'ffcv' with its native library")
    function = CDLL(str(libraries[0])).imdecode
    function.argtypes = [
        c_void_p,  # source
        c_uint64,  # its bytes
        c_uint32,  # height
        c_uint32,  # width
        c_void_p,  # target
        c_uint32,  # crop: height
        c_uint32,  # width
        c_uint32,  # x
        c_uint32,  # y
        c_uint32,  # scale: numerator
        c_uint32,  # denominator
        c_bool,  # crop?
        c_bool,  # flip?
    ]
    return function


_imdecode = _load_decoder()


class FfcvLoader(CpuLoader):
    """See `CpuLoader`."""

    def _decode_jpeg(
        self, encoded: np.ndarray, sides: tuple[int, int], divisor: int, image: np.ndarray
    ) -> None:
        source = (encoded.ctypes.data, encoded.size, *sides)
        target = (image.ctypes.data, *sides, *WHOLE_IMAGE)
        scale = (1, divisor)
        if _imdecode(*source, *target, *scale, False, False):
            raise ValueError("FFCV's decoder refuses it")  # and does not say why
