"""ObjectNet's `mappings/` in the published form, of few objects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torchvision

from fap.class_maps import imagenet

# Folder: label, ImageNet's names, and the numbers of the classes that they name.
OBJECTS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "wrench": ("Wrench", "", ()),
    "air_freshener": ("Air freshener", "", ()),
    "alarm_clock": ("Alarm clock", "digital clock; analog clock", (409, 530)),
    "backpack": ("Backpack", "backpack", (414,)),
    "banana": ("Banana", "banana", (954,)),
    "chair": ("Chair", "barber chair; folding chair; rocking chair, rocker", (423, 559, 765)),
    "lemon": ("Lemon", "lemon", (951,)),
    "t-shirt": ("T-shirt", "jersey", (610,)),
    "umbrella": ("Umbrella", "umbrella", (879,)),
    "vase": ("Vase", "vase", (883,)),
}
MEANINGS = {
    folder: tuple(imagenet()[number] for number in numbers)
    for folder, (_, _, numbers) in sorted(OBJECTS.items())
}
MEANT = {folder: wnids for folder, wnids in MEANINGS.items() if wnids}


def names() -> list[str]:
    """Of ImageNet's classes, in their usual order. As published, some name two classes."""
    found = list(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    assert found[134] == "crane bird"
    found[134] = "crane"
    found[765] += ", rocker"
    return found


def write_mappings(folder: Path) -> None:
    """Lines in an order of their own, as published."""
    folder.mkdir(parents=True)
    lines = np.random.default_rng(5).permutation(1000).tolist()
    by_line = dict(zip(lines, names(), strict=True))
    contents = {
        "folder_to_objectnet_label.json": {name: label for name, (label, _, _) in OBJECTS.items()},
        "objectnet_to_imagenet_1k.json": {
            label: meant for label, meant, _ in OBJECTS.values() if meant
        },
        "pytorch_to_imagenet_2012_id.json": {str(n): line for n, line in enumerate(lines)},
    }
    for file, content in contents.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    text = "".join(f"{by_line[line]}\n" for line in range(1000))
    (folder / "imagenet_to_label_2012_v2").write_text(text)
