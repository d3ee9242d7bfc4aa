"""Attention of a few queries to a KV cache, contiguous or paged. The keys are split, so that one sequence keeps a GPU busy.

A program takes one split of the keys for all query heads of a group, so that the cache is read once. A second pass combines the
splits in their order. The splits depend on the cache's capacity alone, so that a row's result does not depend on the batch
around it.
Source: Dao et al., "Flash-Decoding for long-context inference" (2023); paging: Kwon et al., "PagedAttention" (2023).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import LOG2E, finish_softmax, mask_scores, natural_scores, online_softmax
from .rows import load_tile, tile_pointers


class KVCache(NamedTuple):
    """A cache of keys or of values.

    Without a block table it is (batch, heads, rows, columns). With one it is made of pages: (pages, rows, heads, columns).
    """

    data: Any
    batch: int  # Stride of a sequence, or of a page where there is a table.
    head: int  # Stride of a head.
    row: int  # Stride of a row.
    rows: int  # Number of rows of a sequence, or of a page where there is a table.
    table: Any  # int32 (batch, max_pages), or None
    pages: int  # Number of pages of the cache.
    max_pages: int  # Number of table entries of a sequence.


@triton.jit
def find_rows(cache, b, position, wanted):
    """Return (batch index or page, row in it, found) for the positions that are `wanted`.

    A row that lies outside the cache is not found, whatever the table holds.
    """
    if cache.table is None:
        return b.to(tl.int64), position.to(tl.int64), wanted & (position < cache.rows)
    else:
        entry = position // cache.rows
        inside = wanted & (entry < cache.max_pages)
        page = tl.load(cache.table + b.to(tl.int64) * cache.max_pages + entry, mask=inside, other=-1)
        return page.to(tl.int64), (position % cache.rows).to(tl.int64), wanted & (page >= 0) & (page < cache.pages)


@triton.jit
def row_pointers(cache, head, outer, row):
    """Return pointers to the first columns of the rows that `find_rows` found."""
    return cache.data + outer * cache.batch + head.to(tl.int64) * cache.head + row * cache.row


@triton.jit
def kvcache_length(cache_seqlens, b, added, capacity):
    """Return the number of rows of a sequence, with those appended.

    It lies between 0 and the capacity, whatever cache_seqlens holds, and no sum passes 2**31.
    """
    return tl.minimum(tl.maximum(tl.load(cache_seqlens + b), 0), capacity - added) + added


@triton.jit
def append_rows(
    rows, cache, b, head, first, added, start, DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write a block of the new rows, from row `first` on, into a cache that holds `start` rows of the sequence."""
    r, columns = first + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    new_pointers = tile_pointers(rows, b.to(tl.int64), head, first, BLOCK, COLUMNS)
    new = load_tile(new_pointers, added - first, DIM, True)  # (BLOCK, COLUMNS)
    position = start + r  # (BLOCK,)
    outer, row, found = find_rows(cache, b, position, (r < added) & (position >= r))
    pointers = row_pointers(cache, head, outer, row)
    tl.store(pointers[:, None] + columns[None, :], new, mask=found[:, None] & (columns < DIM)[None, :])


@triton.jit
def kvcache_append(
    key, value, keys, values, cache_seqlens, kv_heads, added,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a block of the new rows of a sequence and head, keys and values, behind those in their caches."""
    blocks = tl.cdiv(added, BLOCK)
    block, batch_head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, head = batch_head // kv_heads, batch_head % kv_heads
    start = tl.load(cache_seqlens + b)
    append_rows(key, keys, b, head, block * BLOCK, added, start, D, COLUMNS, BLOCK)
    append_rows(value, values, b, head, block * BLOCK, added, start, DV, VALUE_COLUMNS, BLOCK)


@triton.jit
def attention_kvcache(
    query, keys, values, cache_seqlens, partial, statistics, sizes, scoring, added, capacity, num_splits,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the partial result of one split of the keys. The rows of a tile are the queries of a group of heads.

    partial: float32 (batch, heads, rows, num_splits, DV), not divided by the sum yet.
    statistics: float32 (batch, heads, rows, num_splits, 2), the maximum and the sum.
    """
    rows = sizes.group * sizes.q_len
    blocks, kv_heads = tl.cdiv(rows, BLOCK_Q), sizes.heads // sizes.group
    split, rest = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
    block, batch_head = rest % blocks, rest // blocks
    b, kv_head = batch_head // kv_heads, batch_head % kv_heads
    length = kvcache_length(cache_seqlens, b, added, capacity)
    r = block * BLOCK_Q + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
    head, i = kv_head * sizes.group + r // sizes.q_len, r % sizes.q_len
    columns, value_columns = tl.arange(0, COLUMNS)[None, :], tl.arange(0, VALUE_COLUMNS)[None, :]
    q_rows = query.data + b.to(tl.int64) * query.batch + head.to(tl.int64) * query.head + i.to(tl.int64) * query.row
    q = tl.load(q_rows[:, None] + columns, mask=(r < rows)[:, None] & (columns < D), other=0.0)  # (BLOCK_Q, COLUMNS)
    position = (i + length - sizes.q_len)[:, None]  # (BLOCK_Q, 1)
    slope = 0.0
    if scoring.slopes is not None:
        slope = (tl.load(scoring.slopes + b * scoring.slope_batch + head, mask=r < rows, other=0.0))[:, None]  # (BLOCK_Q, 1)
    row_max, row_sum = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, VALUE_COLUMNS], tl.float32)
    begin = split * SPLIT
    end = begin + tl.minimum(SPLIT, length - begin)
    if scoring.left is not None:  # The first query sees the furthest back.
        begin = tl.maximum(begin, (length - sizes.q_len - scoring.left) // BLOCK_K * BLOCK_K)
    if scoring.right is not None:
        end = tl.minimum(end, length + scoring.right)
    for k_start in range(begin, end, BLOCK_K):
        j = k_start + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        outer, row, found = find_rows(keys, b, j, j < length)  # The values lie at the same places.
        # (BLOCK_K, COLUMNS)
        k = tl.load(row_pointers(keys, kv_head, outer, row)[:, None] + columns, mask=found[:, None] & (columns < D), other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
        s, _, _ = natural_scores(s, position, j[None, :], slope, scoring)
        s = mask_scores(s, None, b, kv_head, position, r[:, None], j[None, :], rows, length, scoring.left, scoring.right)
        s = tl.where(found[None, :], s, float("-inf"))
        p, row_max, row_sum, rescale = online_softmax(s, scoring, row_max, row_sum, True, False)
        v_rows = row_pointers(values, kv_head, outer, row)
        # (BLOCK_K, VALUE_COLUMNS)
        v = tl.load(v_rows[:, None] + value_columns, mask=found[:, None] & (value_columns < DV), other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)  # (BLOCK_Q, VALUE_COLUMNS)
    at = ((b.to(tl.int64) * sizes.heads + head) * sizes.q_len + i) * num_splits + split
    tl.store(statistics + at * 2, row_max, mask=r < rows)
    tl.store(statistics + at * 2 + 1, row_sum, mask=r < rows)
    tl.store(partial + at[:, None] * DV + value_columns, acc, mask=(r < rows)[:, None] & (value_columns < DV))


@triton.jit
def attention_combine(
    partial, statistics, cache_seqlens, out, lse, sizes, scoring, added, capacity, num_splits,
    DV: tl.constexpr, VALUE_COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one query of one head in their order, then add the sink; write out and lse."""
    q_row = tl.program_id(0).to(tl.int64)
    i, head, b = q_row % sizes.q_len, q_row // sizes.q_len % sizes.heads, q_row // sizes.q_len // sizes.heads
    columns = tl.arange(0, VALUE_COLUMNS)
    row_max, row_sum = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    acc = tl.zeros([VALUE_COLUMNS], tl.float32)
    length = kvcache_length(cache_seqlens, b, added, capacity)
    one = tl.arange(0, 1)
    for split in range(0, tl.cdiv(length, SPLIT)):
        at = q_row * num_splits + split
        split_max, split_sum = tl.load(statistics + at * 2 + one), tl.load(statistics + at * 2 + 1 + one)  # (1,)
        new_max = tl.maximum(row_max, split_max)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale, split_scale = tl.exp2((row_max - base) * LOG2E), tl.exp2((split_max - base) * LOG2E)
        split_acc = tl.load(partial + at * DV + columns, mask=(columns < DV), other=0.0)  # (VALUE_COLUMNS,)
        acc = acc * rescale + split_acc * split_scale
        row_max, row_sum = new_max, row_sum * rescale + split_sum * split_scale
    out_scale, lse_tile, _, _ = finish_softmax(row_max, row_sum, 0.0, scoring, head, False)
    out_row = out.data + b * out.batch + head * out.head + i * out.row
    tl.store(out_row + columns, (acc * out_scale).to(out.data.dtype.element_ty), mask=columns < DV)
    tl.store(lse + q_row + one, lse_tile)
