"""Pictures of what a model found in the first images of every set: sheets beside the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from fap.evaluate.images import Opened, StoredImages
from fap.evaluate.results import safe_name
from fap.nets.dual import evaluate_with
from fap.nets.norm import Bn
from fap.tasks.base import Task
from pipelines.files import write_whole

GAP = 4  # pixels between the pictures of a sheet
WHITE = (255, 255, 255)


def write_pictures(
    model: nn.Module,  # converted, in evaluation mode
    task: Task,
    names: Sequence[str] | None,  # the model's classes
    opened: Opened,
    file: Path,  # a PNG
    *,
    most: int,  # images
    mean: Sequence[float],
    std: Sequence[float],
    bn: Bn,
    device: torch.device,
    say: Callable[[str], Any],
) -> bool:
    """Write the sheet of a set, unless the task draws nothing.

    What cannot be written costs the picture: `say` is told, and False is returned.
    """
    if not isinstance(opened, StoredImages):
        return True
    pixels, references = opened.first(most)
    images = pixels.to(device)
    mean_255 = torch.tensor(mean, device=device).view(3, 1, 1) * 255
    std_255 = torch.tensor(std, device=device).view(3, 1, 1) * 255
    with torch.inference_mode(), evaluate_with(model, bn):
        outputs = model((images - mean_255) / std_255)
    drawn = task.pictures(pixels, outputs.float().cpu(), references, opened.store, names)
    if not drawn:
        return True
    content = BytesIO()
    sheet(drawn).save(content, "PNG")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, [content.getvalue()])
    except OSError as error:
        say(f"warning: no picture {file}: {error}")
        return False
    return True


def file_of(folder: Path, run: str, key: str, content: str) -> Path:
    """Where the sheet of a run's set lies; `content` says what it shows."""
    return folder / f"{safe_name(run)}-{safe_name(key.replace('/', '-'))}-{content[:8]}.png"


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Side by side, on white."""
    width = sum(picture.width + GAP for picture in pictures) - GAP
    height = max(picture.height for picture in pictures)
    whole = Image.new("RGB", (width, height), WHITE)
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width + GAP
    return whole
