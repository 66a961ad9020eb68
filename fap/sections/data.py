"""The section `data`: the images, how they are loaded, shown and augmented."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationInfo
from pydantic.functional_validators import (
    AfterValidator,
    BeforeValidator,
    field_validator,
    model_validator,
)

from fap.fields import (
    MOST_COUNT,
    UNSET,
    CanvasSize,
    Channels,
    ColorJitter,
    FilePath,
    NonNegativeInt,
    Pair,
    PositiveChannels,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    Sides,
    SmallerPart,
    key_of,
    whole,
)
from pipelines.back_ends import AUTO, BACK_ENDS, FILTERS, GPU_DECODER, EvalFilter, Filter
from pipelines.files import shown
from pipelines.sizes import Size, sides_of

USUAL_SIZE = 224  # pixels, of torchvision's evaluation on ImageNet
USUAL_RESIZE = 256


class Magnitude(NamedTuple):
    """Of a policy: the least that may be asked for, the most, and that of an unset field."""

    least: int
    most: int
    unset: int


# The pipelines that do not hand their JPEGs to a GPU's decoder, and why.
NO_JPEGS_OF_A_GPU = {
    "reference": "the plain twin decodes with Pillow",
    "memory": "it shows raw pixels alone",
}
# The policies that have one. A test compares the ranges with those of `pipelines.augment`.
MAGNITUDES = {"randaugment": Magnitude(0, 30, 9), "augmix": Magnitude(1, 10, 3)}
OF_MIX = ("mix_per", "mix_on", "cutmix_alpha")  # fields of `data` that only a mix has a meaning for


def usual_resize(size: Size) -> int:
    """256 for 224 px, the same ratio for others; a canvas of two sides is not cut out."""
    if not isinstance(size, int):
        return USUAL_RESIZE
    return min(math.ceil(size * USUAL_RESIZE / USUAL_SIZE), MOST_COUNT)


class DataConfig(Section):
    train: FilePath | None = None
    """What one of `pipelines.sources` opens: a `.beton` file, several as `shards/*.beton`, an image
    folder in ImageNet's layout, or a tar of one."""
    val: FilePath | None = None
    val_share: SmallerPart | None = None
    """In place of `val`: the share of every class of `train` that is held out of training, to
    validate on. The images are those that `fap-convert --val-split` takes."""
    pipeline: Annotated[str, AfterValidator(key_of(BACK_ENDS, AUTO))] = AUTO
    """The loader: one of `pipelines.back_ends.BACK_ENDS`. `auto` is the first that is installed and
    can show the data: dali on a GPU, ffcv, turbojpeg, reference. `memory` holds small raw images of
    one size on the training device, and is never chosen by itself."""
    decode: Literal["auto", "cpu", "gpu"] | None = None
    """What decodes the JPEGs. `gpu`: nvJPEG, by DALI, with any pipeline but reference and memory,
    and only with the bilinear filter; `auto`: that, if it can. Unset: dali decodes on the GPU that
    trains, the others on CPU cores."""
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    """What an epoch shows: every image once, or every class equally often, images of small classes
    more than once. An epoch has as many steps either way."""
    repeats: PositiveInt = 1
    """Repeated augmentation: how often an epoch shows an image, in one step, with draws of its own
    each time. It shows fewer images, in as many steps."""
    size: CanvasSize = 224
    """Pixels of what the model sees: the side of a square, or with `crop: letterbox` [height,
    width]."""
    sizes: Sides | None = None
    """Progressive resizing: [[0, 128], [6, 160], ...], from which epoch of vanilla training on
    images of which side are trained; divided by the cost like `budget.milestones`. `size` remains
    what evaluation sees. Unset: `size` throughout."""
    resize: Annotated[PositiveInt, Field(validate_default=True)] = UNSET
    """Evaluation: shorter side before the centre crop of `size` pixels. Unset: 8/7 of
    `size`, as torchvision's 256 for 224."""
    crop: Literal["random_resized", "pad", "letterbox"] = "random_resized"
    """`letterbox` is for detection, in evaluation too: the whole image at the top left corner, its
    aspect ratio kept, and zeros around it."""
    scale: Pair = (0.08, 1.0)
    ratio: Pair = (3 / 4, 4 / 3)
    pad: NonNegativeInt = 4
    """Pixels of zero padding with `crop: pad` (CIFAR)."""
    filter: Filter | None = None
    """What resizes training images: the mean over the area of each output pixel, as FFCV's recipes
    have it; Pillow's antialiased bilinear filter, as torchvision and the paper have it; or
    Pillow's bicubic, as most of timm's recipes. Unset: the loader's own, `area`, and under dali
    `bilinear`."""
    eval_filter: EvalFilter = "bilinear"
    """What resizes images that are evaluated, always as Pillow does it."""
    jitter: Pair = (1.0, 1.0)
    """With `crop: letterbox`: the range of a random factor on the size that just fits."""
    most_boxes: PositiveInt = 100
    """Detection: boxes of one image that are trained; what is beyond is counted at the start."""
    flip: Share = 0.5
    augment: Literal["randaugment", "trivialaugment", "augmix", "autoaugment"] | None = None
    """What is done to the pixels of a training image, as torchvision's transform of that name does
    it, ranges and black borders included (docs/semantics.md). `autoaugment` is ImageNet's."""
    augment_ops: Annotated[int, BeforeValidator(whole), Field(ge=1, le=10)] | None = None
    """`randaugment`: operations on an image. Unset: 2."""
    augment_magnitude: NonNegativeInt | None = None
    """`randaugment`: of its operations, 0 to 30; unset: 9. `augmix`: the greatest one of its
    operations, 1 to 10; unset: 3."""
    color_jitter: ColorJitter | None = None
    """[brightness, contrast, saturation, hue] as torchvision's ColorJitter takes them: how far from
    1 a random factor may be, and how much of the colour circle, at most 0.5, the hue may turn."""
    erase: Share = 0.0
    """Probability that a random box of an image becomes noise (torchvision's RandomErasing)."""
    augment_on: Literal["both", "clean", "adv"] = "both"
    """The rows that `augment`, `color_jitter` and `erase` change: clean ones, adversarial ones
    before they are attacked, or both. Copies are those of the clean rows."""
    mix: Literal["mixup", "cutmix", "either"] | None = None
    """Blend images in pairs, and their losses alike. `either`: one of the two, p = 1/2 each."""
    mix_alpha: PositiveFloat = 1.0
    """Of the beta distribution of the shares; with `either` that of Mixup."""
    cutmix_alpha: PositiveFloat = 1.0
    """With `mix: either`: that of CutMix."""
    mix_per: Literal["batch", "row"] = "batch"
    """What draws a share and a box of its own, and with `either` which of the two: a step, or each
    row."""
    mix_on: Literal["clean", "adv", "both"] = "clean"
    """Which loaded rows are mixed: the clean ones only (Table 6), those that are attacked, before
    they are, or both."""
    mean: Channels = (0.5, 0.5, 0.5)
    std: PositiveChannels = (0.5, 0.5, 0.5)
    threads: PositiveInt | None = None
    """Decoding threads of one process; unset: the cores it may use."""
    prefetch: PositiveInt = 3
    """Batches decoded ahead."""
    hw_decoder_load: Share = 0.65
    """DALI on a GPU: share of JPEGs given to the hardware decoder."""

    @field_validator("resize", mode="before")
    @classmethod
    def _fit(cls, given: Any, info: ValidationInfo) -> Any:
        if given is not None:
            return given
        # `size` is absent only if it is wrong, which is an error of its own.
        return usual_resize(info.data.get("size", USUAL_SIZE))

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of what the model sees, in pixels."""
        return sides_of(self.size)

    @property
    def shown_filter(self) -> Filter:
        """`filter`, or what it means unset; of an `auto` that is not settled, on CPU cores."""
        return self.filter or self._filters[0]

    @property
    def _filters(self) -> tuple[Filter, ...]:
        """Those that pipeline and decoder can show."""
        if self.decode == "gpu":
            return BACK_ENDS[GPU_DECODER].filters
        if self.pipeline == AUTO:
            return FILTERS
        return BACK_ENDS[self.pipeline].filters

    @property
    def eval_crop(self) -> Literal["center", "letterbox"]:
        """How evaluation shows an image."""
        if self.crop == "letterbox":
            return "letterbox"
        return "center"

    @property
    def augments(self) -> bool:
        """Whether anything is done to the pixels of a training image."""
        return self.augment is not None or self.color_jitter is not None or self.erase > 0

    @property
    def shown_ops(self) -> int | None:
        """`augment_ops`, or what it means unset; None where it has no meaning."""
        if self.augment == "randaugment":
            return self.augment_ops or 2
        return None

    @property
    def shown_magnitude(self) -> int | None:
        """`augment_magnitude`, likewise."""
        if self.augment not in MAGNITUDES:
            return None
        if self.augment_magnitude is None:
            return MAGNITUDES[self.augment].unset
        return self.augment_magnitude

    @property
    def meaningless(self) -> set[str]:
        """The fields that only the other kind of crop has a meaning for."""
        if self.crop == "letterbox":
            moving = {"augment", "augment_ops", "augment_magnitude", "erase"}
            of_classes = {"mix", "mix_alpha", *OF_MIX, "sampling"}
            return {"sizes", "resize", "scale", "ratio", "pad", *of_classes, *moving}
        return {"jitter", "most_boxes"}

    @property
    def mixes_clean(self) -> bool:
        return self.mix is not None and self.mix_on != "adv"

    @property
    def mixes_adv(self) -> bool:
        return self.mix is not None and self.mix_on != "clean"

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.val is not None and self.val_share is not None:
            raise ValueError(
                f"data.val_share = {self.val_share:g} with data.val = {shown(self.val)}: "
                "a part of data.train, or other data: set one of the two to null"
            )
        self._check_sizes()
        if self.decode == "gpu" and self.pipeline in NO_JPEGS_OF_A_GPU:
            raise ValueError(
                f"data.decode = 'gpu' with data.pipeline = '{self.pipeline}': "
                f"{NO_JPEGS_OF_A_GPU[self.pipeline]}; leave data.decode out, or take another"
                " data.pipeline"
            )
        filters = self._filters
        if self.filter is not None and self.filter not in filters:
            field = "pipeline"
            if self.decode == "gpu":
                field = "decode"
            raise ValueError(
                f"data.filter = {self.filter!r} with data.{field} = {getattr(self, field)!r}: "
                f"it shows only {' and '.join(filters)}; leave data.filter out, "
                f"or take another data.{field}"
            )
        self._check_augment()
        self._check_mix()
        return self

    def _check_augment(self) -> None:
        if self.augment_ops is not None and self.augment != "randaugment":
            raise ValueError(
                f"data.augment_ops = {self.augment_ops} with data.augment = {self.augment!r}: "
                "only 'randaugment' has it; leave it out"
            )
        magnitude = self.augment_magnitude
        if magnitude is not None:
            if self.augment not in MAGNITUDES:
                raise ValueError(
                    f"data.augment_magnitude = {magnitude} with data.augment = {self.augment!r}: "
                    f"only {' and '.join(map(repr, MAGNITUDES))} have it; leave it out"
                )
            least, most, _ = MAGNITUDES[self.augment]
            if not least <= magnitude <= most:
                raise ValueError(
                    f"data.augment_magnitude = {magnitude} with data.augment = {self.augment!r}: "
                    f"must be from {least} to {most}"
                )
        jitter = self.color_jitter
        if jitter is not None and (jitter[3] > 0.5 or not any(jitter)):
            raise ValueError(
                f"data.color_jitter = {list(jitter)}: the hue must be at most 0.5, and one of the "
                "four above 0; null for none"
            )
        if self.augment_on != "both" and not self.augments:
            raise ValueError(
                f"data.augment_on = {self.augment_on!r}: there is nothing to do to an image; "
                "set data.augment, data.color_jitter or data.erase, or leave it out"
            )

    def _check_mix(self) -> None:
        for field in OF_MIX:
            value = getattr(self, field)
            if value == type(self).model_fields[field].default:
                continue
            if self.mix is None:
                raise ValueError(
                    f"data.{field} = {shown(value)} without data.mix: nothing is mixed"
                )
            if field == "cutmix_alpha" and self.mix != "either":
                raise ValueError(
                    f"data.cutmix_alpha = {value} with data.mix = {self.mix!r}: only 'either' has "
                    "two; write data.mix_alpha"
                )

    def _check_sizes(self) -> None:
        if self.sizes is None:
            return
        epochs = [epoch for epoch, _ in self.sizes]
        if epochs[0] != 0 or any(a >= b for a, b in pairwise(epochs)):
            raise ValueError(
                f"data.sizes = {shown([list(pair) for pair in self.sizes])}: must be pairs "
                "[epoch, pixels] whose epochs begin with 0 and ascend, such as [[0, 128], [6, 160]]"
            )
