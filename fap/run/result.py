"""The result of a run that is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fap.config import Config
from fap.run.saving import NotSaved, Progress
from fap.versions import versions
from pipelines.files import write_whole


def result_of(config: Config, progress: Progress, image_passes: int) -> dict[str, Any]:
    return {
        "name": config.name,
        "seed": config.seed,
        "method": config.method.name,
        "steps": progress.step,
        "epochs": progress.closed,
        "image_passes": image_passes,
        "seconds": progress.seconds,
        "last": progress.last,
        "best": progress.best,
        "versions": versions(),
    }


def write_result(result: dict[str, Any], folder: Path, last_good: str) -> None:
    """Write `result.json`. Raises NotSaved, which says what has been saved (`last_good`)."""
    text = json.dumps(result, indent=1) + "\n"
    try:
        write_whole(folder / "result.json", [text.encode()])
    except OSError as error:
        raise NotSaved(
            f"training is done, but its result.json could not be written ({error}); {last_good}"
        ) from error
