"""The model as one .onnx file, compared with torch before it is written."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fap.evaluate.load import Plain
from fap.export.facts import Written, header
from pipelines.extras import needs
from pipelines.files import one_line, write_whole

OPSET = 18
INPUT = "images"
OUTPUTS = {"classification": "logits"}  # of other tasks: "outputs"
MOST_BYTES = 2**31 - 1  # of one protobuf message
BATCHES = (2, 1, 3)  # images: the first is exported, the others show that the batch is free
# Of the outputs' own size: another order of sums, in convolutions and softmax.
TOLERANCE = 1e-4


class Normalised(nn.Module):
    """A model that takes RGB in 0..1."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(
        self,
        images: Tensor,  # float32 (B, 3, H, W) in 0..1
    ) -> Tensor:
        return self.model((images - self.mean) / self.std)


def write_onnx(plain: Plain, out: Path, normalise: bool) -> Written:
    """`images` float32 (batch, 3, H, W) to `logits`, of a detector `outputs`; the batch is free.

    With `normalise` images are RGB in 0..1, else mean and std are the caller's work. Raises
    ImportError that names the extra, ValueError for a model that cannot be exported or computes
    something else in onnxruntime, OSError.
    """
    with needs("onnx", "exporting to ONNX"):
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    data = plain.config.data
    model: nn.Module = plain.task.plain_model()
    model.load_state_dict(plain.weights)
    if normalise:
        model = Normalised(model, data.mean, data.std)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(n, 3, *data.sides, generator=generator) for n in BATCHES]
    output = OUTPUTS.get(plain.config.task, "outputs")
    proto = _exported(model, batches[0], output)
    images = "RGB in 0..1" if normalise else "RGB in 0..1, minus mean, divided by std"
    told = header(plain) | {"input": images}
    for name, text in told.items():
        proto.metadata_props.add(key=name, value=text)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = max(_difference(model, session, batch) for batch in batches)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"onnxruntime's outputs differ from torch's by {difference:.1e} of their size, more "
            f"than {TOLERANCE:g}; nothing was written"
        )
    write_whole(out, [content], overwrite=False)
    shape = f"float32 (batch, 3, {data.sides[0]}, {data.sides[1]})"
    return Written(
        f"ONNX, opset {OPSET}: {INPUT} {shape}, {images} -> {output}; "
        f"onnxruntime {onnxruntime.__version__} and torch differ by {difference:.1e} of the "
        "outputs' size on random images",
        (
            f"session = onnxruntime.InferenceSession({str(out)!r})",
            f"({output},) = session.run(None, {{{INPUT!r}: images}})",
        ),
    )


def _exported(model: nn.Module, images: Tensor, output: str) -> Any:
    """onnx's ModelProto. ValueError for what torch cannot export."""
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[output],
                dynamic_shapes=({0: batch},),
                verbose=False,
            )
        assert program is not None
        proto = program.model_proto
        if proto.ByteSize() > MOST_BYTES:
            raise ValueError("more than 2 GiB, which is too much for one file")
        return proto
    except Exception as error:  # torch.export may raise anything of a model that it cannot trace
        raise ValueError(f"the model cannot be exported to ONNX: {one_line(error, 300)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own progress, hints and deprecations."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _difference(model: nn.Module, session: Any, images: Tensor) -> float:
    """The largest difference of an output, relative to the largest output."""
    with torch.inference_mode():
        want = model(images)
    (found,) = session.run(None, {INPUT: images.numpy()})
    scale = want.abs().max().clamp(min=1e-6)
    return float((torch.from_numpy(found) - want).abs().max() / scale)
