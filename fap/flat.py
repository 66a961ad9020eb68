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
        aux = {p for n in norms(model) if n.aux is not None for p in n.aux.parameters()}
        parts = ({*model.parameters()} - main - aux, main, aux)
        self.parameters = dict(model.named_parameters())
        self.counts = tuple(sum(p.numel() for p in part) for part in parts)
        self.slices: dict[str, slice] = {}
        bounds, end = [0], 0
        for part in parts:
            for name, p in self.parameters.items():
                if p in part:
                    self.slices[name] = slice(end, end + p.numel())
                    end += -(-p.numel() // ALIGN) * ALIGN
            bounds.append(end)
        self.shared, self.main, self.aux = map(slice, bounds, bounds[1:])
        self.param = nn.Parameter(next(model.parameters()).new_zeros(end))
        self.grad = self.param.grad = torch.zeros_like(self.param)
        for name, view in self.named(self.param.data).items():
            self.parameters[name].data = view.copy_(self.parameters[name].data)
        statistics = [b for n in norms(model) for b in n.buffers() if b.is_floating_point()]
        self.stats = torch.cat(statistics)
        for buffer, view in zip(statistics, self.stats.split([len(b) for b in statistics]), strict=True):
            buffer.data = view
        self.accumulate_in(self.grad)

    def accumulate_in(self, grad: Tensor) -> None:
        """Backward passes from now on add to this flat buffer."""
        for name, view in self.named(grad).items():
            self.parameters[name].grad = view

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat buffer under the parameters' names and shapes."""
        return {k: flat[self.slices[k]].as_strided(p.shape, p.stride()) for k, p in self.parameters.items()}
