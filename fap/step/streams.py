"""Where passes run, and which gradients they add to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fap.step.flat import Flat, GradientSum
from fap.step.passes import Pass


class Streams:
    """One after the other, or with the clean passes beside the others on a second CUDA stream.

    The clean passes then have gradients of their own, since two streams must not add to the same
    ones. On a CPU there are no streams; the sums are the same.
    """

    def __init__(self, flat: Flat, half_dtype: torch.dtype | None, *, parallel: bool) -> None:
        self.device = flat.grad.device
        self.gradients = GradientSum(flat, flat.grad, half_dtype)
        self.clean_gradients: GradientSum | None = None
        self.clean_stream: torch.cuda.Stream | None = None
        if parallel:
            self.clean_gradients = GradientSum(flat, torch.zeros_like(flat.grad), half_dtype)
            if self.device.type == "cuda":
                self.clean_stream = torch.cuda.Stream(self.device)

    @contextlib.contextmanager
    def of(self, one: Pass) -> Iterator[GradientSum]:
        """The block in which a pass runs. What it reads must stay referenced until `join`."""
        if self.clean_gradients is None or one.blocks[0].kind != "clean":
            yield self.gradients
            return
        if self.clean_stream is not None:
            self.clean_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.clean_stream):
            if one.blocks[0].start == 0:  # of the clean passes the first one
                self.clean_gradients.total.zero_()
            yield self.clean_gradients

    def join(self) -> None:
        """Once all passes are queued: all gradients are in `flat.grad`."""
        if self.clean_gradients is None:
            return
        if self.clean_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.clean_stream)
        self.gradients.total.add_(self.clean_gradients.total)
