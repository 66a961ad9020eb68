"""Exact evaluation: every image once, in the mode and through the norms asked for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fap.nets.dual import evaluate_with, is_converted
from fap.nets.norm import Bn
from fap.step.half import HALF, Amp
from fap.tasks.base import Evaluator, Pairs, Result


def evaluate(
    model: nn.Module,
    batches: Pairs,  # uint8 images (B, 3, H, W) and their targets (B, ...), on any device
    evaluator: Evaluator,
    *,
    mean: Sequence[float],  # (3,), of pixels in 0..1
    std: Sequence[float],
    bn: Bn = "main",
    device: torch.device | str = "cpu",
    amp: Amp = "off",
) -> Result:
    """Evaluate `model`, which is on `device`; afterwards each of its modules is in its former mode.

    With torch.distributed initialised, `batches` are this rank's, and the result is that of all
    ranks. Raises ValueError without images or without `bn`.
    """
    with evaluating(model, bn):
        outputs_of = forward(model, mean=mean, std=std, device=device, amp=amp)
        for images, targets in batches:
            evaluator.update(outputs_of(images), targets.to(device))
    return evaluator.result()


def forward(
    model: nn.Module,  # on `device`
    *,
    mean: Sequence[float],  # (3,), of pixels in 0..1
    std: Sequence[float],
    device: torch.device | str = "cpu",
    amp: Amp = "off",
) -> Callable[[Tensor], Tensor]:
    """What gives the outputs (B, ...) for images in 0..255, (B, 3, H, W), on any device."""
    device = torch.device(device)
    mean_255 = torch.tensor(mean, device=device).view(3, 1, 1) * 255
    std_255 = torch.tensor(std, device=device).view(3, 1, 1) * 255
    half = HALF.get(amp)

    def outputs_of(images: Tensor) -> Tensor:
        x = images.to(device).to(memory_format=torch.channels_last)
        with torch.autocast(device.type, half, enabled=half is not None):
            return model((x - mean_255) / std_255)

    return outputs_of


@contextmanager
def evaluating(model: nn.Module, bn: Bn = "main") -> Iterator[None]:
    """As `in_evaluation`, and within the block nothing takes gradients."""
    with torch.inference_mode(), in_evaluation(model, bn):
        yield


@contextmanager
def in_evaluation(model: nn.Module, bn: Bn = "main") -> Iterator[None]:
    """Within the block the model is in evaluation mode, and normalises through `bn`.

    Afterwards each of its modules is in its former mode. Raises ValueError without `bn`.
    """
    # A plain model has no auxiliary norms to choose from.
    choosing: AbstractContextManager[None] = nullcontext()
    if is_converted(model):
        choosing = evaluate_with(model, bn)
    former = [(module, module.training) for module in model.modules()]
    try:
        with choosing:
            model.eval()
            yield
    finally:
        # Not `model.train()`: a run may keep some modules in the other mode.
        for module, training in former:
            module.training = training
