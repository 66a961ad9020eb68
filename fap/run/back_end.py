"""The loader of a run, settled before it starts: which one `auto` is, and what decodes its images.

A back end that is named is taken, or the run does not start. `data.decode: gpu` leaves the data as
they are, and hands their JPEGs to the GPU's decoder instead of that back end's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import pipelines
from fap.config import Config, make_config
from fap.sections import DataConfig
from pipelines.back_ends import AUTO, GPU_DECODER
from pipelines.files import readable
from pipelines.store import JPG


def settle(config: Config, stores: Sequence[pipelines.Store], device: torch.device) -> Config:
    """A copy of `config` whose data.pipeline is a back end, and whose data.decode is cpu or gpu.

    Raises:
        ValueError: data.decode asks for what device, data or pipeline do not allow.
        ImportError: it asks for the GPU's decoder, and DALI is missing.
    """
    data = config.data
    on_gpu = device.type == "cuda"
    if data.decode == "gpu":
        _check_gpu_decoding(stores, on_gpu)
    pipeline = data.pipeline
    if pipeline == AUTO:
        pipeline = _chosen(data, stores, on_gpu)
    if pipeline == GPU_DECODER:
        if data.decode == "cpu" and on_gpu:
            raise ValueError(
                f"data.decode = 'cpu' with data.pipeline = {pipeline!r}: it decodes on the GPU that"
                " trains; take data.pipeline = ffcv or turbojpeg, or leave data.decode out"
            )
        decode = "gpu" if on_gpu else "cpu"
    elif data.decode == "gpu" or (data.decode == AUTO and _gpu_suits(data, stores, on_gpu)):
        decode = "gpu"
    else:
        decode = "cpu"
    tree = config.model_dump()
    tree["data"] |= {"pipeline": pipeline, "decode": decode}
    return make_config(tree)


def loader_name(data: DataConfig) -> str:
    """The back end that shows the images of a settled config."""
    return GPU_DECODER if data.decode == "gpu" else data.pipeline


def described(asked: DataConfig, settled: DataConfig) -> str:
    """A line of the start: the loader, who chose it, and where it decodes."""
    name = settled.pipeline
    if asked.pipeline == AUTO:
        name += " (data.pipeline = auto)"
    where = "CPU cores"
    if settled.decode == "gpu":
        where = "the GPU"
        if settled.pipeline != GPU_DECODER:
            where += f", by {GPU_DECODER}"
    return f"loader     {name}, decoding on {where}"


def _chosen(data: DataConfig, stores: Sequence[pipelines.Store], on_gpu: bool) -> str:
    if data.decode == "gpu":
        return GPU_DECODER
    on_gpu = on_gpu and data.decode != "cpu"
    return pipelines.best_loader(stores, gpu=on_gpu, image_filter=data.filter)


def _gpu_suits(data: DataConfig, stores: Sequence[pipelines.Store], on_gpu: bool) -> bool:
    """Whether the GPU's decoder shows what the pipeline would: then `auto` takes it."""
    if not on_gpu or data.pipeline == "reference":
        return False
    shows_the_filter = data.shown_filter in pipelines.BACK_ENDS[GPU_DECODER].filters
    all_jpeg = all((store.modes == JPG).all() for store in stores)
    return shows_the_filter and all_jpeg and pipelines.imports(GPU_DECODER)


def _check_gpu_decoding(stores: Sequence[pipelines.Store], on_gpu: bool) -> None:
    if not on_gpu:
        reason = "this machine has no GPU that torch can use"
        if torch.cuda.is_available():
            reason = "run.device is not a GPU"
        raise ValueError(f"data.decode = 'gpu': {reason}; must be 'cpu', or left out")
    for store in stores:
        if (store.modes != JPG).any():
            raise ValueError(
                f"data.decode = 'gpu': {readable(store.path)} holds samples that are no JPEGs"
                " (raw pixels, or decoded planes): leave it out, or convert the images without"
                " --raw and --decoded"
            )
    pipelines.loader_options(GPU_DECODER)  # ImportError if it is missing
