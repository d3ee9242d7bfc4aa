"""The forward: z and the KL in one pass over the inputs.

A program reads its part of mu and logvar once, draws the noise, and writes z and the sums of its rows, or the sum of its piece
of a row that is longer than a tile (row_sums.py adds the pieces up).

The limit is the memory: an element of s bytes is read twice and written once for each sample, (2 + K) s bytes, 12 for one
sample in float32, and a row's KL takes 4. A prior takes what it holds.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.math import constant
from .device import GROUP, accumulator, draw, load_inputs, store, stream_of
from .gaussian import clamp, kl_of, standard_deviation
from .row_sums import as_rows, sum_columns


class Split(NamedTuple):
    """How the elements are split among programs: whole rows each, or a piece of a row."""

    event: int  # elements of a row
    unit: int  # elements of a program
    rows: int  # rows of a program: 1 for a piece
    pieces: Any  # the number of pieces of a row, or None


@triton.jit
def tile_of(split, block, elements):
    """Return where the elements of a program begin and end."""
    if split.pieces is None:
        begin, limit = block * split.unit, elements
    else:
        row = block // split.pieces
        begin, limit = row * split.event + (block - row * split.pieces) * split.unit, (row + 1) * split.event
    return begin, tl.minimum(begin + split.unit, limit)


@triton.jit
def latent_forward(
    inputs, z, kl, pieces, noise, samples, split, elements,
    free_bits: tl.float64, low: tl.float64, high: tl.float64, temperature: tl.float64,
    TILE: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr, SHIFTED: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Write z (samples, elements) and kl (rows,), or the pieces, float64 (programs,), of kl; each may be None.

    A tile that is SHIFTED begins with elements of another program, because it starts at a multiple of GROUP.
    """
    block = tl.program_id(0).to(tl.int64)
    begin, end = tile_of(split, block, elements)
    first = begin // GROUP * GROUP if SHIFTED else begin
    shift, count = (begin - first).to(tl.int32), (end - first).to(tl.int32)
    i = tl.arange(0, TILE)
    left = tl.minimum(elements - first, TILE).to(tl.int32)
    like = accumulator(inputs.mu.data)
    mu, logvar, prior_mu, prior_logvar = load_inputs(inputs, first, i, left, like, TILE)
    logvar = clamp(logvar, constant(low, like), constant(high, like))
    deviation = standard_deviation(logvar)

    if kl is not None:
        value, _, _, _ = kl_of(inputs, mu, logvar, deviation, prior_mu, prior_logvar)
        least = constant(free_bits, like)
        terms = tl.where(least > value, least, value)  # (TILE,)
        length = split.event if split.pieces is None else split.unit
        sums = sum_columns(as_rows(terms, shift, count, length, ROWS, LEVELS, GATHER), LEVELS)  # (ROWS,)
        row = tl.arange(0, ROWS)
        if split.pieces is None:
            first_row = block * split.rows
            rows = tl.minimum(tl.cast(elements, tl.int64) // split.event - first_row, split.rows)
            tl.store(kl + first_row + row, sums, mask=row < rows)
        else:
            tl.store(pieces + block + row, sums.to(tl.float64))

    if z is not None:
        scaled = constant(temperature, like) * deviation
        seed, position = stream_of(noise, first, i, TILE)
        mask = i < count
        if SHIFTED:
            mask = mask & (i >= shift)
        for k in range(samples):
            eps = draw(noise, seed, position, k, like)
            store(z + tl.cast(k, tl.int64) * elements, first, i, tl.fma(scaled, eps, mu), mask)
