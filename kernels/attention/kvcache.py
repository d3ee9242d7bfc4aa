"""Attention of a few queries to a KV cache, contiguous or paged. The keys are split, so that one sequence keeps a GPU busy.

A program takes one split of the keys for all query heads of a group, so that the cache is read once. A second pass combines the
splits in their order. The splits depend on the cache's capacity alone, so that a row's result does not depend on the batch
around it. Blocks of keys that every query sees have a loop of their own, without masks. What a pass through it needs of
addresses is computed before it, as far as can be.
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


# ---- blocks of rows that are read: PAGE is the number of rows of a page, or None without a table ---------------------------


@triton.jit
def head_pointer(cache, b, head, PAGE: tl.constexpr):
    """Return the pointer to the first row of a head: of a sequence, or of page 0."""
    pointer = cache.data + head.to(tl.int64) * cache.head
    if PAGE is None:
        return pointer + b.to(tl.int64) * cache.batch
    else:
        return pointer


@triton.jit
def advance(cache, pointer, rows, PAGE: tl.constexpr):
    """Return the pointer to so many rows further on. In a paged cache it stays, because each block adds its pages to it."""
    if PAGE is None:
        return pointer + tl.cast(rows, tl.int64) * row_stride(cache)
    else:
        return pointer


@triton.jit
def block_offsets(cache, PAGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the part of the offsets (ROWS, COLUMNS) in a block of rows that is the same for every block."""
    r = tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    if PAGE is not None:
        if ROWS % PAGE == 0:  # The block is made of whole pages.
            r = r % PAGE
        elif PAGE % ROWS != 0:  # Pages end anywhere in a block.
            r = r * 0
    if cache.wide is not None:
        r = r.to(tl.int64)
    return r * row_stride(cache) + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_pages(cache, b, start, length, PAGE: tl.constexpr, ROWS: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Return (page, found) of the rows of a block: for each row (ROWS,), or one for all rows if a page holds the block.

    The block starts before `length` and, unless CHECK_ROWS, ends there at the latest; the table has pages up to there. A page
    that lies outside the cache is not found, whatever the table holds.
    """
    if PAGE is None:
        return 0, 0
    else:
        entries = cache.table + b.to(tl.int64) * cache.max_pages
        r = tl.arange(0, ROWS)
        if PAGE % ROWS == 0:
            page = tl.load(entries + tl.cast(start, tl.uint32) // PAGE)
        else:
            if ROWS % PAGE == 0:
                entries += tl.cast(start, tl.int32) // PAGE + r // PAGE
            else:
                entries += (start + r).to(tl.uint32) // PAGE
            page = tl.load(entries, mask=start + r < length, other=-1) if CHECK_ROWS else tl.load(entries)
        return page, page.to(tl.uint32) < tl.cast(cache.pages, tl.uint32)


@triton.jit
def block_pointers(cache, pointer, offsets, page, start, PAGE: tl.constexpr, ROWS: tl.constexpr):
    """Return pointers (ROWS, COLUMNS) to a block of rows from `start` on."""
    if PAGE is None:
        return pointer + offsets
    elif PAGE % ROWS == 0:
        row = (tl.cast(start, tl.uint32) % PAGE).to(tl.int64)
        return pointer + (page.to(tl.int64) * cache.batch + row * row_stride(cache)) + offsets
    else:
        if cache.wide is not None:
            page = page.to(tl.int64)
        rows = page * cache.batch  # (ROWS,)
        if ROWS % PAGE != 0:
            rows += ((start + tl.arange(0, ROWS)).to(tl.uint32) % PAGE).to(rows.dtype) * row_stride(cache)
        return pointer + (offsets + rows[:, None])


@triton.jit
def load_rows(
    pointers, found, rows_left, DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, CHECK_ROWS: tl.constexpr
):  # fmt: skip
    """Load a block of rows (ROWS, COLUMNS), with zeros as in `load_tile`, and where no page is found."""
    COLUMNS: tl.constexpr = pointers.shape[1]
    if PAGE is None:
        return load_tile(pointers, rows_left, DIM, CHECK_ROWS)
    else:
        mask = tl.zeros([ROWS, 1], tl.int1) | (found if PAGE % ROWS == 0 else found[:, None])  # (ROWS, 1)
        if CHECK_ROWS:
            mask &= tl.arange(0, ROWS)[:, None] < rows_left
        if COLUMNS != DIM:
            mask = mask & (tl.arange(0, COLUMNS)[None, :] < DIM)
        return tl.load(pointers, mask=mask, other=0.0)


# ---- passes -----------------------------------------------------------------------------------------------------------------


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
    k_base, v_base = head_pointer(keys, b, kv_head, PAGE), head_pointer(values, b, kv_head, PAGE)
    k_offsets = block_offsets(keys, PAGE, BLOCK_K, COLUMNS)
    v_offsets = block_offsets(values, PAGE, BLOCK_K, VALUE_COLUMNS)
    first = split * SPLIT
    last = first + tl.minimum(SPLIT, length - first)
    begin, whole, edge, end = seen_range(length - sizes.q_len, length - 1, length, scoring.left, scoring.right, BLOCK_K)
    for phase in tl.static_range(3):
        if phase != 0 or scoring.left is not None:
            start, stop = phase_bounds(phase, begin, whole, edge, end, 0, False, BLOCK_K)
            start = tl.maximum(start, first)
            k_at, v_at = advance(keys, k_base, start, PAGE), advance(values, v_base, start, PAGE)
            for k_start in range(start, tl.minimum(stop, last), BLOCK_K):
                # The values lie on the same pages as the keys.
                page, found = load_pages(keys, b, k_start, length, PAGE, BLOCK_K, phase != 1)
                # (BLOCK_K, COLUMNS) each
                k_pointers = block_pointers(keys, k_at, k_offsets, page, k_start, PAGE, BLOCK_K)
                k = load_rows(k_pointers, found, length - k_start, D, PAGE, BLOCK_K, phase != 1)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
                j = (k_start + tl.arange(0, BLOCK_K))[None, :]  # (1, BLOCK_K)
                s, _, _ = natural_scores(s, position, j, slope, scoring)
                if phase != 1:
                    s = mask_scores(s, None, b, kv_head, position, r[:, None], j, rows, length, scoring.left, scoring.right)
                if PAGE is not None:
                    s = tl.where(found if PAGE % BLOCK_K == 0 else found[None, :], s, float("-inf"))
                p, row_max, row_sum, rescale = online_softmax(s, scoring, row_max, row_sum, True, False)
                # (BLOCK_K, VALUE_COLUMNS) each
                v_pointers = block_pointers(values, v_at, v_offsets, page, k_start, PAGE, BLOCK_K)
                v = load_rows(v_pointers, found, length - k_start, DV, PAGE, BLOCK_K, phase != 1)
                # (BLOCK_Q, VALUE_COLUMNS)
                acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
                k_at, v_at = advance(keys, k_at, BLOCK_K, PAGE), advance(values, v_at, BLOCK_K, PAGE)
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
