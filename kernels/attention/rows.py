"""Copy tiles (ROWS, COLUMNS) of a tensor whose columns are contiguous, by pointers or by descriptor."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A (batch, head, row, column) tensor and its strides. Columns are contiguous."""

    data: Any
    batch: int
    head: int
    row: int
    wide: Any  # True if the rows of one tile span 2**31 elements or more, else None.
    eights: Any  # True if the row stride is a multiple of 8 but not of 16, else None. Of 16 the compiler is told anyway.


@triton.jit
def row_stride(rows):
    """Return the row stride. Where it is a multiple of 8 and the compiler is not told so, the product with 8 shows it.

    Then a thread copies 8 elements at a time, and computes a pointer for 8.
    """
    if rows.eights is None:
        return rows.row
    else:
        return rows.row // 8 * 8


@triton.jit
def tile_pointers(rows, batch, head, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return pointers (ROWS, COLUMNS) to a tile, from row `first` on.

    Offsets that can exceed 2**31 elements are 64 bits wide. Offsets inside a tile are 32 bits wide, unless its rows lie far
    apart.
    """
    base = rows.data + batch * rows.batch + head.to(tl.int64) * rows.head + tl.cast(first, tl.int64) * row_stride(rows)
    r = tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    if rows.wide is not None:
        r = r.to(tl.int64)
    return base + r * row_stride(rows) + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_tile(pointers, rows_left, DIM: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Load a tile (ROWS, COLUMNS), with zeros past DIM columns and, if CHECK_ROWS, past the first `rows_left` rows."""
    ROWS: tl.constexpr = pointers.shape[0]
    COLUMNS: tl.constexpr = pointers.shape[1]
    columns = tl.arange(0, COLUMNS)[None, :] < DIM  # (1, COLUMNS)
    if CHECK_ROWS:
        rows = tl.arange(0, ROWS)[:, None] < rows_left  # (ROWS, 1)
        if COLUMNS == DIM:
            return tl.load(pointers, mask=rows, other=0.0)
        else:
            return tl.load(pointers, mask=rows & columns, other=0.0)
    elif COLUMNS == DIM:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=columns, other=0.0)


@triton.jit
def load_block(
    pointers, rows, descriptor, batch, head, first, within, rows_left, DIM: tl.constexpr, CHECK_ROWS: tl.constexpr
):  # fmt: skip
    """Load the tile (ROWS, COLUMNS) at row `within` of a sequence that begins at row `first`, with zeros as in `load_tile`.

    `pointers` point to the sequence's first tile. `descriptor`, unless None, describes (1, 1, ROWS, COLUMNS) blocks of the
    tensor: the GPU's tensor memory accelerator then copies the tile and fills it up with zeros past the tensor's end.
    """
    if descriptor is None:
        return load_tile(pointers + tl.cast(within, tl.int64) * row_stride(rows), rows_left, DIM, CHECK_ROWS)
    else:
        return descriptor.load([batch.to(tl.int32), head, first + within, 0]).reshape(pointers.shape)


@triton.jit
def store_tile(pointers, values, rows_left, DIM: tl.constexpr):
    """Store the first `rows_left` rows and DIM columns of a tile (ROWS, COLUMNS)."""
    inside = (tl.arange(0, pointers.shape[0])[:, None] < rows_left) & (tl.arange(0, pointers.shape[1])[None, :] < DIM)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)
