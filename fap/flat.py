"""Parameters, gradients and running statistics as views of flat buffers.

Gradients lie in the order shared | main | aux, so the update-speed synchronisation is two slice
multiplications, the reduction over ranks one all-reduce, the optimiser one kernel, and restoring the running
statistics of a skipped step one `where`.
"""

import torch
from torch import Tensor, nn

from fap.norm import norms

ALIGN = 64  # elements; keeps every view as aligned as a fresh allocation


class Flat:
    """Moves a converted model's parameters into flat buffers, in place; the model must already be on its device."""

    def __init__(self, model: nn.Module) -> None:
        main = {p for n in norms(model) for p in (n.weight, n.bias)}
        aux = {p for n in norms(model) if n.aux is not None for p in (n.aux.weight, n.aux.bias)}
        self.parameters = parameters = dict(model.named_parameters())
        parts = (
            {k: p for k, p in parameters.items() if p not in main and p not in aux},
            {k: p for k, p in parameters.items() if p in main},
            {k: p for k, p in parameters.items() if p in aux},
        )
        self.counts = tuple(sum(p.numel() for p in part.values()) for part in parts)
        self.slices: dict[str, slice] = {}
        bounds, end = [], 0
        for part in parts:
            start = end
            for name, p in part.items():
                self.slices[name] = slice(end, end + p.numel())
                end += -(-p.numel() // ALIGN) * ALIGN
            bounds.append(slice(start, end))
        self.shared, self.main, self.aux = bounds
        first = next(iter(parameters.values()))
        self.param = nn.Parameter(first.new_zeros(end))
        self.grad = first.new_zeros(end)
        self.param.grad = self.grad
        with torch.no_grad():
            for name, where in self.slices.items():
                p = parameters[name]
                view = self.param.data[where].as_strided(p.shape, p.stride())
                view.copy_(p)
                p.data = view
            owners = [b for n in norms(model) for b in (n, n.aux) if b is not None]
            names = [(b, k) for b in owners for k in ("running_mean", "running_var")]
            self.stats = torch.cat([getattr(b, k).flatten() for b, k in names])
            views = self.stats.split([getattr(b, k).numel() for b, k in names])
            for (b, k), view in zip(names, views, strict=True):
                setattr(b, k, view)
        self.accumulate_in(self.grad)

    def accumulate_in(self, grad: Tensor) -> None:
        """Backward passes from now on add to this flat buffer."""
        for name, view in self.named(grad).items():
            self.parameters[name].grad = view

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat buffer under the parameters' names and shapes."""
        return {k: flat[self.slices[k]].as_strided(p.shape, p.stride()) for k, p in self.parameters.items()}
