"""The device functions that the passes with tangents share (jvp.py, jvp_backward.py): loads, and the tangents of the scores."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import mask_pointers
from .rows import load_tile, row_stride, tile_pointers


class Tangents(NamedTuple):
    """The tangents of a call's tensors. A field that is None counts as zeros."""

    query: Any  # Rows
    key: Any  # Rows
    value: Any  # Rows
    mask: Any  # Mask
    sinks: Any  # float32 (heads,)


@triton.jit
def tangent_pointers(rows, batch, head, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return pointers (ROWS, COLUMNS) to a tile of a tangent, from row `first` on; 0 without a tangent."""
    if rows is None:
        return 0
    else:
        return tile_pointers(rows, batch, head, first, ROWS, COLUMNS)


@triton.jit
def load_tangent(pointers, rows, within, rows_left, DIM: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Load the tile (ROWS, COLUMNS) of a tangent that lies `within` rows behind the pointers; return 0 without a tangent."""
    if rows is None:
        return 0.0
    else:
        return load_tile(pointers + tl.cast(within, tl.int64) * row_stride(rows), rows_left, DIM, CHECK_ROWS)


@triton.jit
def product_tangents(
    a, b, a_tangent, b_tangent, HAS_A: tl.constexpr, HAS_B: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return the tangents (A_ROWS, B_ROWS) of the products a b^T, of which HAS_A and HAS_B say that they have tangents."""
    if HAS_A:
        products = tl.dot(a_tangent, tl.trans(b), input_precision=PRECISION)
        if HAS_B:
            products = tl.dot(a, tl.trans(b_tangent), products, input_precision=PRECISION)
        return products
    elif HAS_B:
        return tl.dot(a, tl.trans(b_tangent), input_precision=PRECISION)
    else:
        return tl.zeros([a.shape[0], b.shape[0]], tl.float32)


@triton.jit
def score_tangents(
    products, p, softcap_grad, mask, batch, head, query, key, queries, keys, scoring,
    SCALE_ONLY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the tangents of a tile's natural scores, from those of its products and of the mask.

    If MASKED, they are 0 where the weight p is 0: the tangent of a mask's -inf may be infinite or NaN.
    """
    tangents = products * scoring.scale
    if not SCALE_ONLY:
        tangents *= softcap_grad
    if mask is not None:
        inside = (key < keys) & (query < queries)
        tangents += tl.load(mask_pointers(mask, batch, head, query, key), mask=inside, other=0.0).to(tl.float32)
    return tl.where(p == 0.0, 0.0, tangents) if MASKED else tangents
