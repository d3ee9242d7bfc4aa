"""The forward of attention: a program per head and block of queries walks over the keys that its queries see.

What makes it fast: one fused multiply-add and one exp2 per score, as the scale is folded into the exponent; keys that nobody in
the block sees are never visited; only blocks on the edge of what is seen are masked; tiles of keys and values are copied by the
tensor memory accelerator where there is one, and warps are specialized where the settings say so.
Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023).
"""

import triton
import triton.language as tl

from .device import (
    dropout_stream,
    finish_softmax,
    fused_residual,
    kept,
    load_block,
    load_tile,
    loop_bounds,
    masked,
    online_softmax,
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
def attention_forward(
    query, key, value, key_tiles, value_tiles, out, lse, statistics, mask, visits, sizes, scoring, dropout, together,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PLAIN: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Write out, lse and statistics. query, key, value and out are Rows.

    PLAIN: scores are products times a positive scale; FUSED: and weights are computed from them in one multiply-add.

    lse: float32 (batch, heads, rows); statistics: float32 (batch, heads, rows, 2), what the backward takes weights against:
    the maximum, a product if PLAIN, and log2 of the weights' total.
    """
    b, head, block, batch, q_first, q_len, k_first, k_len = place(
        tl.program_id(0), sizes.heads, sizes.q_len, sizes, sizes.cu_q, together, BLOCK_Q
    )
    q_start = block * BLOCK_Q
    if q_start < q_len:
        kv_head = head // sizes.group
        q_pointers = tile_pointers(query, batch, head, q_first + q_start, BLOCK_Q, COLUMNS)
        k_pointers = tile_pointers(key, batch, kv_head, k_first, BLOCK_K, COLUMNS)
        v_pointers = tile_pointers(value, batch, kv_head, k_first, BLOCK_K, VALUE_COLUMNS)
        q = load_tile(q_pointers, q_len - q_start, D, True)
        shift = k_len - q_len  # query i has its place at key i + shift
        i = q_start + tl.arange(0, BLOCK_Q)
        slope = slope_of(scoring, b, head)
        seed, stream = dropout_stream(dropout, b, head, sizes.heads)
        maximum, total = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
        acc = tl.zeros([BLOCK_Q, VALUE_COLUMNS], tl.float32)
        last = tl.minimum(q_start + BLOCK_Q, q_len) - 1
        begin, whole, edge, end = seen_range(q_start + shift, last + shift, k_len, scoring.left, scoring.right, BLOCK_K)
        visit, count = visit_list(visits, b, head, block)
        for phase in tl.static_range(3):
            start, stop = loop_bounds(phase, begin, whole, edge, end, count, visits is not None, BLOCK_K)
            for step in tl.range(start, stop, BLOCK_K, warp_specialize=SPECIALIZED):
                k_start = visited(visits, visit, step, BLOCK_K)
                k = load_block(k_pointers, key, key_tiles, batch, kv_head, k_first, k_start, k_len - k_start, D, phase != 1)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
                j = (k_start + tl.arange(0, BLOCK_K))[None, :]
                if not PLAIN:
                    s, _ = scores(s, (i + shift)[:, None], j, slope, scoring)
                if phase != 1:
                    s = masked(
                        s, mask, batch, head, (i + shift)[:, None], i[:, None], j, q_len, k_len, scoring.left, scoring.right
                    )
                weights, maximum, total, rescale = online_softmax(s, scoring, maximum, total, phase != 1, FUSED)
                if dropout.seed is not None:
                    weights *= kept(dropout, seed, stream, i, k_start, BLOCK_Q, BLOCK_K, False)
                v = load_block(
                    v_pointers, value, value_tiles, batch, kv_head, k_first, k_start, k_len - k_start, DV, phase != 1
                )
                acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        residual = fused_residual(maximum, scoring) if FUSED else 0.0
        out_scale, its_lse, log2_total = finish_softmax(maximum, total, residual, scoring, head, PLAIN)
        if dropout.seed is not None:
            out_scale *= dropout.keep_scale
        store_tile(
            tile_pointers(out, batch, head, q_first + q_start, BLOCK_Q, VALUE_COLUMNS),
            acc * out_scale[:, None],
            q_len - q_start,
            DV,
        )
        at = (batch * sizes.heads + head) * sizes.q_len + q_first + i
        tl.store(lse + at, its_lse, mask=i < q_len)
        tl.store(statistics + at * 2, maximum, mask=i < q_len)
        tl.store(statistics + at * 2 + 1, log2_total, mask=i < q_len)
