"""Compile the batch norm's kernels for GPUs that are not here: run by `test_norm_kernel`.

    python -m tests.nets.compile_kernels      # without TRITON_INTERPRET

Prints one line per kernel and GPU: its name, the GPU, whether it loads images by 16 bytes, and
whether no register is spilled to local memory.
"""

import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fap.nets import norm_kernel

KERNELS = (
    "forward_sums",
    "statistics",
    "normalise",
    "backward_sums",
    "group_gradients",
    "gradient",
)
GPUS = {80: "sm_80", 90: "sm_90a"}  # A100, H100
CONSTANTS = {"RESIDUAL": True, "RELU": True, "BLOCK_P": 64, "BLOCK_C": 64}
IMAGES = ("x", "y", "gy", "gx", "residual", "gresidual")  # in half precision; all else is float32
COUNTS = ("image_pixels", "n_channels", "n_main", "n_parts")
PTXAS = Path(triton.__file__).with_name("backends") / "nvidia/bin/ptxas"


def type_of(argument: str) -> str:
    if argument in CONSTANTS:
        return "constexpr"
    if argument in COUNTS:
        return "i32"
    if argument in IMAGES:
        return "*fp16"
    return {"eps": "fp32", "starts": "*i32"}.get(argument, "*fp32")


def source_of(name: str) -> ASTSource:
    """The kernel with the types of a call; pointers and the number of channels divide by 16."""
    kernel = getattr(norm_kernel, name)
    types = {argument: type_of(argument) for argument in kernel.arg_names}
    constants = {k: v for k, v in CONSTANTS.items() if k in types}
    attributes = {}
    for i, (argument, type_name) in enumerate(types.items()):
        if type_name.startswith("*") or argument == "n_channels":
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, types, constants, attributes)


def main() -> None:
    for name in KERNELS:
        for capability, gpu in GPUS.items():
            compiled = triton.compile(source_of(name), target=GPUTarget("cuda", capability, 32))
            code = compiled.asm["ptx"]
            told = subprocess.run(
                [PTXAS, "-v", "--gpu-name", gpu, "-o", "/dev/null", "-"],
                input=code,
                text=True,
                stderr=subprocess.PIPE,
                check=True,
            ).stderr
            by_16_bytes = "ld.global.v4" in code.replace(".L1::evict_last", "")
            print(name, gpu, by_16_bytes, " 0 bytes spill stores" in told)


if __name__ == "__main__":
    main()
