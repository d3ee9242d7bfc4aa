"""The device functions that the latent's passes share: where an element lies, what is read there, and its noise.

A program works on a tile of TILE neighbouring elements, numbered in row-major order: `first` is the number of its first
element, int64, and `i` is 0 ... TILE - 1, int32 (TILE,). So the arithmetic of 64 bits is that of a few scalars.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.philox import normal_blocks, normals_at

GROUP = tl.constexpr(16)  # Tiles start at multiples of it, which are whole blocks of the noise and of 16 bytes.


class View(NamedTuple):
    """A tensor as a pass reads it, broadcast to the call's shape. The fields of a tensor that is not there are None."""

    data: Any
    strides: Any  # one for each dimension of the call's shape
    packed: Any  # True if neighbours lie side by side, 16 bytes at a time, else None


class Inputs(NamedTuple):
    """The tensors of a call."""

    mu: View
    logvar: View
    prior_mu: View
    prior_logvar: View
    shape: tuple[int, ...]  # what is left of mu's shape after neighbouring dimensions are merged


class Noise(NamedTuple):
    """Which noise an element gets: sample k begins at element first + k * sample_stride of each stream."""

    seeds: Any  # int64 (streams,)
    streams: int
    length: int  # elements of a stream in one sample
    first: int
    sample_stride: int
    per_example: Any  # True if there are several streams, else None
    aligned: Any  # True if four neighbours from a multiple of four on are always a block of one stream, else None


# ---- where an element lies --------------------------------------------------------------------------------------------------


@triton.jit
def divide(first, i, divisor, TILE: tl.constexpr):
    """Divide the numbers first + i, with 0 <= i < TILE, by a divisor from 1 on.

    Return the first quotient, int64, what the others are above it, int32 (TILE,), and the remainders, int64 (TILE,). The
    division of tiles has 32 bits: a divisor above TILE is passed at most once.
    """
    quotient = first // divisor
    rest = first - quotient * divisor
    left = tl.minimum(divisor - rest, TILE).to(tl.int32)  # until the first multiple
    step = tl.minimum(tl.cast(divisor, tl.int64), TILE).to(tl.int32)
    above = tl.where(i < left, 0, 1 + (i - left) // step)
    return quotient, above, rest + i - above * tl.cast(divisor, tl.int64)


@triton.jit
def locate(view, shape, first, i, TILE: tl.constexpr):
    """Return the offsets, int64 (TILE,), of elements in a view."""
    offset = tl.zeros([TILE], tl.int64)
    for d in tl.static_range(len(shape) - 1, 0, -1):
        first, i, index = divide(first, i, shape[d], TILE)
        offset += index * view.strides[d]
    offset += (first + i) * view.strides[0]
    if view.packed is not None:
        WIDTH: tl.constexpr = 128 // view.data.dtype.element_ty.primitive_bitwidth
        offset = tl.max_contiguous(tl.multiple_of(offset, WIDTH), WIDTH)
    return offset


@triton.jit
def load(view, shape, first, i, left, like, TILE: tl.constexpr):
    """Load the elements of a view in the dtype of `like`; those from `left` on are 0."""
    return tl.load(view.data + locate(view, shape, first, i, TILE), mask=i < left, other=0.0).to(like.dtype)


@triton.jit
def load_inputs(inputs, first, i, left, like, TILE: tl.constexpr):
    """Load mu, logvar, prior_mu and prior_logvar, each (TILE,). A prior that is not there is 0."""
    shape = inputs.shape
    mu = load(inputs.mu, shape, first, i, left, like, TILE)
    logvar = load(inputs.logvar, shape, first, i, left, like, TILE)
    prior_mu, prior_logvar = tl.zeros([TILE], like.dtype), tl.zeros([TILE], like.dtype)
    if inputs.prior_mu.data is not None:
        prior_mu = load(inputs.prior_mu, shape, first, i, left, like, TILE)
    if inputs.prior_logvar.data is not None:
        prior_logvar = load(inputs.prior_logvar, shape, first, i, left, like, TILE)
    return mu, logvar, prior_mu, prior_logvar


@triton.jit
def store(out, first, i, x, mask):
    """Store a tile in a contiguous tensor of any dtype. A float64 becomes a float32 on its way to half precision."""
    if out.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    tl.store(out + first + i, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def accumulator(data):
    """Return a 0 of the arithmetic's dtype: float64 for float64 tensors, float32 for the rest."""
    if data.dtype.element_ty == tl.float64:
        return tl.full((), 0.0, tl.float64)
    else:
        return tl.full((), 0.0, tl.float32)


# ---- the noise --------------------------------------------------------------------------------------------------------------


@triton.jit
def stream_of(noise, first, i, TILE: tl.constexpr):
    """Return the seeds, int64, and the positions, int64, of elements within one sample of their streams.

    There is one for each element, (TILE,), or for each block of four, (TILE / 4,), if the noise is aligned; one seed is a
    scalar.
    """
    if noise.aligned is not None:
        i = 4 * tl.arange(0, TILE // 4)
    if noise.per_example is None:
        return tl.load(noise.seeds), first + i
    else:
        stream, above, position = divide(first, i, noise.length, TILE)
        return tl.load(noise.seeds + stream + above, mask=stream + above < noise.streams, other=0), position


@triton.jit
def draw(noise, seed, position, k, like):
    """Return the noise (TILE,) of sample k, which is float32, in the dtype of `like`."""
    sample = noise.first + k * tl.cast(noise.sample_stride, tl.int64)
    position = (sample + position).to(tl.uint64)
    if noise.aligned is not None:
        return normal_blocks(seed, position >> 2).to(like.dtype)
    else:
        return normals_at(seed, position).to(like.dtype)
