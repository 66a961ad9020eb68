"""The weights that `model.init` names."""

from __future__ import annotations

from fap.checkpoint import DamagedCheckpoint
from fap.nets.weights import of_timm, of_torchvision
from fap.nets.weights.about import Weights
from fap.nets.weights.files import from_path
from fap.nets.weights.names import TORCHVISION
from pipelines.files import shown
from pipelines.sizes import Size

TIMM = "timm:"
HUB = "hf-hub:"
FORMS = (
    "a .safetensors or .pth file, a run's folder, torchvision:WEIGHTS, timm:MODEL.TAG or "
    "hf-hub:USER/REPOSITORY"
)


def is_published(init: str) -> bool:
    """Is it the name of published weights, no path?"""
    return init.startswith((TORCHVISION, TIMM, HUB))


def find_weights(
    init: str,
    model_name: str | None = None,
    size: Size | None = None,
    where: str | None = None,  # how a message begins; None: model.init = ...
) -> Weights:
    """Read the weights that `init` names (`FORMS`); what is published may be downloaded.

    `model_name` completes a name such as timm:TAG. `size`, of images, is what weights of timm are
    resampled to whose model is made for one size. Raises ValueError, in one line.
    """
    where = where or named(init)
    try:
        if init.startswith(TORCHVISION):
            return of_torchvision.published(init.removeprefix(TORCHVISION), model_name)
        if init.startswith(TIMM):
            return of_timm.published(init.removeprefix(TIMM), model_name, size)
        if init.startswith(HUB):
            return of_timm.of_hub(init.removeprefix(HUB), size)
        return from_path(init)
    except FileNotFoundError:
        raise ValueError(f"{where}: no such file; it is {FORMS}") from None
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror or error}") from None
    except (ValueError, DamagedCheckpoint) as error:
        raise ValueError(f"{where}: {error}") from None


def named(init: str) -> str:
    """How a message names weights."""
    return f"model.init = {shown(init)}"
