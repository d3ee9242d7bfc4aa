"""The forward of attention: a program per head and block of queries walks over the keys that its queries see.

Five things make it fast. The scale is folded into the exponent, so that a score takes one fused multiply-add and one exp2.
Blocks of keys that no query sees are never visited. Only blocks on the edge of the visible range are masked. The tensor memory
accelerator copies the tiles of keys and values where there is one. Where the tile says so, warps are specialized, and
multiply-adds compute a part of the exponentials.
Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023).
"""

import triton
import triton.language as tl

from .device import (
    block_list,
    block_start,
    dropout_origin,
    finish_softmax,
    first_position,
    fused_residual,
    keep_mask,
    locate,
    mask_scores,
    natural_scores,
    online_softmax,
    phase_bounds,
    seen_range,
    slope_of,
)
from .rows import load_block, load_tile, store_tile, tile_pointers
from .stats import finish_row_stats, online_row_stats, store_row_stats


@triton.jit
def attention_forward(
    query, key, value, key_desc, value_desc, out, lse, statistics, row_stats,
    mask, block_lists, sizes, scoring, dropout, heads_per_group,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_ONLY: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Write out, lse and statistics of a block of queries of one head.

    query, key, value, out: Rows.
    lse: float32 (batch, heads, rows).
    statistics: float32 (batch, heads, rows, 2), from which the backward computes the weights again. They are the maximum, which
    is a product if SCALE_ONLY, and log2 of the sum of the weights.
    row_stats: RowStats to write besides, or None.
    SCALE_ONLY: scores are products times a positive scale.
    FUSED: besides, a weight is computed in one multiply-add.
    """
    b, head, block, batch, q_first, q_len, k_first, k_len = locate(
        tl.program_id(0), sizes.heads, sizes.q_len, sizes, sizes.cu_q, heads_per_group, BLOCK_Q
    )
    q_start = block * BLOCK_Q
    if q_start < q_len:
        kv_head = head // sizes.group
        q_pointers = tile_pointers(query, batch, head, q_first + q_start, BLOCK_Q, COLUMNS)
        k_pointers = tile_pointers(key, batch, kv_head, k_first, BLOCK_K, COLUMNS)
        v_pointers = tile_pointers(value, batch, kv_head, k_first, BLOCK_K, VALUE_COLUMNS)
        q = load_tile(q_pointers, q_len - q_start, D, True)  # (BLOCK_Q, COLUMNS)
        shift = first_position(sizes.places, b, q_len, k_len)  # Query i has the position of key i + shift.
        i = q_start + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
        slope = slope_of(scoring, b, head)
        origin = dropout_origin(dropout, sizes, b, head)
        row_max, row_sum = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
        if row_stats is not None:
            weighted, max_key = tl.zeros([BLOCK_Q], tl.float32), tl.full([BLOCK_Q], -1, tl.int32)
        acc = tl.zeros([BLOCK_Q, VALUE_COLUMNS], tl.float32)
        last = tl.minimum(q_start + BLOCK_Q, q_len) - 1
        begin, whole, edge, end = seen_range(q_start + shift, last + shift, k_len, scoring.left, scoring.right, BLOCK_K)
        list_start, count = block_list(block_lists, b, head, block)
        for phase in tl.static_range(3):
            start, stop = phase_bounds(phase, begin, whole, edge, end, count, block_lists is not None, BLOCK_K)
            for step in tl.range(start, stop, BLOCK_K, warp_specialize=SPECIALIZED):
                k_start = block_start(block_lists, list_start, step, BLOCK_K)
                keys_left = k_len - k_start
                # (BLOCK_K, COLUMNS)
                k = load_block(k_pointers, key, key_desc, batch, kv_head, k_first, k_start, keys_left, D, phase != 1)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
                j = (k_start + tl.arange(0, BLOCK_K))[None, :]  # (1, BLOCK_K)
                if not SCALE_ONLY:
                    s, _, _ = natural_scores(s, (i + shift)[:, None], j, slope, scoring)
                if phase != 1:
                    s = mask_scores(
                        s, mask, batch, head, (i + shift)[:, None], i[:, None], j, q_len, k_len, scoring.left, scoring.right
                    )
                old_max, old_sum = row_max, row_sum
                p, row_max, row_sum, rescale = online_softmax(s, scoring, row_max, row_sum, phase != 1, FUSED, SPECIALIZED)
                if row_stats is not None:
                    weighted, max_key = online_row_stats(
                        s, p, rescale, j, scoring, old_max, row_max, old_sum, weighted, max_key, phase != 1, FUSED
                    )
                if dropout.seed is not None:
                    p *= keep_mask(dropout, origin, i, k_start, BLOCK_Q, BLOCK_K, False)
                # (BLOCK_K, VALUE_COLUMNS)
                v = load_block(v_pointers, value, value_desc, batch, kv_head, k_first, k_start, keys_left, DV, phase != 1)
                acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        residual = fused_residual(row_max, scoring) if FUSED else 0.0
        # (BLOCK_Q,) each
        out_scale, lse_tile, log2_sum, sink_weight = finish_softmax(row_max, row_sum, residual, scoring, head, SCALE_ONLY)
        row = (batch * sizes.heads + head) * sizes.q_len + q_first + i  # (BLOCK_Q,)
        if row_stats is not None:
            entropy, max_logit = finish_row_stats(
                row_max, row_sum, weighted, out_scale, log2_sum, sink_weight, residual, scoring, SCALE_ONLY
            )
            store_row_stats(row_stats, row, i < q_len, entropy, max_logit, max_key)
        if dropout.seed is not None:
            out_scale *= dropout.keep_scale
        out_pointers = tile_pointers(out, batch, head, q_first + q_start, BLOCK_Q, VALUE_COLUMNS)
        store_tile(out_pointers, acc * out_scale[:, None], q_len - q_start, DV)
        tl.store(lse + row, lse_tile, mask=i < q_len)
        tl.store(statistics + row * 2, row_max, mask=i < q_len)
        tl.store(statistics + row * 2 + 1, log2_sum, mask=i < q_len)
