"""Make the arguments of the latent's kernels: tensors with their strides, of as few dimensions as will do, and the noise."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .device import Inputs, Noise, View

Strides = tuple[int, ...]


class Options(NamedTuple):
    """Hold what the forward and the backward of a call take beside tensors of elements.

    Attributes:
        seed: int64, contiguous, one for all or one for each entry of mu's leading dimensions; None if there is no z.
        event_dims: the last dimensions of mu, over which the KL is summed.
        samples: K, or 0 for one without a leading dimension; first and sample_stride as in LatentCall, with 0 for None.
        numbers: free_bits, low, high, temperature.
        lanes: threads of a warp of the GPU.
    """

    seed: Tensor | None
    event_dims: int
    samples: tuple[int, int, int]
    numbers: tuple[float, float, float, float]
    lanes: int

    def event_size(self, mu: Tensor) -> int:
        """Return the number of elements of a row, over which the KL is summed."""
        return math.prod(mu.shape[mu.dim() - self.event_dims :])


def merged(shape: Sequence[int], tensors: Sequence[Tensor | None]) -> tuple[Strides, list[Strides | None]]:
    """Merge neighbouring dimensions that are contiguous to each other in all tensors, which have that shape or are None.

    Return what is left of the shape, which has a dimension at least, and the strides of each tensor.
    """
    strides = [None if tensor is None else tensor.stride() for tensor in tensors]
    given = [own for own in strides if own is not None]
    last_dims: list[int] = []  # The last of the dimensions that make up each one that is left.
    sizes: list[int] = []
    for d, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(own[last_dims[-1]] == own[d] * size for own in given):
            sizes[-1] *= size
            last_dims[-1] = d
        else:
            sizes.append(size)
            last_dims.append(d)
    if not sizes:
        return (1,), [None if own is None else (1,) for own in strides]
    return tuple(sizes), [None if own is None else tuple(own[d] for d in last_dims) for own in strides]


def view_of(tensor: Tensor | None, strides: Strides | None, shape: Strides, sample_stride: int = 0) -> View:
    """Return a tensor with its strides. It is packed if groups of 16 bytes lie within its rows and start at multiples."""
    if tensor is None:
        return View(None, None, None)
    group = 16 // tensor.element_size()
    steps = (*strides[:-1], sample_stride, shape[-1] if len(shape) > 1 else 0)
    packed = strides[-1] == 1 and not any(step % group for step in steps)
    return View(tensor, strides, True if packed else None)


def make_inputs(shape: Strides, strides: Sequence[Strides | None], tensors: Sequence[Tensor | None]) -> Inputs:
    """Return mu, logvar, prior_mu and prior_logvar as kernels take them."""
    return Inputs(*(view_of(tensor, own, shape) for tensor, own in zip(tensors, strides)), shape)


def make_noise(seed: Tensor | None, elements: int, samples: tuple[int, int, int]) -> Noise | None:
    """Return which noise the elements get, or None without a seed; samples are their number, first and sample_stride or 0."""
    if seed is None:
        return None
    number, first, sample_stride = samples
    streams = seed.numel()
    length = elements // streams
    sample_stride = sample_stride or length
    aligned = (streams == 1 or length % 4 == 0) and (number <= 1 or sample_stride % 4 == 0) and first % 4 == 0
    per_example = True if streams > 1 else None
    return Noise(seed, streams, length, first, sample_stride, per_example, True if aligned else None)
