"""Attention of a few queries to a KV cache, contiguous or paged. The keys are split, so that one sequence keeps a GPU busy.

A program takes one split of the keys for all query heads of a group, so that the cache is read once. A second pass combines the
splits in their order. The splits depend on the cache's capacity alone, so that a row's result does not depend on the batch
around it.
Source: Dao et al., "Flash-Decoding for long-context inference" (2023); paging: Kwon et al., "PagedAttention" (2023).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import LOG2E, finish_softmax, mask_scores, natural_scores, online_softmax, phase_bounds, seen_range
from .rows import load_tile, row_stride, tile_pointers


class KVCache(NamedTuple):
    """A cache of keys or of values, which is read like Rows.

    Without a block table it is (batch, heads, rows, columns). With one it is made of pages: (pages, rows, heads, columns).
    """

    data: Any
    batch: int  # Stride of a sequence, or of a page where there is a table.
    head: int  # Stride of a head.
    row: int  # Stride of a row.
    wide: Any  # True if the rows of one tile, which lie anywhere in a paged cache, span 2**31 elements or more, else None.
    eights: Any  # As in Rows.
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
def block_offsets(cache, PAGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the offsets (ROWS, COLUMNS) in a block of rows that are the same for every block.

    A block that holds whole pages counts the rows of each page from 0.
    """
    r = tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    if PAGE is not None and ROWS % PAGE == 0:
        r = r % PAGE
    elif PAGE is not None and PAGE % ROWS != 0:
        r = r * 0
    if cache.wide is not None:
        r = r.to(tl.int64)
    return r * row_stride(cache) + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_pages(cache, b, start, length, PAGE: tl.constexpr, ROWS: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Return the pages (ROWS,) of a block of rows from `start` on, or one page if it holds the block; 0 without a table.

    The block begins before `length`, which is at most what the table has pages for. With CHECK_ROWS it may end behind.
    """
    if PAGE is None:
        return 0
    else:
        entries = cache.table + b.to(tl.int64) * cache.max_pages
        r = tl.arange(0, ROWS)
        if PAGE % ROWS == 0:
            return tl.load(entries + tl.cast(start, tl.int32) // PAGE)
        else:
            if ROWS % PAGE == 0:
                entries += tl.cast(start, tl.int32) // PAGE + r // PAGE
            else:
                entries += (start + r) // PAGE
            if CHECK_ROWS:
                return tl.load(entries, mask=start + r < length, other=-1)
            else:
                return tl.load(entries)


@triton.jit
def load_cached(
    cache, base, offsets, pages, start, length,
    DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, CHECK_ROWS: tl.constexpr,
):  # fmt: skip
    """Load a block of rows (ROWS, COLUMNS) from `start` on, with zeros past DIM columns and where there is no page.

    With CHECK_ROWS, there are zeros from row `length` on, too.
    """
    COLUMNS: tl.constexpr = offsets.shape[1]
    if PAGE is None:
        return load_tile(base + tl.cast(start, tl.int64) * row_stride(cache) + offsets, length - start, DIM, CHECK_ROWS)
    else:
        found = is_page(cache, pages)
        if PAGE % ROWS == 0:
            base += pages.to(tl.int64) * cache.batch + (tl.cast(start, tl.int64) % PAGE) * row_stride(cache)
            mask = tl.zeros([ROWS, 1], tl.int1) | found
        else:
            if cache.wide is not None:
                pages = pages.to(tl.int64)
            outer = pages * cache.batch
            if ROWS % PAGE != 0:
                outer += (start + tl.arange(0, ROWS)) % PAGE * row_stride(cache)
            offsets = offsets + outer[:, None]
            mask = found[:, None]
        if CHECK_ROWS:
            mask &= tl.arange(0, ROWS)[:, None] < length - start
        if COLUMNS != DIM:
            mask = mask & (tl.arange(0, COLUMNS)[None, :] < DIM)
        return tl.load(base + offsets, mask=mask, other=0.0)


@triton.jit
def is_page(cache, page):
    """Tell whether the cache has a page, whatever the table holds."""
    return page.to(tl.uint32) < tl.cast(cache.pages, tl.uint32)


@triton.jit
def attention_kvcache(
    query, keys, values, cache_seqlens, partial, statistics, sizes, scoring, added, capacity, num_splits,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
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
    b_first = b.to(tl.int64) if PAGE is None else 0
    k_base = keys.data + b_first * keys.batch + kv_head.to(tl.int64) * keys.head
    v_base = values.data + b_first * values.batch + kv_head.to(tl.int64) * values.head
    k_offsets = block_offsets(keys, PAGE, BLOCK_K, COLUMNS)
    v_offsets = block_offsets(values, PAGE, BLOCK_K, VALUE_COLUMNS)
    first = split * SPLIT
    last = first + tl.minimum(SPLIT, length - first)
    begin, whole, edge, end = seen_range(length - sizes.q_len, length - 1, length, scoring.left, scoring.right, BLOCK_K)
    for phase in tl.static_range(3):
        if phase != 0 or scoring.left is not None:
            start, stop = phase_bounds(phase, begin, whole, edge, end, 0, False, BLOCK_K)
            for k_start in range(tl.maximum(start, first), tl.minimum(stop, last), BLOCK_K):
                pages = load_pages(keys, b, k_start, length, PAGE, BLOCK_K, phase != 1)  # Those of the values are the same.
                k = load_cached(keys, k_base, k_offsets, pages, k_start, length, D, PAGE, BLOCK_K, phase != 1)  # (BLOCK_K, COLUMNS)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
                j = (k_start + tl.arange(0, BLOCK_K))[None, :]  # (1, BLOCK_K)
                s, _, _ = natural_scores(s, position, j, slope, scoring)
                if phase != 1:
                    s = mask_scores(s, None, b, kv_head, position, r[:, None], j, rows, length, scoring.left, scoring.right)
                if PAGE is not None:
                    found = is_page(keys, pages)
                    s = tl.where(found if PAGE % BLOCK_K == 0 else found[None, :], s, float("-inf"))
                p, row_max, row_sum, rescale = online_softmax(s, scoring, row_max, row_sum, True, False)
                # (BLOCK_K, VALUE_COLUMNS)
                v = load_cached(values, v_base, v_offsets, pages, k_start, length, DV, PAGE, BLOCK_K, phase != 1)
                # (BLOCK_Q, VALUE_COLUMNS)
                acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
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
