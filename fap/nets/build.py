"""Models by name, from torchvision, timm and `fap.nets.cifar`, made ready for a training step."""

import contextlib
import difflib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from fap.nets.cifar import CifarResNet, cifar_resnet18
from fap.nets.drop_path import rates_of, rescale
from fap.nets.dual import convert, norm_state
from fap.nets.fuse import fuse_blocks
from fap.nets.norm import IMAGE_DIMENSIONS
from fap.nets.row_order import lengths_seen, names_of, needs_proof, out_of_order
from fap.nets.stem import install_stem
from fap.nets.strided import mend_strided
from fap.nets.weights.names import TIMM, TORCHVISION, current_name, spelt, torchvision_names
from pipelines.files import one_line, readable, shown
from pipelines.sizes import Size, sides_of, size_in_words

CIFAR_RESNETS = ("cifar_resnet18", "cifar_resnet20", "cifar_resnet56")  # those that a hint names
_CIFAR_RESNET = re.compile(r"cifar_resnet([0-9]{1,4})")
DROP_PATH = "drop_path_rate"  # an argument that not all models of timm take
SIZED = {"image_size", "img_size"}  # arguments of models that are made for one size of images
_ALIKE = 0.7  # from 0 to 1 (equal); names less alike than this are no hint


def build(name: str, num_classes: int, *, aux: bool = True, size: Size = 224) -> nn.Module:
    """A prepared model whose logits are (B, num_classes) for (B, 3, *sides) images.

    Raises ValueError as `plain` and `prepare`.
    """
    return prepare(plain(name, num_classes, size), aux=aux, size=size)


def prepare(
    model: nn.Module, *, aux: bool = True, size: Size = 224, any_norm: bool = False
) -> nn.Module:
    """A plain model, changed in place into one that the step trains.

    It gets dual norms, fused blocks and a stem, and is channels_last. Raises ValueError for a
    `size` that the model does not accept, and for norms that cannot normalise a batch group by
    group. With `any_norm` these stay, and see every batch as one group.
    """
    convert(model, aux, any_norm=any_norm)
    fuse_blocks(model)
    with lengths_seen(model) as lengths:
        install_stem(model, size)
    mend_strided(model)
    if needs_proof(model, lengths):
        _prove_order(model, size, any_norm)
    return channels_last(model)


def channels_last(model: nn.Module) -> nn.Module:
    """Lay filters out as images lie, in place; returns the model.

    What has no four dimensions stays: `Module.to` would refuse a model that has weights of five.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.ndim == IMAGE_DIMENSIONS:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model


def _prove_order(model: nn.Module, size: Size, any_norm: bool) -> None:
    """From here on a norm's first dimension may be a multiple of the rows, unless it is refused."""
    wrong = out_of_order(model, size)
    if wrong and not any_norm:
        raise ValueError(
            f"model: {type(model).__name__} does not hand the rows of a batch one after the other "
            f"to {names_of(wrong)}, so they cannot be divided into groups"
        )
    for norm in wrong:
        norm.whole_batch = True
    norm_state(model).multiples = True


def plain(
    name: str, num_classes: int, size: Size | None = None, drop_path: float | None = None
) -> nn.Module:
    """An unconverted, randomly initialised model; for images of `size` if it is made for one size.

    `drop_path` is the rate of stochastic depth in its last block; None: the model's own. Raises
    ValueError for a name that nobody knows, for one that asks for pretrained weights, for a size
    that cannot be, and for a rate where there is nothing to drop.
    """
    if drop_path is None:
        return _plain(name, num_classes, size, {})
    of_timm = {DROP_PATH: drop_path}
    try:
        model = _plain(name, num_classes, size, of_timm)
    except TypeError as error:  # of a model of timm that takes no such argument
        if DROP_PATH not in str(error):
            raise
        model = _plain(name, num_classes, size, {})
    rescale(model, drop_path)
    if drop_path and not any(rates_of(model)):
        raise ValueError(
            f"model.drop_path = {drop_path:g}: {shown(name)} has no stochastic depth; leave it out"
        )
    return model


def _plain(name: str, num_classes: int, size: Size | None, of_timm: Mapping[str, Any]) -> nn.Module:
    """`plain`; `of_timm` are more arguments for timm."""
    if name == "cifar_resnet18":
        return cifar_resnet18(num_classes)
    cifar = _CIFAR_RESNET.fullmatch(name)
    if cifar:
        return CifarResNet(int(cifar[1]), num_classes)
    wanted = spelt(name)
    if wanted in torchvision_names():
        options = torchvision_options(wanted, size)
        with _refused_sizes(options, size):
            return torchvision.models.get_model(wanted, num_classes=num_classes, **options)
    architecture, dot, tag = current_name(wanted.removeprefix(TIMM)).partition(".")
    if dot:
        _refuse_tag(name, architecture, tag)
    if timm.is_model(architecture) and not name.startswith(TORCHVISION):
        options = _timm_options(architecture, size) | dict(of_timm)
        with _refused_sizes(options, size):
            return timm.create_model(architecture, num_classes=num_classes, **options)
    near = near_names(name)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"model.name = {shown(name)}: neither torchvision nor timm has it, "
        f"nor is it cifar_resnet18 or cifar_resnetD{hint}"
    )


@contextlib.contextmanager
def _refused_sizes(options: Mapping[str, Any], size: Size | None) -> Iterator[None]:
    """Around a constructor that may refuse images of this size, if it is told it."""
    try:
        yield
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        if size is None or not options.keys() & SIZED or DROP_PATH in str(error):
            raise
        raise ValueError(
            f"data.size = {shown(size)}: the model cannot be made for images of "
            f"{size_in_words(size)} px: {one_line(error)}"
        ) from None


def near_names(name: str) -> list[str]:
    """At most three known names that look like `name`, best first.

    Its case and the tag of its weights do not count.
    """
    name = spelt(name)
    known = set(timm.list_models())
    prefix = TIMM
    if not name.startswith(TIMM):
        known.update(torchvision_names(), CIFAR_RESNETS)
        prefix = ""
    wanted = name.rpartition("/")[2].partition(".")[0].lower()
    near = difflib.get_close_matches(wanted, sorted(known), n=3, cutoff=_ALIKE)
    return [prefix + other for other in near]


def torchvision_options(name: str, size: Size | None) -> dict[str, Any]:
    """What a model needs so that it is randomly initialised and has one output, its logits."""
    if name in ("googlenet", "inception_v3"):
        return {"init_weights": True, "aux_logits": False}
    if name.startswith("vit_") and isinstance(size, int):
        return {"image_size": size}
    return {}


def _timm_options(architecture: str, size: Size | None) -> dict[str, Any]:
    """What a model needs that is made for images of one size, as vision transformers are."""
    cfg = timm.get_pretrained_cfg(architecture)
    if size is None or cfg is None or not cfg.fixed_input_size:
        return {}
    return {"img_size": sides_of(size)}


def _refuse_tag(name: str, architecture: str, tag: str) -> None:
    """Raise ValueError if a name is that of pretrained weights: of a known model, with a tag."""
    is_torchvisions = architecture in torchvision_names()
    if is_torchvisions and tag in torchvision.models.get_model_weights(architecture).__members__:
        known = architecture
        init = f"torchvision:{architecture}.{tag}"
    elif timm.is_model(architecture):
        known = TIMM + architecture
        init = f"timm:{architecture}.{tag}"
    elif is_torchvisions:
        known = architecture
        init = f"torchvision:{architecture}"
    else:
        return
    raise ValueError(
        f"model.name = {shown(name)}: {shown(tag)} names pretrained weights, "
        f"but a name alone gives random weights; write model.name={known}, "
        f"and model.init={readable(init.rstrip('.'))} (or a file) to start from weights"
    )


def check_model_sizes(model: nn.Module, sizes: Collection[int]) -> None:
    """Raise ValueError unless the model takes squares of these sides, in pixels.

    The forward of one image in evaluation mode says it.
    """
    like = next(model.parameters())
    for size in sorted(set(sizes)):
        try:
            with torch.no_grad():
                model.eval()(like.new_zeros(1, 3, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"data.sizes: the model does not accept images of {size} px: {error}"
            ) from None
        finally:
            model.train()
