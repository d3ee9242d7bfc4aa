"""The backward of the forward with tangents (jvp.py), and so the backward of the backward, without atomics.

With u = grad_out, these are the gradients of sum_i u_i out_tangent_i + grad_lse_i lse_tangent_i for the inputs. Those for the
tangents are what the plain backward gives for grad_out and grad_lse. With ds the tangent of a score,

    delta = sum_d out u - grad_lse;  tangent_delta = sum_d out_tangent u;  a = u v^T;  b = u v_tangent^T
    f = p (a - delta)                                        the gradient of ds
    g = (ds - lse_tangent) f + p (b - tangent_delta)         the gradient of a score, and of the mask
    grad_value = (p (ds - lse_tangent))^T u
    grad_query = scale (x k + y k_tangent);  grad_key = scale (x^T q + y^T q_tangent)

where x and y are the gradients of a product and of its tangent. Without a softcap they are g and f; `product_gradients` has the
other case. The passes are those of the backward: one walks over the blocks of keys, one over the blocks of queries, and, where
the mask wants a gradient, one over the mask (mask.py). `attention_delta` computes both deltas.
"""

import triton
import triton.language as tl

from .backward import load_statistics, recompute_p
from .device import (
    block_list,
    block_start,
    dropout_origin,
    first_position,
    keep_mask,
    locate,
    phase_bounds,
    seen_range,
    slope_of,
)
from .rows import load_tile, row_stride, store_tile, tile_pointers
from .tangents import load_tangent, product_tangents, score_tangents, tangent_pointers


@triton.jit
def load_tangent_statistics(
    lse_tangent, tangent_delta, row_max, first_row, rows_left, ROWS: tl.constexpr, CHECKED: tl.constexpr
):  # fmt: skip
    """Return (lse_tangent, tangent_delta) of ROWS rows from `first_row` on, each (ROWS,).

    Both are 0 where the maximum is inf: past the last row, and for a row that saw no key, whose sink can make them NaN.
    """
    r = first_row + tl.arange(0, ROWS)
    if CHECKED:
        inside = (tl.arange(0, ROWS) < rows_left) & (row_max != float("inf"))
        return tl.load(lse_tangent + r, mask=inside, other=0.0), tl.load(tangent_delta + r, mask=inside, other=0.0)
    else:
        return tl.load(lse_tangent + r), tl.load(tangent_delta + r)


@triton.jit
def score_gradients(p, ds, a, b, delta, lse_tangent, tangent_delta):
    """Return (w, g, f) of a tile: the weights of grad_value, the gradient of the scores, and that of their tangents."""
    f = p * (a - delta)
    centred = ds - lse_tangent
    return p * centred, tl.fma(centred, f, p * (b - tangent_delta)), f


@triton.jit
def product_gradients(g, f, products, softcap_grad, softcap_bend, scoring):
    """Return (x, y), the gradients of a tile's products and of their tangents, from those of the scores and of theirs.

    Both lack the scale. `products` are the tangents of the products.
    """
    if scoring.softcap is None:
        return g, f
    else:
        x = softcap_grad * tl.fma(softcap_bend * (products * scoring.scale), f, g)
        # Where the softcap is flat, its other derivatives are zeros too, though a factor of theirs may be infinite.
        return tl.where(softcap_grad == 0.0, 0.0, x), softcap_grad * f


@triton.jit
def load_keys(key, value, tangents, batch, head, first, rows_left, D, DV, ROWS, COLUMNS, VALUE_COLUMNS):
    """Return tiles of keys, of their tangents (ROWS, COLUMNS), of values and of their tangents (ROWS, VALUE_COLUMNS)."""
    k = load_tile(tile_pointers(key, batch, head, first, ROWS, COLUMNS), rows_left, D, True)
    k_tangent_pointers = tangent_pointers(tangents.key, batch, head, first, ROWS, COLUMNS)
    k_tangent = load_tangent(k_tangent_pointers, tangents.key, 0, rows_left, D, True)
    v = load_tile(tile_pointers(value, batch, head, first, ROWS, VALUE_COLUMNS), rows_left, DV, True)
    v_tangent_pointers = tangent_pointers(tangents.value, batch, head, first, ROWS, VALUE_COLUMNS)
    v_tangent = load_tangent(v_tangent_pointers, tangents.value, 0, rows_left, DV, True)
    return k, k_tangent, v, v_tangent


@triton.jit
def attention_jvp_grad_key_value(
    query, key, value, tangents, grad_out, statistics, delta, lse_tangent, tangent_delta, grad_key, grad_value,
    mask, block_lists, sizes, scoring, dropout, heads_per_group,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_ONLY: tl.constexpr, PRECISION: tl.constexpr,
    RELOAD: tl.constexpr,
):  # fmt: skip
    """Write grad_key and grad_value of a block of keys of one head, from tiles (BLOCK_K, BLOCK_Q) as the backward does.

    RELOAD: the tiles of keys and values are loaded in the loop, because a GPU has no room for them beside the others.
    """
    kv_heads = sizes.heads // sizes.group
    b, kv_head, block, batch, q_first, q_len, k_first, k_len = locate(
        tl.program_id(0), kv_heads, sizes.k_len, sizes, sizes.cu_k, heads_per_group, BLOCK_K
    )
    k_start = block * BLOCK_K
    if k_start < k_len:
        first_key, keys_left = k_first + k_start, k_len - k_start
        if not RELOAD:
            k, k_tangent, v, v_tangent = load_keys(
                key, value, tangents, batch, kv_head, first_key, keys_left, D, DV, BLOCK_K, COLUMNS, VALUE_COLUMNS
            )
        shift = first_position(sizes.places, b, q_len, k_len)  # Query i has the position of key i + shift.
        j = (k_start + tl.arange(0, BLOCK_K))[:, None]  # (BLOCK_K, 1)
        # The queries from j - shift - right to j - shift + left see key j.
        last = tl.minimum(k_start + BLOCK_K, k_len) - 1
        begin, whole, edge, end = seen_range(k_start - shift, last - shift, q_len, scoring.right, scoring.left, BLOCK_Q)
        CLAMPED: tl.constexpr = not SCALE_ONLY or key.data.dtype.element_ty == tl.float32  # As in the backward.
        acc_key = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
        acc_value = tl.zeros([BLOCK_K, VALUE_COLUMNS], tl.float32)
        for member in range(sizes.group):
            head = kv_head * sizes.group + member
            q_pointers = tile_pointers(query, batch, head, q_first, BLOCK_Q, COLUMNS)
            q_tangent_pointers = tangent_pointers(tangents.query, batch, head, q_first, BLOCK_Q, COLUMNS)
            u_pointers = tile_pointers(grad_out, batch, head, q_first, BLOCK_Q, VALUE_COLUMNS)
            first_row = (batch * sizes.heads + head) * sizes.q_len + q_first
            slope = slope_of(scoring, b, head)
            origin = dropout_origin(dropout, sizes, b, head)
            list_start, count = block_list(block_lists, b, head, block)
            for phase in tl.static_range(3):
                start, stop = phase_bounds(phase, begin, whole, edge, end, count, block_lists is not None, BLOCK_Q)
                for step in range(start, stop, BLOCK_Q):
                    q_start = block_start(block_lists, list_start, step, BLOCK_Q)
                    rows_left, offset = q_len - q_start, tl.cast(q_start, tl.int64)
                    q = load_tile(q_pointers + offset * row_stride(query), rows_left, D, phase != 1)  # (BLOCK_Q, COLUMNS)
                    # (BLOCK_Q, COLUMNS)
                    q_tangent = load_tangent(q_tangent_pointers, tangents.query, q_start, rows_left, D, phase != 1)
                    if RELOAD:
                        tl.debug_barrier()  # Without it the compiler would move these loads out of the loop.
                        k, k_tangent, v, v_tangent = load_keys(
                            key, value, tangents, batch, kv_head, first_key, keys_left, D, DV, BLOCK_K, COLUMNS, VALUE_COLUMNS
                        )
                    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_K, BLOCK_Q)
                    products = product_tangents(
                        k, q, k_tangent, q_tangent, tangents.key is not None, tangents.query is not None, PRECISION
                    )  # (BLOCK_K, BLOCK_Q)
                    row_max, log2_sum, delta_tile = load_statistics(
                        statistics, delta, first_row + q_start, rows_left, BLOCK_Q, phase != 1
                    )  # (BLOCK_Q,) each
                    lse_tangent_tile, tangent_delta_tile = load_tangent_statistics(
                        lse_tangent, tangent_delta, row_max, first_row + q_start, rows_left, BLOCK_Q, phase != 1
                    )  # (BLOCK_Q,) each
                    i = q_start + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
                    p, softcap_grad, softcap_bend = recompute_p(
                        s, row_max[None, :], log2_sum[None, :], mask, batch, head, (i + shift)[None, :], i[None, :], j,
                        q_len, k_len, slope, scoring, SCALE_ONLY, phase != 1, CLAMPED,
                    )  # fmt: skip
                    ds = score_tangents(
                        products, p, softcap_grad, tangents.mask, batch, head, i[None, :], j, q_len, k_len, scoring,
                        SCALE_ONLY, phase != 1,
                    )  # fmt: skip
                    # (BLOCK_Q, VALUE_COLUMNS)
                    u = load_tile(u_pointers + offset * row_stride(grad_out), rows_left, DV, phase != 1)
                    by_value = tl.dot(v, tl.trans(u), input_precision=PRECISION)  # (BLOCK_K, BLOCK_Q)
                    by_tangent = 0.0
                    if tangents.value is not None:
                        by_tangent = tl.dot(v_tangent, tl.trans(u), input_precision=PRECISION)  # (BLOCK_K, BLOCK_Q)
                    if dropout.seed is not None:
                        keep = keep_mask(dropout, origin, i, k_start, BLOCK_Q, BLOCK_K, True)
                        by_value *= keep * dropout.keep_scale
                        by_tangent *= keep * dropout.keep_scale
                    w, g, f = score_gradients(
                        p, ds, by_value, by_tangent, delta_tile[None, :], lse_tangent_tile[None, :], tangent_delta_tile[None, :]
                    )  # (BLOCK_K, BLOCK_Q) each
                    if dropout.seed is not None:
                        w *= keep
                    acc_value = tl.dot(w.to(u.dtype), u, acc_value, input_precision=PRECISION)
                    x, y = product_gradients(g, f, products, softcap_grad, softcap_bend, scoring)
                    acc_key = tl.dot(x.to(q.dtype), q, acc_key, input_precision=PRECISION)
                    if tangents.query is not None:
                        acc_key = tl.dot(y.to(q.dtype), q_tangent, acc_key, input_precision=PRECISION)
        if dropout.seed is not None:
            acc_value *= dropout.keep_scale
        grad_key_pointers = tile_pointers(grad_key, batch, kv_head, first_key, BLOCK_K, COLUMNS)
        grad_value_pointers = tile_pointers(grad_value, batch, kv_head, first_key, BLOCK_K, VALUE_COLUMNS)
        store_tile(grad_key_pointers, acc_key * scoring.scale, keys_left, D)
        store_tile(grad_value_pointers, acc_value, keys_left, DV)


@triton.jit
def attention_jvp_grad_query(
    query, key, value, tangents, grad_out, statistics, delta, lse_tangent, tangent_delta, grad_query,
    mask, block_lists, sizes, scoring, dropout, heads_per_group,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write grad_query of a block of queries of one head. The program walks over the keys that they see."""
    b, head, block, batch, q_first, q_len, k_first, k_len = locate(
        tl.program_id(0), sizes.heads, sizes.q_len, sizes, sizes.cu_q, heads_per_group, BLOCK_Q
    )
    q_start = block * BLOCK_Q
    if q_start < q_len:
        kv_head, first_query, rows_left = head // sizes.group, q_first + q_start, q_len - q_start
        q = load_tile(tile_pointers(query, batch, head, first_query, BLOCK_Q, COLUMNS), rows_left, D, True)
        q_tangent_pointers = tangent_pointers(tangents.query, batch, head, first_query, BLOCK_Q, COLUMNS)
        q_tangent = load_tangent(q_tangent_pointers, tangents.query, 0, rows_left, D, True)  # (BLOCK_Q, COLUMNS), like q
        # (BLOCK_Q, VALUE_COLUMNS)
        u = load_tile(tile_pointers(grad_out, batch, head, first_query, BLOCK_Q, VALUE_COLUMNS), rows_left, DV, True)
        k_pointers = tile_pointers(key, batch, kv_head, k_first, BLOCK_K, COLUMNS)
        k_tangent_pointers = tangent_pointers(tangents.key, batch, kv_head, k_first, BLOCK_K, COLUMNS)
        v_pointers = tile_pointers(value, batch, kv_head, k_first, BLOCK_K, VALUE_COLUMNS)
        v_tangent_pointers = tangent_pointers(tangents.value, batch, kv_head, k_first, BLOCK_K, VALUE_COLUMNS)
        shift = first_position(sizes.places, b, q_len, k_len)  # Query i has the position of key i + shift.
        i = q_start + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
        first_row = (batch * sizes.heads + head) * sizes.q_len + first_query
        row_max, log2_sum, delta_tile = load_statistics(statistics, delta, first_row, rows_left, BLOCK_Q, True)
        lse_tangent_tile, tangent_delta_tile = load_tangent_statistics(
            lse_tangent, tangent_delta, row_max, first_row, rows_left, BLOCK_Q, True
        )  # (BLOCK_Q,) each
        slope = slope_of(scoring, b, head)
        origin = dropout_origin(dropout, sizes, b, head)
        CLAMPED: tl.constexpr = not SCALE_ONLY or q.dtype == tl.float32  # As in the backward.
        acc = tl.zeros([BLOCK_Q, COLUMNS], tl.float32)
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
                p, softcap_grad, softcap_bend = recompute_p(
                    s, row_max[:, None], log2_sum[:, None], mask, batch, head, (i + shift)[:, None], i[:, None], j,
                    q_len, k_len, slope, scoring, SCALE_ONLY, phase != 1, CLAMPED,
                )  # fmt: skip
                ds = score_tangents(
                    products, p, softcap_grad, tangents.mask, batch, head, i[:, None], j, q_len, k_len, scoring,
                    SCALE_ONLY, phase != 1,
                )  # fmt: skip
                v = load_tile(v_pointers + offset * row_stride(value), keys_left, DV, phase != 1)  # (BLOCK_K, VALUE_COLUMNS)
                by_value = tl.dot(u, tl.trans(v), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
                by_tangent = 0.0
                if tangents.value is not None:
                    v_tangent = load_tangent(v_tangent_pointers, tangents.value, k_start, keys_left, DV, phase != 1)
                    by_tangent = tl.dot(u, tl.trans(v_tangent), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
                if dropout.seed is not None:
                    keep = keep_mask(dropout, origin, i, k_start, BLOCK_Q, BLOCK_K, False) * dropout.keep_scale
                    by_value *= keep
                    by_tangent *= keep
                _, g, f = score_gradients(
                    p, ds, by_value, by_tangent, delta_tile[:, None], lse_tangent_tile[:, None], tangent_delta_tile[:, None]
                )  # (BLOCK_Q, BLOCK_K) each
                x, y = product_gradients(g, f, products, softcap_grad, softcap_bend, scoring)
                acc = tl.dot(x.to(k.dtype), k, acc, input_precision=PRECISION)
                if tangents.key is not None:
                    acc = tl.dot(y.to(k.dtype), k_tangent, acc, input_precision=PRECISION)
        grad_query_pointers = tile_pointers(grad_query, batch, head, first_query, BLOCK_Q, COLUMNS)
        store_tile(grad_query_pointers, acc * scoring.scale, rows_left, D)
