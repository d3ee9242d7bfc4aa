"""The backward of attention, without atomics: one program sums each gradient, in one order.

    delta = sum_d out grad_out - grad_lse;  p = exp(s - maximum) / sum;  dp = grad_out v^T;  ds = p (dp - delta)
    grad_value = p^T grad_out;  grad_key = scale ds^T q;  grad_query = scale ds k;  grad_mask = ds

One pass computes delta, one walks over the blocks of keys, and one over the blocks of queries. Where the mask wants a gradient,
another pass walks over the mask (mask.py). Each of the last three computes the weights p again.
Source: Dao, "FlashAttention-2" (2023).
"""

import triton
import triton.language as tl

from .device import (
    block_list,
    block_start,
    dropout_origin,
    first_position,
    keep_mask,
    locate,
    mask_scores,
    natural_scores,
    phase_bounds,
    seen_range,
    slope_of,
)
from .rows import load_block, load_tile, store_tile, tile_pointers
from .stats import load_key_grads, load_row_grads, score_grads


@triton.jit
def attention_delta(
    out, grad_out, grad_lse, delta, heads, rows, DV: tl.constexpr, VALUE_COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Write delta, float32 (batch, heads, rows). grad_lse has the same dtype and shape, or is None."""
    blocks = tl.cdiv(rows, BLOCK_Q)
    block, batch_head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    start, batch, head = block * BLOCK_Q, (batch_head // heads).to(tl.int64), batch_head % heads
    o = load_tile(tile_pointers(out, batch, head, start, BLOCK_Q, VALUE_COLUMNS), rows - start, DV, True)
    g = load_tile(tile_pointers(grad_out, batch, head, start, BLOCK_Q, VALUE_COLUMNS), rows - start, DV, True)
    sums = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)  # (BLOCK_Q,), from two tiles (BLOCK_Q, VALUE_COLUMNS)
    i = start + tl.arange(0, BLOCK_Q)
    row = batch_head.to(tl.int64) * rows + i
    if grad_lse is not None:
        sums -= tl.load(grad_lse + row, mask=i < rows, other=0.0)
    tl.store(delta + row, sums, mask=i < rows)


@triton.jit
def load_statistics(statistics, delta, first_row, rows_left, ROWS: tl.constexpr, CHECKED: tl.constexpr):
    """Return (row_max, log2_sum, delta_tile) of ROWS rows from `first_row` on, each (ROWS,).

    Past the last row, and for a row that saw no key, the maximum is inf, which makes the weights 0. There delta, which a sink
    can make NaN, is 0. Everywhere it is 0.0 if `delta` is None.
    """
    r = tl.arange(0, ROWS)
    pairs = statistics + first_row * 2 + r * 2
    delta_tile = 0.0
    if CHECKED:
        inside = r < rows_left
        row_max = tl.load(pairs, mask=inside, other=float("inf"))
        row_max = tl.where(row_max == float("-inf"), float("inf"), row_max)
        if delta is not None:
            delta_tile = tl.load(delta + first_row + r, mask=inside, other=0.0)
            delta_tile = tl.where(row_max == float("inf"), 0.0, delta_tile)
        return row_max, tl.load(pairs + 1, mask=inside, other=0.0), delta_tile
    else:
        row_max, log2_sum = tl.load(pairs), tl.load(pairs + 1)
        if delta is not None:
            delta_tile = tl.load(delta + first_row + r)
        return row_max, log2_sum, delta_tile


@triton.jit
def recompute_p(
    s, row_max, log2_sum, mask, batch, head, position, i, j, q_len, k_len, slope, scoring,
    SCALE_ONLY: tl.constexpr, MASKED: tl.constexpr, CLAMPED: tl.constexpr,
):  # fmt: skip
    """Return (p, softcap_grad, softcap_bend) of a tile of products; `recompute_log2_p` explains the arguments."""
    log2_p, softcap_grad, softcap_bend = recompute_log2_p(
        s, row_max, log2_sum, mask, batch, head, position, i, j, q_len, k_len, slope, scoring, SCALE_ONLY, MASKED, CLAMPED
    )
    return tl.exp2(log2_p), softcap_grad, softcap_bend


@triton.jit
def recompute_log2_p(
    s, row_max, log2_sum, mask, batch, head, position, i, j, q_len, k_len, slope, scoring,
    SCALE_ONLY: tl.constexpr, MASKED: tl.constexpr, CLAMPED: tl.constexpr,
):  # fmt: skip
    """Return (log2 of p, softcap_grad, softcap_bend) of a tile of products; the last two are those of `natural_scores`.

    `row_max` and `log2_sum` of the tile's rows broadcast against it. CLAMPED keeps p at most 1: a score may come out an ulp,
    which is 64 at 1e9, above what the forward found.
    """
    softcap_grad, softcap_bend = 1.0, 0.0
    if not SCALE_ONLY:
        s, softcap_grad, softcap_bend = natural_scores(s, position, j, slope, scoring)
    if MASKED:
        s = mask_scores(s, mask, batch, head, position, i, j, q_len, k_len, scoring.left, scoring.right)
    exponent = tl.fma(s - row_max, scoring.factor, -log2_sum)
    if CLAMPED:
        exponent = tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return exponent, softcap_grad, softcap_bend


@triton.jit
def attention_grad_key_value(
    query, key, value, grad_out, query_desc, grad_out_desc, statistics, delta, stats, grad_key, grad_value,
    mask, block_lists, sizes, scoring, dropout, heads_per_group,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write grad_key and grad_value of a block of keys of one head.

    stats: StatsGrads, whose gradients are added, or None.
    The program walks over the queries that see the block, head by head of its group. Tiles of scores are (BLOCK_K, BLOCK_Q), so
    that the weights are the left operand of the product they enter, without a transposition.
    """
    kv_heads = sizes.heads // sizes.group
    b, kv_head, block, batch, q_first, q_len, k_first, k_len = locate(
        tl.program_id(0), kv_heads, sizes.k_len, sizes, sizes.cu_k, heads_per_group, BLOCK_K
    )
    k_start = block * BLOCK_K
    if k_start < k_len:
        k_pointers = tile_pointers(key, batch, kv_head, k_first + k_start, BLOCK_K, COLUMNS)
        keys_left = k_len - k_start
        k = load_tile(k_pointers, keys_left, D, True)  # (BLOCK_K, COLUMNS)
        v_pointers = tile_pointers(value, batch, kv_head, k_first + k_start, BLOCK_K, VALUE_COLUMNS)
        v = load_tile(v_pointers, keys_left, DV, True)  # (BLOCK_K, VALUE_COLUMNS)
        shift = first_position(sizes.places, b, q_len, k_len)  # Query i has the position of key i + shift.
        j = (k_start + tl.arange(0, BLOCK_K))[:, None]  # (BLOCK_K, 1)
        # The queries from j - shift - right to j - shift + left see key j.
        last = tl.minimum(k_start + BLOCK_K, k_len) - 1
        begin, whole, edge, end = seen_range(k_start - shift, last - shift, q_len, scoring.right, scoring.left, BLOCK_Q)
        # Tensor instructions add up products in the same way as in the forward, so that these scores need no clamp.
        CLAMPED: tl.constexpr = not SCALE_ONLY or k.dtype == tl.float32
        dk = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
        dv = tl.zeros([BLOCK_K, VALUE_COLUMNS], tl.float32)
        for member in range(sizes.group):
            head = kv_head * sizes.group + member
            q_pointers = tile_pointers(query, batch, head, q_first, BLOCK_Q, COLUMNS)
            g_pointers = tile_pointers(grad_out, batch, head, q_first, BLOCK_Q, VALUE_COLUMNS)
            first_row = (batch * sizes.heads + head) * sizes.q_len + q_first
            first_key = (batch * sizes.heads + head) * sizes.k_len + k_first + k_start
            grad_key_mass = load_key_grads(stats, first_key, keys_left, BLOCK_K, True)
            slope = slope_of(scoring, b, head)
            origin = dropout_origin(dropout, sizes, b, head)
            list_start, count = block_list(block_lists, b, head, block)
            for phase in tl.static_range(3):
                start, stop = phase_bounds(phase, begin, whole, edge, end, count, block_lists is not None, BLOCK_Q)
                for step in range(start, stop, BLOCK_Q):
                    q_start = block_start(block_lists, list_start, step, BLOCK_Q)
                    rows_left = q_len - q_start
                    # (BLOCK_Q, COLUMNS)
                    q = load_block(q_pointers, query, query_desc, batch, head, q_first, q_start, rows_left, D, phase != 1)
                    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_K, BLOCK_Q)
                    row_max, log2_sum, delta_tile = load_statistics(
                        statistics, delta, first_row + q_start, rows_left, BLOCK_Q, phase != 1
                    )  # (BLOCK_Q,) each
                    i = q_start + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
                    log2_p, softcap_grad, _ = recompute_log2_p(
                        s, row_max[None, :], log2_sum[None, :], mask, batch, head, (i + shift)[None, :], i[None, :], j,
                        q_len, k_len, slope, scoring, SCALE_ONLY, phase != 1, CLAMPED,
                    )  # fmt: skip
                    p = tl.exp2(log2_p)  # (BLOCK_K, BLOCK_Q)
                    g = load_block(
                        g_pointers, grad_out, grad_out_desc, batch, head, q_first, q_start, rows_left, DV, phase != 1
                    )  # (BLOCK_Q, VALUE_COLUMNS)
                    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)  # (BLOCK_K, BLOCK_Q)
                    if dropout.seed is None:
                        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
                    else:
                        keep = keep_mask(dropout, origin, i, k_start, BLOCK_Q, BLOCK_K, True)
                        dv = tl.dot((p * keep).to(g.dtype), g, dv, input_precision=PRECISION)
                        dp *= keep * dropout.keep_scale
                    row_grads = load_row_grads(stats, first_row + q_start, rows_left, BLOCK_Q, True)
                    # (BLOCK_K, BLOCK_Q)
                    ds = score_grads(dp, p, log2_p, delta_tile[None, :], j, stats, row_grads, grad_key_mass)
                    if not SCALE_ONLY:
                        ds *= softcap_grad
                    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if dropout.seed is not None:
            dv *= dropout.keep_scale
        dk_pointers = tile_pointers(grad_key, batch, kv_head, k_first + k_start, BLOCK_K, COLUMNS)
        dv_pointers = tile_pointers(grad_value, batch, kv_head, k_first + k_start, BLOCK_K, VALUE_COLUMNS)
        store_tile(dk_pointers, dk * scoring.scale, keys_left, D)
        store_tile(dv_pointers, dv, keys_left, DV)


@triton.jit
def attention_grad_query(
    query, key, value, grad_out, key_desc, value_desc, statistics, delta, stats, grad_query,
    mask, block_lists, sizes, scoring, dropout, heads_per_group,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write grad_query of a block of queries of one head. As in the forward, the program walks over the keys that they see."""
    b, head, block, batch, q_first, q_len, k_first, k_len = locate(
        tl.program_id(0), sizes.heads, sizes.q_len, sizes, sizes.cu_q, heads_per_group, BLOCK_Q
    )
    q_start = block * BLOCK_Q
    if q_start < q_len:
        kv_head, rows_left = head // sizes.group, q_len - q_start
        q_pointers = tile_pointers(query, batch, head, q_first + q_start, BLOCK_Q, COLUMNS)
        q = load_tile(q_pointers, rows_left, D, True)  # (BLOCK_Q, COLUMNS)
        g_pointers = tile_pointers(grad_out, batch, head, q_first + q_start, BLOCK_Q, VALUE_COLUMNS)
        g = load_tile(g_pointers, rows_left, DV, True)  # (BLOCK_Q, VALUE_COLUMNS)
        k_pointers = tile_pointers(key, batch, kv_head, k_first, BLOCK_K, COLUMNS)
        v_pointers = tile_pointers(value, batch, kv_head, k_first, BLOCK_K, VALUE_COLUMNS)
        shift = first_position(sizes.places, b, q_len, k_len)  # Query i has the position of key i + shift.
        i = q_start + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
        first_row = (batch * sizes.heads + head) * sizes.q_len + q_first + q_start
        row_max, log2_sum, delta_tile = load_statistics(statistics, delta, first_row, rows_left, BLOCK_Q, True)
        row_grads = load_row_grads(stats, first_row, rows_left, BLOCK_Q, False)
        first_key = (batch * sizes.heads + head) * sizes.k_len + k_first
        slope = slope_of(scoring, b, head)
        origin = dropout_origin(dropout, sizes, b, head)
        # Tensor instructions add up products in the same way as in the forward, so that these scores need no clamp.
        CLAMPED: tl.constexpr = not SCALE_ONLY or q.dtype == tl.float32
        dq = tl.zeros([BLOCK_Q, COLUMNS], tl.float32)
        last = tl.minimum(q_start + BLOCK_Q, q_len) - 1
        begin, whole, edge, end = seen_range(q_start + shift, last + shift, k_len, scoring.left, scoring.right, BLOCK_K)
        list_start, count = block_list(block_lists, b, head, block)
        for phase in tl.static_range(3):
            start, stop = phase_bounds(phase, begin, whole, edge, end, count, block_lists is not None, BLOCK_K)
            for step in range(start, stop, BLOCK_K):
                k_start = block_start(block_lists, list_start, step, BLOCK_K)
                keys_left = k_len - k_start
                # (BLOCK_K, COLUMNS)
                k = load_block(k_pointers, key, key_desc, batch, kv_head, k_first, k_start, keys_left, D, phase != 1)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
                j = (k_start + tl.arange(0, BLOCK_K))[None, :]  # (1, BLOCK_K)
                log2_p, softcap_grad, _ = recompute_log2_p(
                    s, row_max[:, None], log2_sum[:, None], mask, batch, head, (i + shift)[:, None], i[:, None], j,
                    q_len, k_len, slope, scoring, SCALE_ONLY, phase != 1, CLAMPED,
                )  # fmt: skip
                p = tl.exp2(log2_p)  # (BLOCK_Q, BLOCK_K)
                # (BLOCK_K, VALUE_COLUMNS)
                v = load_block(v_pointers, value, value_desc, batch, kv_head, k_first, k_start, keys_left, DV, phase != 1)
                dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
                if dropout.seed is not None:
                    keep = keep_mask(dropout, origin, i, k_start, BLOCK_Q, BLOCK_K, False)
                    dp *= keep * dropout.keep_scale
                grad_key_mass = load_key_grads(stats, first_key + k_start, keys_left, BLOCK_K, False)
                # (BLOCK_Q, BLOCK_K)
                ds = score_grads(dp, p, log2_p, delta_tile[:, None], j, stats, row_grads, grad_key_mass)
                if not SCALE_ONLY:
                    ds *= softcap_grad
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        dq_pointers = tile_pointers(grad_query, batch, head, q_first + q_start, BLOCK_Q, COLUMNS)
        store_tile(dq_pointers, dq * scoring.scale, rows_left, D)
