"""Sums of rows, each in an order that depends on nothing but the length of the row: not on the GPU, nor on the batch.

Triton's own sum adds in the order of the registers that hold a tile, and these depend on the GPU and on where tensors lie. Here
neighbours are added, then neighbours of these sums, and so on.
"""

import triton
import triton.language as tl


@triton.jit
def sum_columns(x, LEVELS: tl.constexpr):
    """Sum a tile (ROWS, 2^LEVELS) along its columns. Return (ROWS,)."""
    for _ in tl.static_range(LEVELS):
        left, right = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        x = left + right
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def as_rows(terms, shift, count, length, ROWS: tl.constexpr, LEVELS: tl.constexpr, GATHER: tl.constexpr):
    """Arrange the terms (TILE,) from `shift` to `count`, which are rows of that length, as (ROWS, 2^LEVELS), with zeros.

    They lie there already if a row is as long as the tile, or a power of 2, and nothing is shifted.
    """
    COLUMNS: tl.constexpr = 1 << LEVELS
    TILE: tl.constexpr = terms.shape[0]
    if GATHER:
        place = tl.arange(0, ROWS * COLUMNS)
        row, column = place // COLUMNS, place % COLUMNS
        source = shift + row * length + column
        inside = (column < length) & (source < count)
        terms = tl.where(inside, tl.gather(terms, tl.minimum(source, TILE - 1), 0), 0.0)
    else:
        terms = tl.where(tl.arange(0, TILE) < count, terms, 0.0)
    return tl.reshape(terms, [ROWS, COLUMNS])


@triton.jit
def latent_total(pieces, count, kl, LEVELS: tl.constexpr):
    """Write the sum of a row's pieces, float64 (rows, count), to kl (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, 1 << LEVELS)
    total = tl.zeros([1 << LEVELS], tl.float64)
    for start in range(0, count, 1 << LEVELS):
        total += tl.load(pieces + row * count + start + i, mask=start + i < count, other=0.0)
    total = tl.reshape(sum_columns(tl.reshape(total, [1, 1 << LEVELS]), LEVELS), [])
    tl.store(kl + row, total.to(kl.dtype.element_ty))
