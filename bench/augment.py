"""What does augmentation cost on a CPU, beside loading the same images without it?

    python -m bench.augment [--beton FILE] [--only NAME ...] [--size 224]

An epoch of training crops by the `turbojpeg` loader with one thread, and the same with a policy,
take turns in one process with one thread of torch. Milliseconds of the processor per image, all
threads together (on a GPU: of the clock); what a policy adds, and its ratio to loading alone with
its 95% bootstrap interval. Beside it torchvision's own transform on a batch of the images, one by
one. Writes bench/results/augment_{cpu,cuda}.json and .md.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

from bench.common import ROOT, alternate, options, ratio, report, settings_of, spread
from bench.jpegs import make
from pipelines import Batch, PlanSpec, Store, draw_epoch, open_loader, open_store
from pipelines.augment.spec import NO_AUGMENT, AugmentSpec
from pipelines.convert_images import convert_images

ALONE = "loading alone"
STRONG, WEAK = (0.4, 0.4, 0.4, 0.1), (0.4, 0.4, 0.4, 0.0)
POLICIES: dict[str, tuple[AugmentSpec, v2.Transform | None]] = {
    ALONE: (NO_AUGMENT, None),
    "randaugment": (AugmentSpec("randaugment"), v2.RandAugment()),
    "trivialaugment": (AugmentSpec("trivialaugment"), v2.TrivialAugmentWide()),
    "augmix": (AugmentSpec("augmix", magnitude=3), v2.AugMix()),
    "autoaugment": (AugmentSpec("autoaugment"), v2.AutoAugment()),
    "colour jitter": (AugmentSpec(color_jitter=WEAK), v2.ColorJitter(*WEAK)),
    "colour jitter with hue": (AugmentSpec(color_jitter=STRONG), v2.ColorJitter(*STRONG)),
    "erase 0.25": (AugmentSpec(erase=0.25), v2.RandomErasing(0.25)),
}


def epoch_of(
    spec: AugmentSpec, store: Store, size: int, batch: int, device: torch.device
) -> Iterator[Batch]:
    """The same images for every `spec`."""
    loader = open_loader("turbojpeg", store, size=size, device=device, threads=1)
    made = PlanSpec(0, size, batch, clean_group_rows=batch, augment=spec)
    yield from loader.load(draw_epoch(made, store.heights, store.widths, 0))


def ms_per_image(work: Callable[[], int], device: torch.device) -> float:
    """Of the processor, or on a GPU of the clock; `work` returns how many images it was."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    begin = clock()
    n = work()
    if on_gpu:
        torch.cuda.synchronize()
    return 1e3 * (clock() - begin) / n


def main() -> None:
    parser = options(__doc__, size=224, batch=64, rounds=7, only=list(POLICIES))
    parser.add_argument("--beton", type=Path, default=ROOT / "data" / "jpegs.beton")
    a = parser.parse_args()
    if not a.beton.exists():
        images = a.beton.with_suffix("")
        make(images)
        convert_images(images, a.beton)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [ALONE, *(name for name in a.only if name != ALONE)]
    store = open_store(a.beton)
    images = next(epoch_of(NO_AUGMENT, store, a.size, a.batch, device)).images.clone()

    def measure(name: str) -> tuple[float, float]:
        """Ours, loading included; torchvision's transform alone."""
        theirs = POLICIES[name][1]

        def ours() -> int:
            batches = epoch_of(POLICIES[name][0], store, a.size, a.batch, device)
            return sum(len(one.images) for one in batches)

        def one_by_one() -> int:
            for image in images:
                assert theirs is not None
                theirs(image)
            return len(images)

        alone = 0.0
        if theirs is not None:
            alone = ms_per_image(one_by_one, device)
        return ms_per_image(ours, device), alone

    found = alternate(measure, names, a.rounds)  # (names, 2, rounds)
    results: list[dict[str, Any]] = []
    for name, (ours, theirs) in zip(names, found, strict=True):
        result: dict[str, Any] = {"policy": name, "ms per image": spread(ours)}
        if name != ALONE:
            result["ms added"] = spread(ours - found[0, 0])
            result["torchvision, ms"] = spread(theirs)
            result["x loading alone"] = ratio(ours, found[0, 0])
        results.append(result)
    file = a.out / f"augment_{device.type}"
    lines = report(file, settings_of(a, device=device.type), results, (), row=filled)
    print(*lines, sep="\n")


def filled(result: dict[str, Any]) -> dict[str, Any]:
    """The cells of a line; loading alone has fewer."""
    empty = dict.fromkeys(("ms added", "torchvision, ms", "x loading alone"), "")
    return {"policy": result["policy"], "ms per image": result["ms per image"]} | empty | result


if __name__ == "__main__":
    main()
