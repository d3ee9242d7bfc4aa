"""The passes for the mass of the keys, without atomics: one sums the weights that a key receives, one averages its gradient.

    key_mass_j = sum_i p_ij;  mass_mean_i = sum_j p_ij grad_key_mass_j

Both compute the weights p again from the forward's statistics, as the backward does.
"""

import triton
import triton.language as tl

from .backward import load_statistics, recompute_p
from .device import block_list, block_start, first_position, locate, phase_bounds, seen_range, slope_of
from .rows import load_tile, row_stride, tile_pointers


@triton.jit
def attention_key_mass(
    query, key, statistics, key_mass, mask, block_lists, sizes, scoring, heads_per_group,
    D: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write key_mass, float32 (batch, heads, keys), of a block of keys and one head of queries.

    The program walks over the queries that see the block. It adds up the sums of the blocks of queries, so that a sum of many
    weights is rounded by little.
    """
    b, head, block, batch, q_first, q_len, k_first, k_len = locate(
        tl.program_id(0), sizes.heads, sizes.k_len, sizes, sizes.cu_k, heads_per_group, BLOCK_K
    )
    k_start = block * BLOCK_K
    if k_start < k_len:
        kv_head, keys_left = head // sizes.group, k_len - k_start
        k_pointers = tile_pointers(key, batch, kv_head, k_first + k_start, BLOCK_K, COLUMNS)
        k = load_tile(k_pointers, keys_left, D, True)  # (BLOCK_K, COLUMNS)
        q_pointers = tile_pointers(query, batch, head, q_first, BLOCK_Q, COLUMNS)
        shift = first_position(sizes.places, b, q_len, k_len)  # Query i has the position of key i + shift.
        j = k_start + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        # The queries from j - shift - right to j - shift + left see key j.
        last = tl.minimum(k_start + BLOCK_K, k_len) - 1
        begin, whole, edge, end = seen_range(k_start - shift, last - shift, q_len, scoring.right, scoring.left, BLOCK_Q)
        first_row = (batch * sizes.heads + head) * sizes.q_len + q_first
        slope = slope_of(scoring, b, head)
        CLAMPED: tl.constexpr = not SCALE_ONLY or k.dtype == tl.float32  # As in attention_grad_key_value.
        mass = tl.zeros([BLOCK_K], tl.float32)
        list_start, count = block_list(block_lists, b, head, block)
        for phase in tl.static_range(3):
            start, stop = phase_bounds(phase, begin, whole, edge, end, count, block_lists is not None, BLOCK_Q)
            for step in range(start, stop, BLOCK_Q):
                q_start = block_start(block_lists, list_start, step, BLOCK_Q)
                rows_left, offset = q_len - q_start, tl.cast(q_start, tl.int64) * row_stride(query)
                q = load_tile(q_pointers + offset, rows_left, D, phase != 1)  # (BLOCK_Q, COLUMNS)
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_K, BLOCK_Q)
                row_max, log2_sum, no_delta = load_statistics(
                    statistics, None, first_row + q_start, rows_left, BLOCK_Q, phase != 1
                )  # (BLOCK_Q,) each
                i = (q_start + tl.arange(0, BLOCK_Q))[None, :]  # (1, BLOCK_Q)
                p, _, _ = recompute_p(
                    s, row_max[None, :], log2_sum[None, :], mask, batch, head, i + shift, i, j[:, None], q_len, k_len,
                    slope, scoring, SCALE_ONLY, phase != 1, CLAMPED,
                )  # fmt: skip
                mass += tl.sum(p, 1)
        first_key = (batch * sizes.heads + head) * sizes.k_len + k_first
        tl.store(key_mass + first_key + j, mass, mask=j < k_len)


@triton.jit
def attention_mass_mean(
    query, key, statistics, grad_key_mass, mass_mean, mask, block_lists, sizes, scoring, heads_per_group,
    D: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write mass_mean, float32 (batch, heads, rows), of a block of queries of one head: grad_key_mass weighted with p.

    grad_key_mass is float32 (batch, heads, keys). As in the forward, the program walks over the keys that its queries see.
    """
    b, head, block, batch, q_first, q_len, k_first, k_len = locate(
        tl.program_id(0), sizes.heads, sizes.q_len, sizes, sizes.cu_q, heads_per_group, BLOCK_Q
    )
    q_start = block * BLOCK_Q
    if q_start < q_len:
        kv_head, rows_left = head // sizes.group, q_len - q_start
        q_pointers = tile_pointers(query, batch, head, q_first + q_start, BLOCK_Q, COLUMNS)
        q = load_tile(q_pointers, rows_left, D, True)  # (BLOCK_Q, COLUMNS)
        k_pointers = tile_pointers(key, batch, kv_head, k_first, BLOCK_K, COLUMNS)
        shift = first_position(sizes.places, b, q_len, k_len)  # Query i has the position of key i + shift.
        i = q_start + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
        first_row = (batch * sizes.heads + head) * sizes.q_len + q_first
        # (BLOCK_Q,) each
        row_max, log2_sum, no_delta = load_statistics(statistics, None, first_row + q_start, rows_left, BLOCK_Q, True)
        first_key = (batch * sizes.heads + head) * sizes.k_len + k_first
        slope = slope_of(scoring, b, head)
        CLAMPED: tl.constexpr = not SCALE_ONLY or q.dtype == tl.float32  # As in attention_grad_query.
        mean = tl.zeros([BLOCK_Q], tl.float32)
        last = tl.minimum(q_start + BLOCK_Q, q_len) - 1
        begin, whole, edge, end = seen_range(q_start + shift, last + shift, k_len, scoring.left, scoring.right, BLOCK_K)
        list_start, count = block_list(block_lists, b, head, block)
        for phase in tl.static_range(3):
            start, stop = phase_bounds(phase, begin, whole, edge, end, count, block_lists is not None, BLOCK_K)
            for step in range(start, stop, BLOCK_K):
                k_start = block_start(block_lists, list_start, step, BLOCK_K)
                keys_left, offset = k_len - k_start, tl.cast(k_start, tl.int64) * row_stride(key)
                k = load_tile(k_pointers + offset, keys_left, D, phase != 1)  # (BLOCK_K, COLUMNS)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
                j = k_start + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
                p, _, _ = recompute_p(
                    s, row_max[:, None], log2_sum[:, None], mask, batch, head, (i + shift)[:, None], i[:, None], j[None, :],
                    q_len, k_len, slope, scoring, SCALE_ONLY, phase != 1, CLAMPED,
                )  # fmt: skip
                c = tl.load(grad_key_mass + first_key + j, mask=j < k_len, other=0.0)  # (BLOCK_K,)
                mean += tl.sum(p * c[None, :], 1)
        tl.store(mass_mean + first_row + i, mean, mask=i < q_len)
