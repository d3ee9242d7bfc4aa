"""Run kernels of a few instructions, written by hand."""

import numpy as np
import torch

from .interpreter import interpret
from .program import Program

HEADER = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid {threads}
.maxnreg 128
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<99>;
    .reg .b64 %d<9>;
targets:
    .branchtargets
        $zero,
        $one;
    ld.param.b64 %d0, [kernel_param_0];
    ld.param.b64 %d1, [kernel_param_1];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %d2, %r0, {stride};
    add.s64 %d3, %d0, %d2;
    mul.wide.u32 %d4, %r0, {results};
    add.s64 %d5, %d1, %d4;
{body}
    ret;
}}
"""


def run(
    body: str, inputs: torch.Tensor, threads: int = 32, grid: int = 1, shared: int = 1024, each: int = 1, **options
) -> torch.Tensor:
    """Run a kernel. Thread t of a block has its row of the inputs at [%d3] and its `each` int64 results at [%d5]."""
    results = torch.full((threads * each,), -1, dtype=torch.int64)
    stride = inputs.element_size() * inputs[0].numel()
    program = Program(HEADER.format(threads=threads, stride=stride, results=8 * each, body=body))
    tensors = [(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in (inputs, results)]
    parameters = np.array([address for address, _ in tensors], np.uint64).tobytes()
    interpret(program, grid, shared, parameters, tensors, **options)
    return results
