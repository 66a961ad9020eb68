"""Exact evaluation: loss, top-1 and top-5 of every image once, and the summaries of corruption benchmarks."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn

from fap.norm import evaluate_with, norms
from pipelines.files import shown

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
    if len(position) < len(classes) or len(set(names)) < len(names):
        raise ValueError("a class name is there twice, so classes cannot be told apart by name")
    if unknown := [name for name in names if name not in position]:
        raise ValueError(
            f"{len(unknown)} of the {len(names)} class folders are none of the model's {len(classes)} classes, "
            f"the first being {shown(unknown[0])}; the model has {_first(classes)}"
        )
    return torch.tensor([position[name] for name in names])


class Labels(NamedTuple):
    """How the data's labels become the model's."""

    map: Tensor | None  # int64 (K,): the model's class of each of the data's labels; None: they are the same
    how: str  # for the report


def match_labels(
    names: Sequence[str] | None,  # the data's classes, in the order of its labels
    labels: tuple[int, int],  # the least and the greatest label
    classes: Sequence[str] | None,  # the model's
    n_classes: int,  # logits of the model
    *,
    by_position: bool = False,
    restrict: bool = False,
) -> Labels:
    """Match labels by class names, or by position where that is all there is. Raises ValueError.

    Where only one side has names, nothing shows whether the orders agree (folders 0, 1, 10, 100, 2 are sorted
    as text), so `by_position` must allow it, and the counts must be equal. `restrict` (ImageNet-R) needs names.
    """
    known = n_classes if names is None else len(names)
    if labels[0] < 0 or labels[1] >= known:
        whose = "the model has" if names is None else "there are names for"
        raise ValueError(f"its labels are {labels[0]} to {labels[1]}, but {whose} {known} classes")
    if names and classes:
        label_map = match_classes(names, classes)
        if tuple(names) == tuple(classes):
            return Labels(label_map, "by name")
        return Labels(label_map, f"by name ({len(names)} of {len(classes)} classes)")

    lacking = "the checkpoint" if names else "the data"
    if restrict:
        both = "neither the checkpoint nor the data has class names" if not (names or classes) else f"{lacking} has none"
        raise ValueError(
            f"only the logits of its own classes count, and class names say which those are: {both}; "
            "train and evaluate on data with class names, as fap-convert writes it"
        )
    if not names and not classes:
        return Labels(None, "by position (neither side has class names)")
    if not by_position:
        raise ValueError(
            f"{lacking} has no class names, so labels could only be compared by position, and a wrong order gives a "
            "wrong number without a word; use data with class names, or --labels-by-position if the orders are the same"
        )
    if names and len(names) != n_classes:
        raise ValueError(
            f"it has {len(names)} classes and the model {n_classes}: labels by position need the same classes on both sides"
        )
    return Labels(None, f"by position (allowed by --labels-by-position; {lacking} has no class names)")


def _first(names: Sequence[str], most: int = 3) -> str:
    listed = ", ".join(shown(name, 60) for name in names[:most])
    return listed + (" ..." if len(names) > most else "")


def mce(errors: Mapping[str, float]) -> float:
    """Mean corruption error in percent: the mean of 15 errors (fractions), each divided by AlexNet's.

    Hendrycks & Dietterich (2019), section 4.2. Raises ValueError where one is missing.
    """
    if missing := [name for name in ALEXNET_ERRORS if name not in errors]:
        raise ValueError(f"mCE needs 15 corruptions; missing: {', '.join(missing)}")
    return 100 * fmean(errors[name] / alexnet for name, alexnet in ALEXNET_ERRORS.items())


def lacking(measured: Mapping[str, Mapping[int, Any]], names: Iterable[str] = ALEXNET_ERRORS) -> str:
    """What a summary over `names` at five severities lacks, such as `snow lacks severity 4`; empty if nothing."""
    absent = [name for name in names if name not in measured]
    parts = []
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        parts.append(f"no {', '.join(absent[:3])}{more}")
    for name in names:
        missing = [str(severity) for severity in range(1, 6) if severity not in measured.get(name, range(1, 6))]
        if missing:
            plural = "severity" if len(missing) == 1 else "severities"
            parts.append(f"{name} lacks {plural} {', '.join(missing)}")
    if len(parts) > 4:
        parts[3:] = [f"{len(parts) - 3} more lack some"]
    return "; ".join(parts)


def summarise(errors: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Percentages from top-1 errors (fractions) per corruption and severity, each only where its parts are complete.

    `mean` over whatever was measured; `raw_15`, `raw_19` (the unnormalised means; the latter is what the
    authors' code calls mCE) and `mce`. What an absent one lacks says `lacking`.
    """
    summary = {"mean": 100 * fmean(e for by in errors.values() for e in by.values())}
    full = {name: fmean(by.values()) for name, by in errors.items()}
    for key, names in (("raw_15", [*ALEXNET_ERRORS]), ("raw_19", [*ALEXNET_ERRORS, *EXTRA])):
        if not lacking(errors, names):
            summary[key] = 100 * fmean(full[name] for name in names)
    if "raw_15" in summary:
        summary["mce"] = mce(full)
    return summary
