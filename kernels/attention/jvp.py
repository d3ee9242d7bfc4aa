"""The forward of attention with its tangents: forward mode in one pass over the keys.

With ds the tangent of a score, which `score_tangents` computes from those of query, key and mask,

    lse_tangent = sum_j p ds;  out_tangent = sum_j p (ds v + v_tangent) - lse_tangent out

where the sink takes part in the first sum. The sums over keys go along with the online softmax, as out does: six products for a
tile of scores, where the forward has two. A product in half precision gets p (ds - mean), with the mean of ds over the keys so
far: p ds alone would lose digits where ds is large, or overflow. When the mean changes, the sum of p (ds - mean) v changes by
the difference times the sum of p v.
"""

import triton
import triton.language as tl

from .device import (
    block_list,
    block_start,
    dropout_origin,
    finish_softmax,
    first_position,
    keep_mask,
    locate,
    mask_scores,
    natural_scores,
    online_softmax,
    phase_bounds,
    seen_range,
    slope_of,
)
from .rows import load_tile, row_stride, store_tile, tile_pointers
from .tangents import load_tangent, product_tangents, score_tangents, tangent_pointers


@triton.jit
def attention_jvp(
    query, key, value, tangents, out, lse, statistics, out_tangent, lse_tangent,
    mask, block_lists, sizes, scoring, dropout, heads_per_group,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out, lse and statistics of a block of queries of one head, as the forward does, and the tangents of out and lse.

    tangents: Tangents.
    out_tangent: Rows, like out.
    lse_tangent: float32 (batch, heads, rows).
    """
    b, head, block, batch, q_first, q_len, k_first, k_len = locate(
        tl.program_id(0), sizes.heads, sizes.q_len, sizes, sizes.cu_q, heads_per_group, BLOCK_Q
    )
    q_start = block * BLOCK_Q
    if q_start < q_len:
        kv_head, rows_left = head // sizes.group, q_len - q_start
        q = load_tile(tile_pointers(query, batch, head, q_first + q_start, BLOCK_Q, COLUMNS), rows_left, D, True)
        q_tangent_pointers = tangent_pointers(tangents.query, batch, head, q_first + q_start, BLOCK_Q, COLUMNS)
        q_tangent = load_tangent(q_tangent_pointers, tangents.query, 0, rows_left, D, True)  # (BLOCK_Q, COLUMNS), like q
        k_pointers = tile_pointers(key, batch, kv_head, k_first, BLOCK_K, COLUMNS)
        k_tangent_pointers = tangent_pointers(tangents.key, batch, kv_head, k_first, BLOCK_K, COLUMNS)
        v_pointers = tile_pointers(value, batch, kv_head, k_first, BLOCK_K, VALUE_COLUMNS)
        v_tangent_pointers = tangent_pointers(tangents.value, batch, kv_head, k_first, BLOCK_K, VALUE_COLUMNS)
        shift = first_position(sizes.places, b, q_len, k_len)  # Query i has the position of key i + shift.
        i = q_start + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
        slope = slope_of(scoring, b, head)
        origin = dropout_origin(dropout, sizes, b, head)
        row_max, row_sum = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
        mean = tl.zeros([BLOCK_Q], tl.float32)  # Of ds, weighted with p.
        acc, acc_tangent = (tl.zeros([BLOCK_Q, VALUE_COLUMNS], tl.float32),) * 2
        last = tl.minimum(q_start + BLOCK_Q, q_len) - 1
        begin, whole, edge, end = seen_range(q_start + shift, last + shift, k_len, scoring.left, scoring.right, BLOCK_K)
        list_start, count = block_list(block_lists, b, head, block)
        for phase in tl.static_range(3):
            start, stop = phase_bounds(phase, begin, whole, edge, end, count, block_lists is not None, BLOCK_K)
            for step in range(start, stop, BLOCK_K):
                k_start = block_start(block_lists, list_start, step, BLOCK_K)
                keys_left, offset = k_len - k_start, tl.cast(k_start, tl.int64)
                k = load_tile(k_pointers + offset * row_stride(key), keys_left, D, phase != 1)  # (BLOCK_K, COLUMNS)
                # (BLOCK_K, COLUMNS)
                k_tangent = load_tangent(k_tangent_pointers, tangents.key, k_start, keys_left, D, phase != 1)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
                products = product_tangents(
                    q, k, q_tangent, k_tangent, tangents.query is not None, tangents.key is not None, PRECISION
                )  # (BLOCK_Q, BLOCK_K)
                j = (k_start + tl.arange(0, BLOCK_K))[None, :]  # (1, BLOCK_K)
                softcap_grad = 1.0
                if not SCALE_ONLY:
                    s, softcap_grad, _ = natural_scores(s, (i + shift)[:, None], j, slope, scoring)
                if phase != 1:
                    s = mask_scores(
                        s, mask, batch, head, (i + shift)[:, None], i[:, None], j, q_len, k_len, scoring.left, scoring.right
                    )
                p, row_max, row_sum, rescale = online_softmax(s, scoring, row_max, row_sum, phase != 1, False)
                ds = score_tangents(
                    products, p, softcap_grad, tangents.mask, batch, head, i[:, None], j, q_len, k_len, scoring,
                    SCALE_ONLY, phase != 1,
                )  # fmt: skip
                total = row_sum if phase == 1 else tl.where(row_sum == 0.0, 1.0, row_sum)  # A row may have seen no key yet.
                shift_of_mean = tl.sum(p * (ds - mean[:, None]), 1) / total  # (BLOCK_Q,)
                mean += shift_of_mean
                p_ds = p * (ds - mean[:, None])  # (BLOCK_Q, BLOCK_K)
                if dropout.seed is not None:
                    keep = keep_mask(dropout, origin, i, k_start, BLOCK_Q, BLOCK_K, False)
                    p, p_ds = p * keep, p_ds * keep
                v = load_tile(v_pointers + offset * row_stride(value), keys_left, DV, phase != 1)  # (BLOCK_K, VALUE_COLUMNS)
                acc *= rescale[:, None]
                acc_tangent = acc_tangent * rescale[:, None] - acc * shift_of_mean[:, None]
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
                acc_tangent = tl.dot(p_ds.to(v.dtype), v, acc_tangent, input_precision=PRECISION)
                if tangents.value is not None:
                    v_tangent = load_tangent(v_tangent_pointers, tangents.value, k_start, keys_left, DV, phase != 1)
                    acc_tangent = tl.dot(p.to(v.dtype), v_tangent, acc_tangent, input_precision=PRECISION)
        # (BLOCK_Q,) each
        out_scale, lse_tile, log2_sum, sink_weight = finish_softmax(row_max, row_sum, 0.0, scoring, head, SCALE_ONLY)
        lse_tangent_tile = mean * (row_sum * out_scale)
        if tangents.sinks is not None:
            lse_tangent_tile += tl.where(sink_weight == 0.0, 0.0, sink_weight * tl.load(tangents.sinks + head))
        if dropout.seed is not None:
            out_scale *= dropout.keep_scale
        out_tile = acc * out_scale[:, None]  # (BLOCK_Q, VALUE_COLUMNS)
        out_tangent_tile = acc_tangent * out_scale[:, None] - (lse_tangent_tile - mean)[:, None] * out_tile
        out_pointers = tile_pointers(out, batch, head, q_first + q_start, BLOCK_Q, VALUE_COLUMNS)
        store_tile(out_pointers, out_tile, rows_left, DV)
        out_tangent_pointers = tile_pointers(out_tangent, batch, head, q_first + q_start, BLOCK_Q, VALUE_COLUMNS)
        store_tile(out_tangent_pointers, out_tangent_tile, rows_left, DV)
        row = (batch * sizes.heads + head) * sizes.q_len + q_first + i  # (BLOCK_Q,)
        tl.store(lse + row, lse_tile, mask=i < q_len)
        tl.store(lse_tangent + row, lse_tangent_tile, mask=i < q_len)
        tl.store(statistics + row * 2, row_max, mask=i < q_len)
        tl.store(statistics + row * 2 + 1, log2_sum, mask=i < q_len)
