"""Exact evaluation: loss, top-1 and top-5 of every image once, and the summaries of corruption benchmarks."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from fap.norm import evaluate_with, norms

# AlexNet's top-1 errors, mean over severities (hendrycks/robustness): the 15 corruptions of mCE.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.92264, "defocus_blur": 0.81988,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.79836, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.71784, "jpeg_compression": 0.6065
}  # fmt: skip
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")


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

    `restrict`: only the logits of `label_map`'s classes count (ImageNet-R). With torch.distributed initialised,
    `batches` are this rank's and the result is that of all ranks. Raises ValueError without images or without `bn`.
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
                losses = nn.functional.cross_entropy(logits.double(), labels, ignore_index=-1, reduction="sum")
                hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
                sums += torch.stack([losses, hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()])  # no host synchronisation
    finally:
        for module, training in former:
            module.training = training
    if distributed.is_initialized():
        distributed.all_reduce(sums)
    loss, top1, top5, count = sums.tolist()
    if not count:
        raise ValueError("evaluation: the data hold no images")
    return Result(loss / count, top1 / count, top5 / count, int(count))


def match_classes(names: Sequence[str], classes: Sequence[str]) -> Tensor:
    """int64 (len(names),): where each of the data's class names stands among the model's. Raises ValueError."""
    position = {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in names if name not in position]:
        of = f"{len(unknown)} of {len(names)} class folders"
        raise ValueError(f"{of} are none of the model's {len(classes)} classes, the first being {unknown[0]!r}")
    return torch.tensor([position[name] for name in names])


def mce(errors: Mapping[str, float]) -> float:
    """Mean corruption error in percent: the mean of 15 errors (fractions), each divided by AlexNet's.

    Hendrycks & Dietterich (2019), section 4.2. Raises ValueError where one is missing.
    """
    if missing := [name for name in ALEXNET_ERRORS if name not in errors]:
        raise ValueError(f"mCE needs 15 corruptions; missing: {', '.join(missing)}")
    return 100 * fmean(errors[name] / alexnet for name, alexnet in ALEXNET_ERRORS.items())


def summarise(errors: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Percentages from top-1 errors (fractions) per corruption and severity, each only where its parts are complete.

    `mean` over whatever was measured; `raw_15`, `raw_19` (the unnormalised means; the latter is what the
    authors' code calls mCE) and `mce`.
    """
    summary = {"mean": 100 * fmean(e for by in errors.values() for e in by.values())}
    full = {name: fmean(by.values()) for name, by in errors.items() if len(by) == 5}
    for key, names in (("raw_15", [*ALEXNET_ERRORS]), ("raw_19", [*ALEXNET_ERRORS, *EXTRA])):
        if full.keys() >= {*names}:
            summary[key] = 100 * fmean(full[name] for name in names)
    return summary | ({"mce": mce(full)} if "raw_15" in summary else {})
