"""Run launches of fastlm.kernels on CPU tensors, from the PTX that Triton compiles for a GPU."""

import contextlib
import functools
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from gpu.ahead_of_time import bind_launch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlm.backend import triton as triton_kernels

from .descriptors import descriptor_bytes
from .interpreter import interpret
from .program import Program

FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp64": "d",
}  # fmt: skip
NUM_SCRATCH = 2  # Triton's own parameters come last: pointers to memory that these kernels do not use.


@functools.lru_cache(maxsize=100)
def _program(ptx: str) -> Program:
    return Program(ptx)


@dataclass
class Launcher:
    """Start launches as `fastlm.kernels.common.launch.run` does, for the GPU `arch`."""

    arch: str
    late: bool = True  # Asynchronous copies and products land as late as they may.
    seed: int = 1
    edit: Callable[[str], str] = lambda ptx: ptx  # Plant a fault into the PTX.

    def run(self, launches: Iterable) -> None:
        for launch in launches:
            if launch.grid:
                self._start(launch)

    def _start(self, launch) -> None:
        bound = bind_launch(launch, self.arch)
        binary = triton.compile(bound.source, target=bound.target, options=bound.options)
        program = _program(self.edit(binary.asm["ptx"]))
        metadata = iter(getattr(binary.metadata, "tensordesc_meta", None) or ())
        arguments = [pair for name, kind in bound.source.signature.items() for pair in _flat(kind, bound.arguments[name])]
        values = [packed for kind, value in arguments for packed in _packed(kind, value, metadata)]
        tensors = [_extent(value) for _, value in arguments if isinstance(value, torch.Tensor | TensorDescriptor)]
        block = _parameter_block(program.kernel, values)
        interpret(program, launch.grid, binary.metadata.shared, block, tensors, self.late, self.seed)


def _flat(kind, value) -> Iterator[tuple[str, object]]:
    """Yield (type, value) of what a kernel takes as parameters; constants are compiled in."""
    if isinstance(kind, tuple):
        for pair in zip(kind, value):
            yield from _flat(*pair)
    elif kind != "constexpr":
        yield kind, value


def _packed(kind: str, value, metadata: Iterator[dict]) -> list[bytes]:
    """Return the bytes of an argument: one parameter, but for a descriptor, which its shape and its strides follow."""
    if isinstance(value, TensorDescriptor):
        sizes = [struct.pack("<i", size) for size in value.shape] + [struct.pack("<q", stride) for stride in value.strides]
        return [descriptor_bytes(value, next(metadata)), *sizes]
    if isinstance(value, torch.Tensor):
        return [struct.pack("<Q", value.data_ptr())]
    return [struct.pack("<" + FORMATS[kind], value)]


def _extent(value: torch.Tensor | TensorDescriptor) -> tuple[int, int]:
    """Return (address, bytes) of what lies between a tensor's first and last element."""
    tensor = value.base if isinstance(value, TensorDescriptor) else value
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), (last + 1) * tensor.element_size() if tensor.numel() else 0


def _parameter_block(kernel, values: list[bytes]) -> bytes:
    """Lay the parameters out where the kernel reads them."""
    parameters = list(kernel.parameters.values())
    assert [len(value) for value in values] == [parameter.size for parameter in parameters[:-NUM_SCRATCH]]
    block = bytearray(kernel.parameter_bytes)
    for parameter, value in zip(parameters, values):
        block[parameter.offset : parameter.offset + parameter.size] = value
    return bytes(block)


@contextlib.contextmanager
def substituted(launcher: Launcher):
    """Let `backend="triton"` take CPU tensors in the block, and start its kernels by the launcher."""
    attention, latent, noise = triton_kernels.attention(), triton_kernels.latent(), triton_kernels.noise()
    replaced = [(triton_kernels, "interpreted", lambda: True), (attention, "architecture", lambda device: launcher.arch)]
    replaced += [(kernels, "run", launcher.run) for kernels in (attention, latent, noise)]
    with contextlib.ExitStack() as stack:
        for module, name, value in replaced:
            stack.enter_context(mock.patch.object(module, name, value))
        yield
