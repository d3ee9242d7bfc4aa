"""The passes over a mask: one lists the blocks that the mask leaves something of, and one computes the mask's gradient."""

import triton
import triton.language as tl

from .backward import load_statistics, recompute_log2_p
from .device import dropout_origin, first_position, keep_mask, mask_scores, slope_of
from .jvp_backward import load_tangent_statistics, score_gradients
from .rows import tile_pointers
from .stats import load_key_grads, load_row_grads, score_grads
from .tangents import score_tangents


@triton.jit
def attention_block_lists(
    mask, blocks, counts, mask_heads, q_len, k_len, places, left, right,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BY_KEYS: tl.constexpr,
):  # fmt: skip
    """List the blocks of keys that mask and window leave something of, for one block of queries.

    BY_KEYS swaps the two sides: it lists blocks of queries for one block of keys. The mask has lists for each of its examples
    and heads, and for each example of the call with places (Sizes), which move the window.
    """
    q_blocks, k_blocks = tl.cdiv(q_len, BLOCK_Q), tl.cdiv(k_len, BLOCK_K)
    own, other = (k_blocks, q_blocks) if BY_KEYS else (q_blocks, k_blocks)
    block, batch_head = tl.program_id(0) % own, tl.program_id(0) // own
    batch, head = (batch_head // mask_heads).to(tl.int64), batch_head % mask_heads
    list_start = blocks + tl.program_id(0).to(tl.int64) * other
    shift = first_position(places, batch, q_len, k_len)
    count = 0
    for n in range(other):
        q_block, k_block = (n, block) if BY_KEYS else (block, n)
        i = (q_block * BLOCK_Q + tl.arange(0, BLOCK_Q))[:, None]
        j = (k_block * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        zeros = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        s = mask_scores(zeros, mask, batch, head, i + shift, i, j, q_len, k_len, left, right)
        tl.store(list_start + count, n)  # The next block overwrites n if this one holds nothing.
        something = tl.where(s == float("-inf"), 0, 1)  # NaN is something.
        count += tl.max(tl.max(something, 1), 0)
    tl.store(counts + tl.program_id(0), count)


@triton.jit
def load_chunk(
    rows, batch, head, first, rows_left, column, DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Load a tile (ROWS, CHUNK) from `column` on, with zeros past DIM columns and past the first `rows_left` rows."""
    inside = tl.arange(0, ROWS)[:, None] < rows_left  # (ROWS, 1)
    if DIM % CHUNK:
        inside &= tl.arange(0, CHUNK)[None, :] < DIM - column  # (ROWS, CHUNK)
    return tl.load(tile_pointers(rows, batch, head, first, ROWS, CHUNK) + column, mask=inside, other=0.0)


@triton.jit
def products_by_chunk(
    a, b, a_tangent, b_tangent, batch, a_head, b_head, a_first, b_first, a_left, b_left,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the products a b^T of a tile (A_ROWS, B_ROWS) and their tangents. A tangent that is None counts as zeros.

    The loop runs over chunks of the columns, so that what a program holds does not grow with DIM.
    """
    CHUNK: tl.constexpr = min(COLUMNS, 16 if a.data.dtype.element_ty == tl.float32 else 32)
    products = tl.zeros([A_ROWS, B_ROWS], tl.float32)
    product_tangents = tl.zeros([A_ROWS, B_ROWS], tl.float32)
    for column in range(0, DIM, CHUNK):
        a_tile = load_chunk(a, batch, a_head, a_first, a_left, column, DIM, A_ROWS, CHUNK)  # (A_ROWS, CHUNK)
        b_tile = load_chunk(b, batch, b_head, b_first, b_left, column, DIM, B_ROWS, CHUNK)  # (B_ROWS, CHUNK)
        products = tl.dot(a_tile, tl.trans(b_tile), products, input_precision=PRECISION)
        if a_tangent is not None:
            tangent = load_chunk(a_tangent, batch, a_head, a_first, a_left, column, DIM, A_ROWS, CHUNK)  # (A_ROWS, CHUNK)
            product_tangents = tl.dot(tangent, tl.trans(b_tile), product_tangents, input_precision=PRECISION)
        if b_tangent is not None:
            tangent = load_chunk(b_tangent, batch, b_head, b_first, b_left, column, DIM, B_ROWS, CHUNK)  # (B_ROWS, CHUNK)
            product_tangents = tl.dot(a_tile, tl.trans(tangent), product_tangents, input_precision=PRECISION)
    return products, product_tangents


@triton.jit
def attention_grad_mask(
    query, key, value, tangents, grad_out, statistics, delta, stats, lse_tangent, tangent_delta,
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
    query_tangent, key_tangent, value_tangent = None, None, None
    if tangents is not None:
        query_tangent, key_tangent, value_tangent = tangents.query, tangents.key, tangents.value
    acc = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for n in range((sizes.batch // mask_batch) * heads_sharing * q_sharing * k_sharing):
        q_start = (q_block + n // k_sharing % q_sharing) * BLOCK_Q
        k_start = (k_block + n % k_sharing) * BLOCK_K
        head_n = n // (k_sharing * q_sharing)
        b, head = own_b + head_n // heads_sharing, own_head + head_n % heads_sharing
        batch, kv_head, q_left, k_left = b.to(tl.int64), head // sizes.group, q_len - q_start, k_len - k_start
        shift = first_position(sizes.places, b, q_len, k_len)
        s, products = products_by_chunk(
            query, key, query_tangent, key_tangent, batch, head, kv_head, q_start, k_start, q_left, k_left,
            D, COLUMNS, BLOCK_Q, BLOCK_K, PRECISION,
        )  # (BLOCK_Q, BLOCK_K) each  # fmt: skip
        first_row = (batch * sizes.heads + head) * q_len + q_start
        row_max, log2_sum, delta_tile = load_statistics(statistics, delta, first_row, q_left, BLOCK_Q, True)
        i, j = q_start + tl.arange(0, BLOCK_Q), (k_start + tl.arange(0, BLOCK_K))[None, :]  # (BLOCK_Q,), (1, BLOCK_K)
        log2_p, softcap_grad, _ = recompute_log2_p(
            s, row_max[:, None], log2_sum[:, None], mask, batch, head, (i + shift)[:, None], i[:, None], j,
            q_len, k_len, slope_of(scoring, b, head), scoring, False, True, True,
        )  # fmt: skip
        p = tl.exp2(log2_p)  # (BLOCK_Q, BLOCK_K)
        dp, by_tangent = products_by_chunk(
            grad_out, value, None, value_tangent, batch, head, kv_head, q_start, k_start, q_left, k_left,
            DV, VALUE_COLUMNS, BLOCK_Q, BLOCK_K, PRECISION,
        )  # (BLOCK_Q, BLOCK_K) each  # fmt: skip
        origin = dropout_origin(dropout, sizes, b, head)
        if dropout.seed is not None:
            keep = keep_mask(dropout, origin, i, k_start, BLOCK_Q, BLOCK_K, False) * dropout.keep_scale
            dp *= keep
            by_tangent *= keep
        if tangents is None:
            row_grads = load_row_grads(stats, first_row, q_left, BLOCK_Q, False)
            first_key = (batch * sizes.heads + head) * k_len + k_start
            grad_key_mass = load_key_grads(stats, first_key, k_left, BLOCK_K, False)
            acc += score_grads(dp, p, log2_p, delta_tile[:, None], j, stats, row_grads, grad_key_mass)
        else:
            ds = score_tangents(
                products, p, softcap_grad, tangents.mask, batch, head, i[:, None], j, q_len, k_len, scoring, False, True
            )  # (BLOCK_Q, BLOCK_K)
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
