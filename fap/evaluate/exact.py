"""Exact evaluation: loss, top-1 and top-5 of every image once, and the summaries of corruption
benchmarks.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from fap.nets.dual import evaluate_with, norms


@dataclass(frozen=True)
class Result:
    """Means over `count` images; `top1` and `top5` are fractions."""

    loss: float
    top1: float
    top5: float
    count: int


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],  # .images uint8 (B, 3, H, W), .labels int64 (B,) with -1 = ignored
    *,
    mean: Sequence[float],  # (3,), of pixels in 0..1
    std: Sequence[float],
    bn: Literal["main", "aux"] = "main",
    device: torch.device | str = "cpu",
    amp: Literal["off", "fp16", "bf16"] = "off",
    label_map: Tensor | None = None,  # int64 (K,): the model's class of each of the data's labels
    restrict: bool = False,
) -> Result:
    """Evaluate `model`, which is on `device`; afterwards each of its modules is in its former mode.

    `restrict`: only the logits of `label_map`'s classes count (ImageNet-R). With torch.distributed
    initialised, `batches` are this rank's and the result is that of all ranks. Raises ValueError
    without images or without `bn`.
    """
    device = torch.device(device)
    shift, scale = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (mean, std))
    label_map = None if label_map is None else label_map.to(device)
    cast = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(amp)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    former = [(m, m.training) for m in model.modules()]
    try:
        with torch.inference_mode(), evaluate_with(model, bn) if norms(model) else nullcontext():
            model.eval()
            for batch in batches:
                images, labels = batch.images.to(device), batch.labels.to(device)
                with torch.autocast(device.type, cast, enabled=cast is not None):
                    logits = model((images.to(memory_format=torch.channels_last) - shift) / scale)
                if label_map is not None and restrict:
                    logits = logits[:, label_map]
                elif label_map is not None:
                    labels = torch.where(labels < 0, -1, label_map[labels.clamp(min=0)])
                losses = nn.functional.cross_entropy(
                    logits.double(), labels, ignore_index=-1, reduction="sum"
                )
                hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
                sums += torch.stack(
                    [losses, hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()]
                )  # no host synchronisation
    finally:
        for module, training in former:
            module.training = training
    if distributed.is_initialized():
        distributed.all_reduce(sums)
    loss, top1, top5, count = sums.tolist()
    if not count:
        raise ValueError("evaluation: the data hold no images")
    return Result(loss / count, top1 / count, top5 / count, int(count))
