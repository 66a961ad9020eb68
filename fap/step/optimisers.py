"""The optimisers: SGD and AdamW as torch's fused kernels, and LAMB, over the flat buffers.

Each setting of parameters (`fap.step.parameters`) is one group, whose tensors are the stretches of
the flat buffers that it holds: a single tensor, the whole buffer, where all settings are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fap.sections import OptimConfig
from fap.step.flat import Flat
from fap.step.lamb import Lamb


class Optimiser:
    """The optimiser of a config, with its buffers."""

    def __init__(
        self,
        flat: Flat,
        lr: Tensor,  # float32 (), which the step is fed with
        config: OptimConfig,
    ) -> None:
        self.flat = flat
        self.on_gpu = flat.param.device.type == "cuda"
        self.scales = [setting.lr_scale for setting in flat.stretches]
        self.rates = [lr if scale == 1 else torch.zeros_like(lr) for scale in self.scales]
        """On a GPU the groups' learning rates."""
        kinds = ("momentum",) if config.name == "sgd" else ("exp_avg", "exp_avg_sq")
        self.buffers = {kind: torch.zeros_like(flat.param.data) for kind in kinds}
        groups = [
            {
                "params": [self._part(place) for place in places],
                "lr": self.rates[i] if self.on_gpu else 0.0,
                "weight_decay": setting.decay,
            }
            for i, (setting, places) in enumerate(flat.stretches.items())
        ]
        n_tensors = sum(len(places) for places in flat.stretches.values())
        self.steps: Tensor | None = None
        """float32 (tensors,): steps done, of each tensor as torch's kernels count them."""
        if config.name != "sgd":
            self.steps = torch.zeros(n_tensors, device=flat.param.device)
        self.torch = self._made(config, groups)
        """With the interface of torch's optimisers."""
        if not isinstance(self.torch, Lamb):
            self._give_buffers(self.torch)

    def _part(self, place: slice) -> nn.Parameter:
        """A stretch of the flat parameters, with its gradient."""
        whole = self.flat.param
        if place == slice(0, len(whole)):
            return whole
        part = nn.Parameter(whole.data[place])
        part.grad = self.flat.grad[place]
        return part

    def _made(self, config: OptimConfig, groups: list[dict]) -> torch.optim.Optimizer | Lamb:
        match config.name:
            case "sgd":
                assert config.momentum is not None and config.nesterov is not None
                return torch.optim.SGD(
                    groups,
                    lr=groups[0]["lr"],
                    momentum=config.momentum,
                    nesterov=config.nesterov,
                    fused=True,
                )
            case "adamw":
                assert config.betas is not None and config.eps is not None
                return torch.optim.AdamW(
                    groups,
                    lr=groups[0]["lr"],
                    betas=config.betas,
                    eps=config.eps,
                    fused=True,
                    capturable=self.on_gpu,
                )
            case _:
                assert config.name == "lamb" and self.steps is not None
                assert config.betas is not None and config.eps is not None
                return Lamb(
                    self.flat, groups, self.buffers, self.steps, betas=config.betas, eps=config.eps
                )

    def _give_buffers(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step: one that is skipped would leave uninitialised buffers behind."""
        names = {"momentum": "momentum_buffer"}
        places = [place for places in self.flat.stretches.values() for place in places]
        parts = [part for group in optimizer.param_groups for part in group["params"]]
        for i, (part, place) in enumerate(zip(parts, places, strict=True)):
            for kind, buffer in self.buffers.items():
                optimizer.state[part][names.get(kind, kind)] = buffer[place]
            if self.steps is not None:
                optimizer.state[part]["step"] = self.steps[i]

    def set_lr(self, lr: float) -> None:
        """The groups' rates. On a CPU torch's fused kernels take numbers, on a GPU they read
        tensors; the one of scale 1 is the step's input, which is fed already.
        """
        for i, scale in enumerate(self.scales):
            if not self.on_gpu:
                self.torch.param_groups[i]["lr"] = lr * scale
            elif scale != 1:
                self.rates[i].fill_(lr * scale)

    def __call__(
        self,
        found_inf: Tensor,  # float32 (): 1 if the step is to change nothing, else 0
        scale: Tensor | None,  # float32 (): what gradients are multiplied by; None: 1
    ) -> None:
        """Spend the gradients in the flat buffer."""
        # Attributes by which torch's fused optimisers divide by the scale, and skip.
        self.torch.found_inf = found_inf  # type: ignore[union-attr]
        self.torch.grad_scale = scale  # type: ignore[union-attr]
        self.torch.step()

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on: live tensors, of each parameter by its name."""
        state: dict[str, Tensor] = {}
        for kind, buffer in self.buffers.items():
            named = self.flat.named(buffer)
            state |= {f"{kind}.{name}": tensor for name, tensor in named.items()}
        if self.steps is not None:
            state["optimizer.step"] = self.steps
        return state
