"""DALI executes an epoch plan: nvJPEG and the hardware decoder on a GPU, its own decoder on a CPU.

The plan's windows go to the decoder as regions, so that no pixel outside them is transformed; of
the whole images of an evaluation, what the canvas shows of them. Pixels: exact inverse DCT and
smooth chroma upsampling (libjpeg's defaults), EXIF orientation ignored, a filter that is widened
when shrinking ("antialias"). Bilinear or bicubic, it is Pillow's, but for its rounding and for the
outermost pixels of a window: where the filter reaches beyond it, DALI repeats the window's border,
and Pillow takes what lies inside alone. In training this stays. In evaluation it is mended: two
passes, each rounded as Pillow's, over images with zeros around them, whose sums are divided by what
lies inside.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType, DALIInterpType
from PIL import Image
from torch import Tensor

from pipelines.ahead import run_ahead
from pipelines.images import as_jpeg
from pipelines.loaders.base import ThreadedLoader
from pipelines.loaders.regions import regions, shares_inside, show_borders, two_passes
from pipelines.plan import PADDING, EpochPlan
from pipelines.sizes import Size
from pipelines.store import RAW, DamagedData, Store

READERS = 2  # threads that fetch encoded bytes, 0.05 ms per image
READ_AHEAD = READERS + 1  # batches of bytes fetched before DALI asks for them
# Of these DALI holds the bytes too: the batch that it decodes, and the one that it asks for.
BESIDE_THE_QUEUE = 2

INTERPOLATIONS = {"bilinear": DALIInterpType.INTERP_LINEAR, "bicubic": DALIInterpType.INTERP_CUBIC}
HALF_WAY_IS_UP = 1e-3  # grey levels; DALI's weights are a table's, and their sums less exact

Fields = dict[str, list[np.ndarray] | np.ndarray]  # what one batch feeds to the graph


class DaliLoader(ThreadedLoader):
    """See `Loader`; on a `.beton` or an image folder.

    Raises:
        ValueError: an option out of range, or a store that mixes raw and JPEG samples (a graph
            decodes one or the other).
    """

    filters = ("bilinear", "bicubic")

    def __init__(
        self,
        store: Store,
        *,
        size: Size,
        device: torch.device | str = "cpu",
        threads: int | None = None,  # None: all cores this process may use, a CPU quota included
        prefetch: int = 3,  # batches in the making while one is used
        hw_decoder_load: float = 0.65,  # share of the JPEGs for the GPU's hardware decoder
    ) -> None:
        super().__init__(store, size=size, device=device, threads=threads, prefetch=prefetch)
        if not 0 <= hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load = {hw_decoder_load}: must be in [0, 1]")
        self.hw_decoder_load = hw_decoder_load
        self.raw = bool(store.modes[0] == RAW)
        # What is fed for a PADDING row, which has no sample.
        self.black: np.ndarray = np.zeros((1, 1, 3), np.uint8)
        if not self.raw:
            black = as_jpeg(Image.new("RGB", (1, 1)), quality=95)
            self.black = np.frombuffer(black, np.uint8)

    @classmethod
    def refusal(cls, store: Store) -> str:
        """See `Loader.refusal`."""
        n_raw = int((store.modes == RAW).sum())
        if 0 < n_raw < len(store):
            return (
                f"pipeline = 'dali' takes no file that mixes raw samples ({n_raw}) "
                f"with JPEG ones ({len(store) - n_raw}): convert it again with "
                "`fap-convert SRC DST.beton` (all JPEG) or `fap-convert --raw SRC DST.beton`, "
                "or take pipeline = 'ffcv'"
            )
        return super().refusal(store)

    def _images(self, plan: EpochPlan, start_step: int) -> Generator[Tensor, None, None]:
        with closing(self._decoded(plan, start_step)) as decoded:
            for step in range(start_step, len(plan)):
                try:
                    images = next(decoded)
                except DamagedData:  # the store's errors name their sample
                    raise
                except RuntimeError as error:
                    self._blame_a_sample(plan, step, error)
                    raise
                yield images

    def _decoded(self, plan: EpochPlan, start_step: int) -> Generator[Tensor, None, None]:
        """As `_images`, but a sample that does not decode is a RuntimeError that names none."""
        # The graph is told not to copy what it is fed (`no_copy`): DALI reads the bytes where they
        # lie, so they have to live until it is done with their batch.
        in_use: deque[Fields] = deque(maxlen=self.prefetch + BESIDE_THE_QUEUE)
        names = self._names(plan)

        def readings() -> Iterator[Callable[[], Fields]]:
            for step in range(start_step, len(plan)):
                yield self._reading(plan, step, names)

        with closing(run_ahead(readings(), READERS, READ_AHEAD)) as read:

            def source() -> list[list[np.ndarray] | np.ndarray]:
                fields = next(read)  # its StopIteration tells DALI that the data end
                in_use.append(fields)
                return [fields[name] for name in names]

            pipeline = self._build(plan, names, source)
            for _ in range(start_step, len(plan)):
                (images,) = self._run(pipeline)
                # Without a copy: the tensor is DALI's memory, and holds it as long as it lives.
                yield torch.from_dlpack(images.as_tensor())

    def _blame_a_sample(self, plan: EpochPlan, step: int, error: RuntimeError) -> None:
        """Decode the rows of a step again, one at a time; DamagedData for the first that fails.

        If all of them decode, no sample is to blame.
        """
        one_by_one = replace(
            plan,
            index=plan.index[step][:, None],
            window=plan.window[step][:, None],
            place=plan.place[step][:, None],
            flip=plan.flip[step][:, None],
        )
        with closing(self._decoded(one_by_one, 0)) as decoded:
            for (index,) in one_by_one.index.tolist():
                try:
                    next(decoded)
                except DamagedData:
                    raise
                except RuntimeError:
                    raise DamagedData(
                        f"{self.store.name_of(index)}: DALI cannot decode it"
                    ) from error

    def _run(self, pipeline: Pipeline) -> Any:
        """The next outputs. On a GPU they belong to the stream that reads them, torch's current.

        DALI then orders its own work before that stream's, and the reuse of the memory, once the
        tensor is gone, behind it.
        """
        # Training runs on the default stream, whose handle is 0. DALI 2.4 takes that for the legacy
        # default stream and not for "no stream": `types._raw_cuda_stream_ptr` makes a `c_void_p(0)`
        # of it, the binding asks only if that is None, its CUDA calls are not built for streams
        # per thread, and torch asks `__dlpack__` for stream 1, another name of the same. But a 0
        # does not say of which device: DALI takes the current one.
        if self.device.type != "cuda":
            return pipeline.run(None)
        with torch.cuda.device(self.device):
            return pipeline.run(torch.cuda.current_stream())

    def _names(self, plan: EpochPlan) -> list[str]:
        """The fields that the graph of a plan is fed; `_read` says what each is for."""
        names = ["pixels" if self.raw else "encoded", "start", "shape", "sides"]
        borders = False
        match plan.spec.crop:
            case "center":
                real = plan.index != PADDING
                window, place = plan.window[real], plan.place[real]
                borders = show_borders(window[:, 2:], place, self.sides, plan.spec.filter)
                names += ["line_sides", "line_from", "line_to", "shown_from", "shown_to"]
            case "letterbox":
                names += ["canvas_start"]
        if borders:
            names += ["inside_down", "inside_across"]
        # Of a JPEG only what lies inside the image can be decoded: the zeros around it take a
        # second slice. Raw pixels are cut with their zeros at once.
        if not self.raw and (borders or plan.spec.crop == "pad"):
            names += ["second_start", "second_shape"]
        return names

    def _build(self, plan: EpochPlan, names: list[str], source: Callable[[], Any]) -> Pipeline:
        """The graph: encoded bytes -> region -> zeros outside the image -> resize and flip -> zeros
        outside the place.

        Its output is uint8 (B, *sides, 3); its inputs are the fields of `_read`.
        """
        # exec_dynamic: outputs stay ours for as long as a tensor holds them.
        pipeline = Pipeline(
            plan.index.shape[1],
            self.threads,
            self.device.index,
            prefetch_queue_depth=self.prefetch,
            exec_dynamic=True,
        )
        interpolation = INTERPOLATIONS[plan.spec.filter]
        layout = ["HWC" if name == "pixels" else "" for name in names]
        with pipeline:
            inputs = fn.external_source(
                source=source, num_outputs=len(names), layout=layout, no_copy=True
            )
            fed = dict(zip(names, inputs, strict=True))
            if self.raw:
                images = _slice(fed["pixels"], fed["start"], fed["shape"])
            else:
                images = self._decode(fed["encoded"], fed["start"], fed["shape"])
            if "second_start" in fed:
                images = _slice(images, fed["second_start"], fed["second_shape"])
            if self.raw and self.device.type == "cuda":
                images = images.gpu()
            if "line_sides" in fed:
                images = _resize_as_pillow(images, fed, interpolation)
            else:
                images = _resize(images, fed["sides"], interpolation)
            if "canvas_start" in fed:
                images = _slice(images, fed["canvas_start"], self.sides)
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _decode(self, encoded: DataNode, start: DataNode, shape: DataNode) -> Any:
        """The node that decodes regions, with the pixels of libjpeg's defaults."""
        return fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axis_names="HW",
            device="mixed" if self.device.type == "cuda" else "cpu",
            hw_decoder_load=self.hw_decoder_load,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            use_fast_idct=False,
        )

    def _reading(self, plan: EpochPlan, step: int, names: list[str]) -> Callable[[], Fields]:
        """A call that reads the fields of a step."""

        def read() -> Fields:
            return self._read(plan, step, names)

        return read

    def _read(self, plan: EpochPlan, step: int, names: list[str]) -> Fields:
        """The fields of a step, a row per image; of those that not all plans have, these `names`.

        encoded or pixels: the image.
        start, shape: the region that is cut out of it.
        second_start, second_shape: that which is cut out of the region, zeros around it.
        sides: what it is resized to; a negative width flips.
        line_sides, line_from, line_to: what it is resized to across, and the part that is.
        shown_from, shown_to: the part of this that is then resized down.
        inside_down, inside_across: what each row and column of the result is divided by.
        canvas_start: where the canvas begins in the result.
        """
        index = plan.index[step]
        real = index != PADDING
        stored = np.ones((len(index), 2), np.int32)  # sides of the image; the black one's are 1
        stored[real, 0] = self.store.heights[index[real]]
        stored[real, 1] = self.store.widths[index[real]]
        window = plan.window[step].astype(np.int32)
        window[~real] = 0, 0, 1, 1  # all of the black image
        place = plan.place[step].copy()
        place[~real] = 0, 0, *self.sides  # black, as everything is around a place

        fields: Fields = {}
        corner, shape, sides = window[:, :2], window[:, 2:], place[:, 2:]
        if plan.spec.crop == "center":
            inside = "inside_down" not in names
            region = regions(stored, place, self.sides, inside=inside, filter_=plan.spec.filter)
            corner, shape = region.corner, region.shape
            sides = np.tile(self.sides, (len(sides), 1))
            fields |= two_passes(region, sides)
        if "inside_down" in names:
            down, across = (
                shares_inside(
                    stored[:, side], place[:, side], place[:, 2 + side], n_out, plan.spec.filter
                )
                for side, n_out in enumerate(self.sides)
            )
            across[plan.flip[step]] = across[plan.flip[step], ::-1]
            fields |= {
                "inside_down": down[:, :, None, None],
                "inside_across": across[:, None, :, None],
            }
        if plan.spec.crop == "letterbox":
            fields["canvas_start"] = -place[:, :2]

        start, end = corner, corner + shape
        if "second_start" in names:
            # What of the region lies inside the image: at least a pixel, even where nothing does.
            # From its first pixel the second slice counts.
            start = corner.clip(0, stored - 1)
            end = np.minimum(end, stored).clip(start + 1)
            fields |= {"second_start": _int32(corner - start), "second_shape": _int32(shape)}
        fields |= {"start": _int32(start), "shape": _int32(end - start)}
        fields["sides"] = sides.astype(np.float32)
        # Of two passes the first one flips.
        signed = np.asarray(fields.get("line_sides", fields["sides"]))
        signed[plan.flip[step], 1] *= -1

        encoded = iter(self.store.read_many(index[real].tolist()))
        data = [next(encoded) if is_real else self.black for is_real in real.tolist()]
        if self.raw:
            fields["pixels"] = [
                pixels.reshape(height, width, 3)
                for pixels, (height, width) in zip(data, stored.tolist(), strict=True)
            ]
        else:
            fields["encoded"] = data
        return fields


def _int32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.int32)


def _resize(images: DataNode, sides: DataNode, interpolation: DALIInterpType) -> Any:
    """The node that resizes to sides of each sample's own; a negative width flips."""
    return fn.resize(images, size=sides, interp_type=interpolation, antialias=True)


def _resize_as_pillow(
    images: DataNode, fed: dict[str, DataNode], interpolation: DALIInterpType
) -> Any:
    """The nodes that resize a region to the whole canvas, across and then down.

    Each pass is rounded as Pillow rounds it. Only images of more than twice the height of their
    width, if they shrink, go down and then across there.
    """
    passes = (
        (fed["line_sides"], fed["line_from"], fed["line_to"], fed.get("inside_across")),
        (fed["sides"], fed["shown_from"], fed["shown_to"], fed.get("inside_down")),
    )
    for sides, start, end, inside in passes:
        sums: Any = fn.resize(
            images,
            size=sides,
            roi_start=start,
            roi_end=end,
            interp_type=interpolation,
            antialias=True,
            dtype=DALIDataType.FLOAT,
        )
        if inside is not None:
            sums = sums / (inside.gpu() if images.device == "gpu" else inside)
        # To nearest, and 255 is the most. Where an image is halved, an eighth of all values lie
        # half way between two, which Pillow rounds up; DALI's sums miss the half by a little.
        images = fn.cast(sums + HALF_WAY_IS_UP, dtype=DALIDataType.UINT8)
    return images


def _slice(images: DataNode, start: DataNode, shape: DataNode | tuple[int, int]) -> Any:
    """The node that cuts regions from pixels; zeros outside the image."""
    return fn.slice(
        images, start=start, shape=shape, axis_names="HW", out_of_bounds_policy="pad", fill_values=0
    )
