"""The section `model`: the network, and the weights that it begins with."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fap.fields import FilePath, PositiveInt, Section, Text


class ModelConfig(Section):
    name: Text = "resnet50"
    """Any torchvision or timm name (`timm/NAME` or `timm:NAME` forces timm, `torchvision:NAME`
    torchvision), `cifar_resnet18` or `cifar_resnetD` with D = 6n + 2. Unset: what the weights of
    `init` are of, if they say it."""
    num_classes: PositiveInt | None = None
    """Unset: the data's class count."""
    init: FilePath | None = None
    """Weights to start from: a file (.safetensors, .pth), a run's folder or checkpoint,
    `torchvision:WEIGHTS`, `timm:MODEL.TAG`, `hf-hub:USER/REPOSITORY` (docs/weights.md). Auxiliary
    norms begin as copies of the main ones; where the classes are others, the head is new. What the
    weights say of their model, and of data.mean, data.std, data.size and data.resize, holds where
    these are unset."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Stochastic depth: how often a row skips the last residual branch, and the others less often
    in proportion to their depth. Unset: the model's own, which timm's begin without."""

    @property
    def classes(self) -> int:
        """`num_classes` of a run whose data is open, or of a checkpoint. ValueError if unset."""
        if self.num_classes is None:
            raise ValueError(
                "model.num_classes is not set, and there is no data here to take it from"
            )
        return self.num_classes
