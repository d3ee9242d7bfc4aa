"""The passes over a mask: one lists the blocks that the mask leaves something of, and one computes the mask's gradient."""

import triton
import triton.language as tl

from .backward import load_statistics, recompute_p
from .device import dropout_stream, keep_mask, load_tile, mask_scores, slope_of, tile_pointers
from .jvp_backward import load_tangent_statistics, score_gradients
from .tangents import load_tangent, product_tangents, score_tangents, tangent_pointers


@triton.jit
def attention_block_lists(
    mask, blocks, counts, mask_heads, q_len, k_len, left, right,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BY_KEYS: tl.constexpr,
):  # fmt: skip
    """List the blocks of keys that mask and window leave something of, for one block of queries.

    BY_KEYS swaps the two sides: it lists blocks of queries for one block of keys.
    """
    q_blocks, k_blocks = tl.cdiv(q_len, BLOCK_Q), tl.cdiv(k_len, BLOCK_K)
    own, other = (k_blocks, q_blocks) if BY_KEYS else (q_blocks, k_blocks)
    block, batch_head = tl.program_id(0) % own, tl.program_id(0) // own
    batch, head = (batch_head // mask_heads).to(tl.int64), batch_head % mask_heads
    list_start = blocks + tl.program_id(0).to(tl.int64) * other
    count = 0
    for n in range(other):
        q_block, k_block = (n, block) if BY_KEYS else (block, n)
        i = (q_block * BLOCK_Q + tl.arange(0, BLOCK_Q))[:, None]
        j = (k_block * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        zeros = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        s = mask_scores(zeros, mask, batch, head, i + k_len - q_len, i, j, q_len, k_len, left, right)
        tl.store(list_start + count, n)  # The next block overwrites n if this one holds nothing.
        something = tl.where(s == float("-inf"), 0, 1)  # NaN is something.
        count += tl.max(tl.max(something, 1), 0)
    tl.store(counts + tl.program_id(0), count)


@triton.jit
def attention_grad_mask(
    query, key, value, tangents, grad_out, statistics, delta, lse_tangent, tangent_delta,
    mask, grad_mask, mask_batch, mask_heads, sizes, scoring, dropout,
    PER_QUERY: tl.constexpr, PER_KEY: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a tile of grad_mask: the sum, in one order, of the gradients of all scores that the mask's tile was added to.

    Without tangents the gradients are those of the forward, and with them those of the forward with tangents (jvp_backward.py).
    grad_mask is contiguous, (mask_batch, mask_heads, queries if PER_QUERY else 1, keys if PER_KEY else 1).
    """
    q_len, k_len = sizes.q_len, sizes.k_len
    q_blocks, k_blocks = tl.cdiv(q_len, BLOCK_Q), tl.cdiv(k_len, BLOCK_K)
    own_q_blocks, own_k_blocks = q_blocks if PER_QUERY else 1, k_blocks if PER_KEY else 1
    k_block, rest = tl.program_id(0) % own_k_blocks, tl.program_id(0) // own_k_blocks
    q_block, batch_head = rest % own_q_blocks, rest // own_q_blocks
    own_b, own_head = batch_head // mask_heads, batch_head % mask_heads
    heads_sharing = sizes.heads // mask_heads
    q_sharing, k_sharing = 1 if PER_QUERY else q_blocks, 1 if PER_KEY else k_blocks
    acc = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for n in range((sizes.batch // mask_batch) * heads_sharing * q_sharing * k_sharing):
        q_start = (q_block + n // k_sharing % q_sharing) * BLOCK_Q
        k_start = (k_block + n % k_sharing) * BLOCK_K
        head_n = n // (k_sharing * q_sharing)
        b, head = own_b + head_n // heads_sharing, own_head + head_n % heads_sharing
        batch, kv_head, q_left, k_left = b.to(tl.int64), head // sizes.group, q_len - q_start, k_len - k_start
        q = load_tile(tile_pointers(query, batch, head, q_start, BLOCK_Q, COLUMNS), q_left, D, True)  # (BLOCK_Q, COLUMNS)
        k = load_tile(tile_pointers(key, batch, kv_head, k_start, BLOCK_K, COLUMNS), k_left, D, True)  # (BLOCK_K, COLUMNS)
        first_row = (batch * sizes.heads + head) * q_len + q_start
        row_max, log2_sum, delta_tile = load_statistics(statistics, delta, first_row, q_left, BLOCK_Q, True)
        i, j = q_start + tl.arange(0, BLOCK_Q), (k_start + tl.arange(0, BLOCK_K))[None, :]  # (BLOCK_Q,), (1, BLOCK_K)
        p, softcap_grad, _ = recompute_p(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), row_max[:, None], log2_sum[:, None], mask, batch, head,
            (i + k_len - q_len)[:, None], i[:, None], j, q_len, k_len, slope_of(scoring, b, head), scoring, False, True, True,
        )  # fmt: skip
        g_pointers = tile_pointers(grad_out, batch, head, q_start, BLOCK_Q, VALUE_COLUMNS)
        g = load_tile(g_pointers, q_left, DV, True)  # (BLOCK_Q, VALUE_COLUMNS)
        v_pointers = tile_pointers(value, batch, kv_head, k_start, BLOCK_K, VALUE_COLUMNS)
        v = load_tile(v_pointers, k_left, DV, True)  # (BLOCK_K, VALUE_COLUMNS)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
        seed, stream = dropout_stream(dropout, b, head, sizes.heads)
        keep = 1.0
        if dropout.seed is not None:
            keep = keep_mask(dropout, seed, stream, i, k_start, BLOCK_Q, BLOCK_K, False) * dropout.keep_scale
            dp *= keep
        if tangents is None:
            acc += p * (dp - delta_tile[:, None])
        else:
            q_tangent = load_tangent(
                tangent_pointers(tangents.query, batch, head, q_start, BLOCK_Q, COLUMNS), tangents.query, 0, q_left, D, True
            )  # (BLOCK_Q, COLUMNS)
            k_tangent = load_tangent(
                tangent_pointers(tangents.key, batch, kv_head, k_start, BLOCK_K, COLUMNS), tangents.key, 0, k_left, D, True
            )  # (BLOCK_K, COLUMNS)
            products = product_tangents(
                q, k, q_tangent, k_tangent, tangents.query is not None, tangents.key is not None, PRECISION
            )  # (BLOCK_Q, BLOCK_K)
            ds = score_tangents(
                products, p, softcap_grad, tangents.mask, batch, head, i[:, None], j, q_len, k_len, scoring, False, True
            )  # (BLOCK_Q, BLOCK_K)
            by_tangent = 0.0
            if tangents.value is not None:
                v_tangent = load_tangent(
                    tangent_pointers(tangents.value, batch, kv_head, k_start, BLOCK_K, VALUE_COLUMNS),
                    tangents.value, 0, k_left, DV, True,
                )  # fmt: skip
                by_tangent = tl.dot(g, tl.trans(v_tangent), input_precision=PRECISION) * keep  # (BLOCK_Q, BLOCK_K)
            lse_tangent_tile, tangent_delta_tile = load_tangent_statistics(
                lse_tangent, tangent_delta, row_max, first_row, q_left, BLOCK_Q, True
            )  # (BLOCK_Q,) each
            _, grad, _ = score_gradients(
                p, ds, dp, by_tangent, delta_tile[:, None], lse_tangent_tile[:, None], tangent_delta_tile[:, None]
            )  # (BLOCK_Q, BLOCK_K)
            acc += grad
    rows, columns = q_len if PER_QUERY else 1, k_len if PER_KEY else 1
    i, j = q_block * BLOCK_Q + tl.arange(0, BLOCK_Q), k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    own = grad_mask + batch_head.to(tl.int64) * rows * columns
    if PER_QUERY and PER_KEY:
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        tl.store(own + i.to(tl.int64)[:, None] * columns + j[None, :], acc.to(grad_mask.dtype.element_ty), mask=inside)
    elif PER_QUERY:
        tl.store(own + i, tl.sum(acc, 1).to(grad_mask.dtype.element_ty), mask=i < rows)
    elif PER_KEY:
        tl.store(own + j, tl.sum(acc, 0).to(grad_mask.dtype.element_ty), mask=j < columns)
    else:
        tl.store(own, tl.sum(tl.sum(acc, 1), 0).to(grad_mask.dtype.element_ty))
