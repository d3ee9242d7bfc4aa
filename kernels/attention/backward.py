"""The backward of attention, without atomics: every gradient is summed by one program, in one order.

    delta = sum_d out grad_out - grad_lse;  p = exp(s - maximum) / total;  dp = grad_out v^T;  ds = p (dp - delta)
    grad_value = p^T grad_out;  grad_key = scale ds^T q;  grad_query = scale ds k;  grad_mask = ds

One pass for delta, one over the blocks of keys, one over the blocks of queries, and one over the mask where it wants a gradient
(mask.py); the weights are computed again in each. Source: Dao, "FlashAttention-2" (2023).
"""

import triton
import triton.language as tl

from .device import (
    dropout_stream,
    kept,
    load_block,
    load_tile,
    loop_bounds,
    masked,
    place,
    scores,
    seen_range,
    slope_of,
    store_tile,
    tile_pointers,
    visit_list,
    visited,
)


@triton.jit
def attention_delta(
    out, grad_out, grad_lse, delta, heads, rows, DV: tl.constexpr, VALUE_COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Write delta, float32 (batch, heads, rows); grad_lse is like it, or None."""
    blocks = tl.cdiv(rows, BLOCK_Q)
    block, unit = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    start, batch, head = block * BLOCK_Q, (unit // heads).to(tl.int64), unit % heads
    o = load_tile(tile_pointers(out, batch, head, start, BLOCK_Q, VALUE_COLUMNS), rows - start, DV, True)
    g = load_tile(tile_pointers(grad_out, batch, head, start, BLOCK_Q, VALUE_COLUMNS), rows - start, DV, True)
    sums = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    i = start + tl.arange(0, BLOCK_Q)
    at = unit.to(tl.int64) * rows + i
    if grad_lse is not None:
        sums -= tl.load(grad_lse + at, mask=i < rows, other=0.0)
    tl.store(delta + at, sums, mask=i < rows)


@triton.jit
def load_statistics(statistics, delta, at, rows_left, ROWS: tl.constexpr, CHECKED: tl.constexpr):
    """Return (maximum, log2 of the total, delta) of ROWS rows from row `at` on of all that there are.

    Past the last row, and for a row that saw no key, the maximum is inf, which makes weights 0, and delta, NaN by a sink, is 0.
    """
    r = tl.arange(0, ROWS)
    pairs = statistics + at * 2 + r * 2
    if CHECKED:
        inside = r < rows_left
        maximum = tl.load(pairs, mask=inside, other=float("inf"))
        maximum = tl.where(maximum == float("-inf"), float("inf"), maximum)
        its_delta = tl.load(delta + at + r, mask=inside, other=0.0)
        its_delta = tl.where(maximum == float("inf"), 0.0, its_delta)
        return maximum, tl.load(pairs + 1, mask=inside, other=0.0), its_delta
    else:
        return tl.load(pairs), tl.load(pairs + 1), tl.load(delta + at + r)


@triton.jit
def recompute_p(
    s, maximum, log2_total, mask, batch, head, at, i, j, q_len, k_len, slope, scoring,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, CLAMPED: tl.constexpr,
):  # fmt: skip
    """Return (p, derivative of the softcap) of a tile of products; maximum and log2_total of its rows broadcast against it.

    CLAMPED: p is at most 1, where a score may come out an ulp, which is 64 at 1e9, above what the forward found.
    """
    derivative = 1.0
    if not PLAIN:
        s, derivative = scores(s, at, j, slope, scoring)
    if MASKED:
        s = masked(s, mask, batch, head, at, i, j, q_len, k_len, scoring.left, scoring.right)
    exponent = tl.fma(s - maximum, scoring.factor, -log2_total)
    if CLAMPED:
        exponent = tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(exponent), derivative


@triton.jit
def attention_grad_key_value(
    query, key, value, grad_out, query_tiles, grad_out_tiles, statistics, delta, grad_key, grad_value,
    mask, visits, sizes, scoring, dropout, together,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program per head of keys and block of keys walks over the queries that see them, head by head of its group.

    Tiles are (keys, queries), so that the weights are the left operand of the product they enter, as they lie.
    """
    kv_heads = sizes.heads // sizes.group
    b, kv_head, block, batch, q_first, q_len, k_first, k_len = place(
        tl.program_id(0), kv_heads, sizes.k_len, sizes, sizes.cu_k, together, BLOCK_K
    )
    k_start = block * BLOCK_K
    if k_start < k_len:
        k = load_tile(tile_pointers(key, batch, kv_head, k_first + k_start, BLOCK_K, COLUMNS), k_len - k_start, D, True)
        v = load_tile(
            tile_pointers(value, batch, kv_head, k_first + k_start, BLOCK_K, VALUE_COLUMNS), k_len - k_start, DV, True
        )
        shift = k_len - q_len
        j = (k_start + tl.arange(0, BLOCK_K))[:, None]
        # A key at place j is seen by the queries from j - shift - right to j - shift + left.
        last = tl.minimum(k_start + BLOCK_K, k_len) - 1
        begin, whole, edge, end = seen_range(k_start - shift, last - shift, q_len, scoring.right, scoring.left, BLOCK_Q)
        CLAMPED: tl.constexpr = not PLAIN or k.dtype == tl.float32  # tensor instructions add up the same way again
        dk = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
        dv = tl.zeros([BLOCK_K, VALUE_COLUMNS], tl.float32)
        for member in range(sizes.group):
            head = kv_head * sizes.group + member
            q_pointers = tile_pointers(query, batch, head, q_first, BLOCK_Q, COLUMNS)
            g_pointers = tile_pointers(grad_out, batch, head, q_first, BLOCK_Q, VALUE_COLUMNS)
            first_row = (batch * sizes.heads + head) * sizes.q_len + q_first
            slope = slope_of(scoring, b, head)
            seed, stream = dropout_stream(dropout, b, head, sizes.heads)
            visit, count = visit_list(visits, b, head, block)
            for phase in tl.static_range(3):
                start, stop = loop_bounds(phase, begin, whole, edge, end, count, visits is not None, BLOCK_Q)
                for step in range(start, stop, BLOCK_Q):
                    q_start = visited(visits, visit, step, BLOCK_Q)
                    rows_left = q_len - q_start
                    q = load_block(q_pointers, query, query_tiles, batch, head, q_first, q_start, rows_left, D, phase != 1)
                    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_K, BLOCK_Q)
                    at = first_row + q_start
                    maximum, log2_total, its_delta = load_statistics(statistics, delta, at, rows_left, BLOCK_Q, phase != 1)
                    i = q_start + tl.arange(0, BLOCK_Q)
                    p, derivative = recompute_p(
                        s, maximum[None, :], log2_total[None, :], mask, batch, head, (i + shift)[None, :], i[None, :], j,
                        q_len, k_len, slope, scoring, PLAIN, phase != 1, CLAMPED,
                    )  # fmt: skip
                    g = load_block(
                        g_pointers, grad_out, grad_out_tiles, batch, head, q_first, q_start, rows_left, DV, phase != 1
                    )
                    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
                    if dropout.seed is None:
                        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
                    else:
                        keep = kept(dropout, seed, stream, i, k_start, BLOCK_Q, BLOCK_K, True)
                        dv = tl.dot((p * keep).to(g.dtype), g, dv, input_precision=PRECISION)
                        dp *= keep * dropout.keep_scale
                    ds = p * (dp - its_delta[None, :])
                    if not PLAIN:
                        ds *= derivative
                    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if dropout.seed is not None:
            dv *= dropout.keep_scale
        dk_pointers = tile_pointers(grad_key, batch, kv_head, k_first + k_start, BLOCK_K, COLUMNS)
        dv_pointers = tile_pointers(grad_value, batch, kv_head, k_first + k_start, BLOCK_K, VALUE_COLUMNS)
        store_tile(dk_pointers, dk * scoring.scale, k_len - k_start, D)
        store_tile(dv_pointers, dv, k_len - k_start, DV)


@triton.jit
def attention_grad_query(
    query, key, value, grad_out, key_tiles, value_tiles, statistics, delta, grad_query,
    mask, visits, sizes, scoring, dropout, together,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program per head and block of queries walks over the keys that its queries see, as in the forward."""
    b, head, block, batch, q_first, q_len, k_first, k_len = place(
        tl.program_id(0), sizes.heads, sizes.q_len, sizes, sizes.cu_q, together, BLOCK_Q
    )
    q_start = block * BLOCK_Q
    if q_start < q_len:
        kv_head, rows_left = head // sizes.group, q_len - q_start
        q = load_tile(tile_pointers(query, batch, head, q_first + q_start, BLOCK_Q, COLUMNS), rows_left, D, True)
        g = load_tile(tile_pointers(grad_out, batch, head, q_first + q_start, BLOCK_Q, VALUE_COLUMNS), rows_left, DV, True)
        k_pointers = tile_pointers(key, batch, kv_head, k_first, BLOCK_K, COLUMNS)
        v_pointers = tile_pointers(value, batch, kv_head, k_first, BLOCK_K, VALUE_COLUMNS)
        shift = k_len - q_len
        i = q_start + tl.arange(0, BLOCK_Q)
        first_row = (batch * sizes.heads + head) * sizes.q_len + q_first + q_start
        maximum, log2_total, its_delta = load_statistics(statistics, delta, first_row, rows_left, BLOCK_Q, True)
        slope = slope_of(scoring, b, head)
        seed, stream = dropout_stream(dropout, b, head, sizes.heads)
        CLAMPED: tl.constexpr = not PLAIN or q.dtype == tl.float32  # tensor instructions add up the same way again
        dq = tl.zeros([BLOCK_Q, COLUMNS], tl.float32)
        last = tl.minimum(q_start + BLOCK_Q, q_len) - 1
        begin, whole, edge, end = seen_range(q_start + shift, last + shift, k_len, scoring.left, scoring.right, BLOCK_K)
        visit, count = visit_list(visits, b, head, block)
        for phase in tl.static_range(3):
            start, stop = loop_bounds(phase, begin, whole, edge, end, count, visits is not None, BLOCK_K)
            for step in range(start, stop, BLOCK_K):
                k_start = visited(visits, visit, step, BLOCK_K)
                k = load_block(k_pointers, key, key_tiles, batch, kv_head, k_first, k_start, k_len - k_start, D, phase != 1)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
                j = (k_start + tl.arange(0, BLOCK_K))[None, :]
                p, derivative = recompute_p(
                    s, maximum[:, None], log2_total[:, None], mask, batch, head, (i + shift)[:, None], i[:, None], j,
                    q_len, k_len, slope, scoring, PLAIN, phase != 1, CLAMPED,
                )  # fmt: skip
                v = load_block(
                    v_pointers, value, value_tiles, batch, kv_head, k_first, k_start, k_len - k_start, DV, phase != 1
                )
                dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
                if dropout.seed is not None:
                    keep = kept(dropout, seed, stream, i, k_start, BLOCK_Q, BLOCK_K, False)
                    dp *= keep * dropout.keep_scale
                ds = p * (dp - its_delta[:, None])
                if not PLAIN:
                    ds *= derivative
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        dq_pointers = tile_pointers(grad_query, batch, head, q_first + q_start, BLOCK_Q, COLUMNS)
        store_tile(dq_pointers, dq * scoring.scale, rows_left, D)
