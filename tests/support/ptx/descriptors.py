"""Describe tensors to the interpreter's tensor memory accelerator."""

import struct

MOST_DIMENSIONS = 5


def descriptor_bytes(descriptor, metadata: dict) -> bytes:
    """Return what stands for a TensorDescriptor of Triton's in the parameter block (tensor_copies.cpp), 128 bytes long.

    `metadata` is the compiler's: what a copy's box is, and that chunks change places within 16 << swizzle bytes.
    """
    tensor = descriptor.base
    size = tensor.element_size()
    shape, strides, box = map(_fastest_first, (descriptor.shape, descriptor.strides, metadata["block_size"]))
    packed = struct.pack(
        "<Q4i5q5q5i", tensor.data_ptr(), len(shape), size, 16 << metadata["swizzle"], 0,
        *_padded(shape), *_padded([stride * size for stride in strides]), *_padded(box),
    )  # fmt: skip
    return packed.ljust(128, b"\0")


def _fastest_first(numbers: list[int]) -> list[int]:
    return list(numbers)[::-1]


def _padded(numbers: list[int]) -> list[int]:
    return numbers + [1] * (MOST_DIMENSIONS - len(numbers))
