"""The sections of the config: every field with its default, its meaning and its unit.

A combination without meaning is a ValueError that names the field, the value and what is allowed.
The semantics of each field are those of the paper and of its authors' code (docs/semantics.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
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
    Beta,
    CanvasSize,
    Channels,
    ClassWeights,
    ColorJitter,
    FilePath,
    NonNegativeFloat,
    NonNegativeInt,
    Pair,
    PositiveChannels,
    PositiveFloat,
    PositiveInt,
    Ratio,
    Section,
    Share,
    Sides,
    SmallerPart,
    Text,
    key_of,
    whole,
)
from fap.methods import DEFAULT_METHOD, METHODS, Kind, Method
from pipelines.back_ends import AUTO, BACK_ENDS, FILTERS, GPU_DECODER, EvalFilter, Filter
from pipelines.files import shown
from pipelines.sizes import Size, sides_of

UNSET: Any = None  # a default that a validator replaces
USUAL_SIZE = 224  # pixels, of torchvision's evaluation on ImageNet
USUAL_RESIZE = 256
PAPER_EPOCHS = 105  # section 4.1, with the milestones
PAPER_MILESTONES = (30, 60, 90, 100)
PAPER_GAMMA = 0.1

LrSchedule = Literal["milestones", "cosine", "linear", "constant"]
# The fields of `budget` that only some of them have a meaning for.
OF_LR_SCHEDULE: dict[LrSchedule, tuple[str, ...]] = {
    "milestones": ("milestones", "gamma"),
    "cosine": ("final_lr",),
    "linear": ("final_lr",),
    "constant": (),
}


class Magnitude(NamedTuple):
    """Of a policy: the least that may be asked for, the most, and that of an unset field."""

    least: int
    most: int
    unset: int


# The policies that have one. A test compares the ranges with those of `pipelines.augment`.
MAGNITUDES = {"randaugment": Magnitude(0, 30, 9), "augmix": Magnitude(1, 10, 3)}
OF_MIX = ("mix_per", "mix_on", "cutmix_alpha")  # fields of `data` that only a mix has a meaning for


class ModelConfig(Section):
    name: Text = "resnet50"
    """Any torchvision or timm name (`timm/NAME` or `timm:NAME` forces timm, `torchvision:NAME`
    torchvision), `cifar_resnet18` or `cifar_resnetD` with D = 6n + 2. Unset: what the weights of
    `init` are of, if they say it."""
    num_classes: PositiveInt | None = None
    """Unset: the data's class count."""
    init: FilePath | None = None
    """Weights to start from: a file (.safetensors, .pth), a run's folder or checkpoint,
    `torchvision:WEIGHTS`, `timm:MODEL.TAG`, `hf-hub:USER/REPOSITORY` (docs/weights.md). Auxiliary
    norms begin as copies of the main ones; where the classes are others, the head is new. What the
    weights say of their model, and of data.mean, data.std, data.size and data.resize, holds where
    these are unset."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Stochastic depth: how often a row skips the last residual branch, and the others less often
    in proportion to their depth. Unset: the model's own, which timm's begin without."""

    @property
    def classes(self) -> int:
        """`num_classes` of a run whose data is open, or of a checkpoint. ValueError if unset."""
        if self.num_classes is None:
            raise ValueError(
                "model.num_classes is not set, and there is no data here to take it from"
            )
        return self.num_classes


class MethodConfig(Section):
    name: Annotated[str, AfterValidator(key_of(METHODS))] = DEFAULT_METHOD
    """One of `fap.methods.METHODS`. What an unset field means is the method's; a field that has no
    meaning for it is an error."""
    group_rows: PositiveInt = 64
    """Rows of one batch-norm group of clean rows (section 4.1: 64 per GPU); one of adversarial rows
    has group_rows * p_adv / (1 - p_adv)."""
    p_adv: Ratio | None = None
    """n_adv / (n_clean + n_adv); `1/9`, `1/5`, `1/3`, `1/2` are the rows of Table 4."""
    schedule: Literal["sequential", "fused", "pipelined", "parallel"] | None = None
    """`parallel` is `sequential` with the clean pass on a second stream of the GPU: for few clean
    rows."""
    eps_255: PositiveFloat | None = None
    """Radius of the ball in grey levels of 0..255, whatever the normalisation."""
    step_255: PositiveFloat | None = None
    """Step in grey levels; at least eps / attack_steps is used, as in the authors' code."""
    attack_steps: PositiveInt | None = None
    random_start: bool | None = None
    """Start at U(-eps, eps); without it one step is FGSM (appendix A.1)."""
    targeted: bool | None = None
    """Of a separate attack: towards a random wrong target instead of away from the true one."""
    attack_bn: Literal["batch", "running"] | None = None
    """Statistics of the batch norms during a separate attack; it moves the running ones in neither
    mode."""
    attack_loss: Literal["total", "cls", "box", "max"] | None = None
    """What a separate attack follows: the loss that is trained, or for detection one part of it.
    `max` makes an image from each part and keeps the one of larger total loss (Det-AdvProp)."""
    weight_clean: PositiveFloat | None = None
    weight_noise: PositiveFloat | None = None
    weight_adv: PositiveFloat | None = None
    sync: bool | None = None
    """Update-speed synchronisation 1 : 1 : 1 of shared, main-BN and auxiliary-BN parameters
    (section 3.2.2)."""
    combine: Literal["sum", "mean"] | None = None
    """`sum`: weighted sum over all examples / sum of weights (authors' code); `mean`: Algorithm 1
    to the letter."""
    aux: Literal["auto", "norms", "none"] = "auto"
    """Auxiliary norms. `auto`: where the method has any, every norm of the model gets one, and a
    model without norms trains without. `norms`: the same, but such a model is an error. `none`:
    adversarial rows go through the main norms, in groups of their own (an ablation)."""
    shuffle: Literal["ranks", "groups", "off"] | None = None
    """Shuffling BN: permute adversarial rows over all ranks' groups, over one device's groups, or
    not at all."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Replace what is unset by the method's defaults."""
        if not isinstance(given, dict):
            return given
        name = given.get("name", DEFAULT_METHOD)
        if not isinstance(name, str) or name not in METHODS:
            return given
        defaults = dict(METHODS[name].defaults)
        given = {field: value for field, value in given.items() if value is not None}
        meaningful = {"name", "group_rows", "aux", *defaults}
        for field in sorted(given.keys() & cls.model_fields.keys() - meaningful):
            raise ValueError(
                f"method.{field} = {shown(given[field])} has no meaning for "
                f"method.name = {name!r}; leave it out"
            )
        if given.get("combine") == "mean":
            defaults["sync"] = False
        return defaults | given

    @model_validator(mode="after")
    def _check(self) -> MethodConfig:
        if self.p_adv is not None:
            self._check_rows(self.p_adv)
        if self.entry.recycles and self.attack_steps != 1:
            raise ValueError(
                f"method.attack_steps = {self.attack_steps}: {self.name} recycles one gradient, "
                "so only 1"
            )
        if self.entry.direction == "random" and self.attack_steps != 1:
            raise ValueError(
                f"method.attack_steps = {self.attack_steps}: {self.name} takes one random step, "
                "so only 1"
            )
        if self.aux != "auto" and not self.entry.has_aux:
            raise ValueError(
                f"method.aux = {self.aux!r} has no meaning for method.name = {self.name!r}, "
                "which trains nothing through auxiliary norms; leave it out"
            )
        if self.combine == "mean" and self.sync:
            raise ValueError(
                "method.sync = true with method.combine = 'mean': "
                "Algorithm 1 divides nothing; sync must be false"
            )
        return self

    def _check_rows(self, p_adv: Fraction) -> None:
        rows = self.group_rows * self.entry.adv_per_clean(p_adv)
        if rows.denominator == 1 and rows >= 2:
            return
        possible = max(3, round(rows))
        near = [Fraction(n, self.group_rows + n) for n in range(possible - 1, possible + 2)]
        raise ValueError(
            f"method.p_adv = {p_adv} gives {float(rows):.3f} adversarial rows "
            f"per {self.group_rows} clean ones; it must give a whole number >= 2, "
            f"for example {', '.join(map(str, near))}"
        )

    @property
    def entry(self) -> Method:
        return METHODS[self.name]

    @property
    def cost_per_image(self) -> Fraction:
        """Image passes per image of the epoch."""
        return self.entry.cost_per_image(self.p_adv, self.attack_steps, self.attack_loss)

    @property
    def norms(self) -> Mapping[Kind, Literal["main", "aux"]]:
        """The kinds of rows that are trained, each with the norms that it goes through."""
        if self.aux == "none":
            return dict.fromkeys(self.entry.norms, "main")
        return self.entry.norms

    @property
    def has_aux(self) -> bool:
        """Does anything go through auxiliary norms? A model without norms still has none."""
        return "aux" in self.norms.values()

    @property
    def any_norm(self) -> bool:
        """May norms that cannot divide a batch into groups see all of it? Only of clean rows."""
        return self.entry.attacked == "nothing"

    @property
    def adv_group_rows(self) -> int:
        """Rows of one group of adversarial rows; `pipelined` joins two of them in one."""
        return int(self.group_rows * self.entry.adv_per_clean(self.p_adv))

    @property
    def step_size_255(self) -> float:
        assert self.eps_255 and self.step_255 and self.attack_steps
        return max(self.step_255, self.eps_255 / self.attack_steps)


def usual_resize(size: Size) -> int:
    """256 for 224 px and less, the same ratio for more; a canvas of two sides is not cut out."""
    if not isinstance(size, int):
        return USUAL_RESIZE
    return max(USUAL_RESIZE, math.ceil(size * USUAL_RESIZE / USUAL_SIZE))


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
    can show the data: dali on a GPU, ffcv, turbojpeg, reference."""
    decode: Literal["auto", "cpu", "gpu"] | None = None
    """What decodes the JPEGs. `gpu`: nvJPEG, by DALI, with any pipeline but reference, and only
    with the bilinear filter; `auto`: that, if it can. Unset: dali decodes on the GPU that trains,
    the others on CPU cores."""
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
    """Evaluation: shorter side before the centre crop of `size` pixels. Unset: 256, or 8/7 of a
    `size` above 224, as torchvision has it."""
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
        if self.decode == "gpu" and self.pipeline == "reference":
            raise ValueError(
                "data.decode = 'gpu' with data.pipeline = 'reference': the plain twin decodes with"
                " Pillow; leave data.decode out, or take another data.pipeline"
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


# What an unset field of `optim` means, by `optim.name`; a field that stands in none of a name's has
# no meaning for it. Rates are per 256 clean rows.
OPTIMISERS: dict[str, dict[str, Any]] = {
    # Section 4.1, and the authors' code.
    "sgd": {"lr": 0.1, "weight_decay": 1e-4, "momentum": 0.9, "nesterov": False},
    # ConvNeXt's and DeiT's recipes use 0.05; DeiT's rate is 5e-4 per 512 images.
    "adamw": {"lr": 5e-4, "weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8},
    # Of ResNet strikes back's recipe A3 (arXiv 2110.00476): 8e-3 for 2,048 images.
    "lamb": {"lr": 1e-3, "weight_decay": 0.02, "betas": (0.9, 0.999), "eps": 1e-6},
}
SOME_OPTIMISERS = {"momentum", "nesterov", "betas", "eps"}
"""The fields that have a meaning for some names only."""


class OptimConfig(Section):
    name: Annotated[str, AfterValidator(key_of(OPTIMISERS))] = "sgd"
    """`sgd` with momentum, `adamw` (arXiv 1711.05101), or `lamb` (arXiv 1904.00962) for large
    batches. What an unset field means follows from it; a field that has no meaning for it is an
    error."""
    clean_batch: PositiveInt = 256
    """Clean rows of one step over all ranks."""
    accumulate: PositiveInt = 1
    """Parts of whole groups into which every pass of a step is divided, so that activations of
    1/accumulate of its rows are in memory at once. The step stays that of `clean_batch`; only a
    model's own random layers draw differently."""
    lr: PositiveFloat = UNSET
    """Per 256 clean rows (section 4.1); the run uses lr * clean_batch / 256, with any optimiser.
    Unset: 0.1 of sgd, 5e-4 of adamw, 1e-3 of lamb."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of sgd; unset: 0.9."""
    nesterov: bool | None = None
    """Of sgd: Nesterov's momentum; unset: false."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] | None = None
    """Of adamw and lamb: decay per step of the averages of the gradient and of its square; unset:
    0.9 and 0.999."""
    eps: PositiveFloat | None = None
    """Of adamw and lamb: what is added to the root of the averaged square. Unset: 1e-8 of adamw,
    1e-6 of lamb."""
    weight_decay: NonNegativeFloat = UNSET
    """On the parameters of `decay_on`. Unset: 1e-4 of sgd (authors' code), 0.05 of adamw, 0.02 of
    lamb."""
    decay_on: Literal["all", "weights"] = "all"
    """`all`: every parameter, norms and biases included (authors' code). `weights`: none with fewer
    than two dimensions, no bias, and none that the model itself names, such as the embedding of
    positions."""
    head_lr_scale: PositiveFloat = 1.0
    """Factor on the rate of the head: the last layer or layers, which know the classes."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on the rate from each layer to the one before it, by timm's division of a model into
    layers; the last one has the full rate. Unset: one rate for all."""
    freeze: Annotated[tuple[Text, ...], Field(strict=False, max_length=1000)] = ()
    """Parameters that are not trained, by name: `layer1` is all inside that module, and a pattern
    such as `*.bias` all names that it matches. Auxiliary norms follow their main ones. Frozen norms
    go on to normalise by the batch, so their running statistics still move."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: ClassWeights = None
    """Classification: factors of the rows' losses, one for each class in the order of the labels.
    `balanced`: images / (classes * images of the class), which is 1 on average over the images."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient of all parameters; a longer one is shortened. Unset: any."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential average of weights and running statistics, which is then
    what evaluation and export show, for example 0.9999. After t steps it is at most
    (1 + t) / (10 + t), so that a short run forgets its first weights too. Unset: none."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Replace what is unset by the optimiser's defaults."""
        if not isinstance(given, dict):
            return given
        name = given.get("name", "sgd")
        if not isinstance(name, str) or name not in OPTIMISERS:
            return given
        given = {field: value for field, value in given.items() if value is not None}
        defaults = OPTIMISERS[name]
        for field in sorted(given.keys() & SOME_OPTIMISERS - defaults.keys()):
            raise ValueError(
                f"optim.{field} = {shown(given[field])} has no meaning for "
                f"optim.name = {name!r}; leave it out, or write null"
            )
        return defaults | given

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.nesterov and not self.momentum:
            raise ValueError(
                "optim.nesterov = true with optim.momentum = 0: it is a kind of momentum; "
                "must be false"
            )
        return self


def nearest(value: Fraction) -> int:
    """The nearest whole number, ties down: 87.5 epochs are 87, as in Table 4."""
    return math.ceil(value - Fraction(1, 2))


def exact(value: float) -> Fraction:
    """What a number in a config says: 0.1 is a tenth."""
    return Fraction(str(value))


def paper_milestones(epochs: int) -> tuple[int, ...]:
    """The paper's 30/60/90/100 of 105, scaled to `epochs`.

    What would meet another one or the end is left out.
    """
    milestones: list[int] = []
    last = 0
    for milestone in PAPER_MILESTONES:
        epoch = nearest(Fraction(milestone * epochs, PAPER_EPOCHS))
        if last < epoch < epochs:
            milestones.append(epoch)
            last = epoch
    return tuple(milestones)


class BudgetConfig(Section):
    epochs: PositiveInt = PAPER_EPOCHS
    """Epochs of vanilla training; other methods run epochs / cost (section 4.1)."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs of vanilla training over which the rate rises from 0, step by step; divided by the
    cost, like `epochs` and `milestones`, so it is the same share of every method's training."""
    lr_schedule: LrSchedule = "milestones"
    """The rate after the warm-up: the paper's falls at `milestones`, half a cosine or a straight
    line over all steps down to `final_lr`, or a constant."""
    milestones: Annotated[
        Annotated[tuple[PositiveInt, ...], Field(strict=False, max_length=100)] | None,
        Field(validate_default=True),
    ] = UNSET
    """Epochs of vanilla training after which the learning rate is multiplied by gamma; [] for
    none. Unset: the paper's 30, 60, 90 and 100 of 105, scaled to `epochs`."""
    gamma: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Field(validate_default=True)] = (
        UNSET
    )
    """Unset: 0.1."""
    final_lr: Annotated[Share | None, Field(validate_default=True)] = UNSET
    """Of cosine and linear: the share of the highest rate at which they end. Unset: 0."""
    same_budget: bool = True
    """False: as many epochs as vanilla, at (K + 2) or (1 + p_adv K) times its cost."""

    @field_validator("milestones", "gamma", "final_lr", mode="before")
    @classmethod
    def _fill(cls, given: Any, info: ValidationInfo) -> Any:
        """Replace what is unset, and refuse what has no meaning for the schedule."""
        schedule = info.data.get("lr_schedule")
        field = info.field_name
        if schedule is None:  # it is wrong, which is an error of its own
            return given
        if field not in OF_LR_SCHEDULE[schedule]:
            if given is None:
                return None
            raise ValueError(
                f"budget.{field} = {shown(given)} has no meaning for "
                f"budget.lr_schedule = {schedule!r}; leave it out, or write null"
            )
        if given is not None:
            return given
        match field:
            case "milestones":
                # `epochs` is absent only if it is wrong, which is an error of its own.
                return paper_milestones(info.data.get("epochs", PAPER_EPOCHS))
            case "gamma":
                return PAPER_GAMMA
            case _:
                return 0.0

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        if self.milestones is None:
            return self
        ascending = all(a < b for a, b in pairwise(self.milestones))
        in_time = all(milestone < self.epochs for milestone in self.milestones)
        if not (ascending and in_time):
            scaled = list(paper_milestones(self.epochs))
            raise ValueError(
                f"budget.milestones = {shown(list(self.milestones))} with "
                f"budget.epochs = {self.epochs}: must be strictly ascending and below "
                f"budget.epochs; null means the paper's, scaled: {scaled}"
            )
        return self


class RunConfig(Section):
    dir: FilePath = "runs"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """auto: fp16 on a GPU, off on a CPU."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Replay the step as one CUDA graph; auto: on a GPU."""
    norm_kernel: Literal["auto", "triton", "framework"] = "auto"
    """Batch norm in training: our Triton kernel, or the framework's group after group.
    auto: on a GPU triton, and framework, with a warning, if that fails."""
    compile: bool = False
    torch_threads: PositiveInt | None = None
    """CPU threads of the training process; unset: torch's default, or a container's CPU quota if
    that is less."""
    max_steps: PositiveInt | None = None
    """Stop after so many steps in all; the schedule is that of the whole run."""
    log_every: PositiveInt = 50
    """Steps between records."""
    checkpoint_every: PositiveInt = 1000
    """Steps between checkpoints; one is also written at each epoch's end."""
    keep: PositiveInt = 2
    """Checkpoints that are kept."""
    keep_best: bool = True
    """Also keep that of the best epoch, as best.safetensors: a link to it, not counted in `keep`.
    fap-eval and fap-export take it with --best."""
    eval_every: PositiveInt = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    eval_batch: PositiveInt | None = None
    """Images of an evaluation's batch over all ranks; unset: what suits the task, 256 or 16."""
    max_skipped: PositiveInt = 20
    """Consecutive non-finite steps after which the run stops."""
