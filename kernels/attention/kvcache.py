"""Decoding: a few queries attend to a cache, contiguous or paged. The keys are split, so that one sequence keeps a GPU busy.

A program takes one chunk of the keys for all query heads of a group, so that the cache is read once; a second pass joins the
chunks in their order. Chunks depend on the cache's capacity alone: a row's result does not depend on the batch around it.
Source: Dao et al., "Flash-Decoding for long-context inference" (2023); paging: Kwon et al., "PagedAttention" (2023).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import LOG2E, finish_softmax, load_tile, masked, online_softmax, scores, tile_pointers


class Cache(NamedTuple):
    """A cache of rows. Without a table (batch, heads, rows, columns); with one, pages (pages, rows, heads, columns)."""

    data: Any
    batch: int  # strides; of a page where there is a table
    head: int
    row: int
    rows: int  # of a sequence, or of a page
    table: Any  # int32 (batch, most), or None
    pages: int
    most: int


@triton.jit
def find_rows(cache, b, position, wanted):
    """(batch index or page, row in it, which exist) of rows: none outside the cache, whatever the table holds."""
    if cache.table is None:
        return b.to(tl.int64), position.to(tl.int64), wanted & (position < cache.rows)
    else:
        entry = position // cache.rows
        page = tl.load(cache.table + b.to(tl.int64) * cache.most + entry, mask=wanted & (entry < cache.most), other=-1)
        return page.to(tl.int64), (position % cache.rows).to(tl.int64), wanted & (page >= 0) & (page < cache.pages)


@triton.jit
def row_pointers(cache, head, outer, row):
    """To the first columns of rows that `find_rows` found."""
    return cache.data + outer * cache.batch + head.to(tl.int64) * cache.head + row * cache.row


@triton.jit
def cached_length(cache_seqlens, b, added, capacity):
    """Rows of a sequence with those appended: between 0 and the capacity, whatever cache_seqlens holds."""
    return tl.minimum(tl.maximum(tl.load(cache_seqlens + b), 0), capacity - added) + added  # no sum passes 2**31


@triton.jit
def cache_append(rows, cache, cache_seqlens, kv_heads, added, DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the new rows of a sequence and head behind those that are cached."""
    blocks = tl.cdiv(added, BLOCK)
    block, unit = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, head = unit // kv_heads, unit % kv_heads
    new = load_tile(tile_pointers(rows, b.to(tl.int64), head, block * BLOCK, BLOCK, COLUMNS), added - block * BLOCK, DIM, True)
    r, columns = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    position = tl.load(cache_seqlens + b) + r
    outer, row, exist = find_rows(cache, b, position, (r < added) & (position >= r))
    pointers = row_pointers(cache, head, outer, row)
    tl.store(pointers[:, None] + columns[None, :], new, mask=exist[:, None] & (columns < DIM)[None, :])


@triton.jit
def attention_decode(
    query, keys, values, cache_seqlens, partial, statistics, sizes, scoring, added, capacity, chunks,
    D: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one chunk of the keys gives. Rows of a tile are the queries of a group of heads.

    partial: float32 (batch, heads, rows, chunks, DV), not divided by the total yet; statistics: float32 (batch, heads, rows,
    chunks, 2), maximum and total.
    """
    rows = sizes.group * sizes.q_len
    blocks, kv_heads = tl.cdiv(rows, BLOCK_Q), sizes.heads // sizes.group
    chunk, rest = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    block, unit = rest % blocks, rest // blocks
    b, kv_head = unit // kv_heads, unit % kv_heads
    length = cached_length(cache_seqlens, b, added, capacity)
    r = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head, i = kv_head * sizes.group + r // sizes.q_len, r % sizes.q_len
    columns, value_columns = tl.arange(0, COLUMNS)[None, :], tl.arange(0, VALUE_COLUMNS)[None, :]
    q_rows = query.data + b.to(tl.int64) * query.batch + head.to(tl.int64) * query.head + i.to(tl.int64) * query.row
    q = tl.load(q_rows[:, None] + columns, mask=(r < rows)[:, None] & (columns < D), other=0.0)
    place = (i + length - sizes.q_len)[:, None]
    slope = 0.0
    if scoring.slopes is not None:
        slope = (tl.load(scoring.slopes + b * scoring.slope_batch + head, mask=r < rows, other=0.0))[:, None]
    maximum, total = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, VALUE_COLUMNS], tl.float32)
    begin = chunk * CHUNK
    end = begin + tl.minimum(CHUNK, length - begin)
    if scoring.left is not None:  # the first query sees the furthest back
        begin = tl.maximum(begin, (length - sizes.q_len - scoring.left) // BLOCK_K * BLOCK_K)
    if scoring.right is not None:
        end = tl.minimum(end, length + scoring.right)
    for k_start in range(begin, end, BLOCK_K):
        j = k_start + tl.arange(0, BLOCK_K)
        outer, row, exist = find_rows(keys, b, j, j < length)  # values lie at the same places
        k = tl.load(row_pointers(keys, kv_head, outer, row)[:, None] + columns, mask=exist[:, None] & (columns < D), other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s, _ = scores(s, place, j[None, :], slope, scoring)
        s = masked(s, None, b, kv_head, place, r[:, None], j[None, :], rows, length, scoring.left, scoring.right)
        s = tl.where(exist[None, :], s, float("-inf"))
        weights, maximum, total, rescale = online_softmax(s, scoring, maximum, total, True, False)
        v_rows = row_pointers(values, kv_head, outer, row)
        v = tl.load(v_rows[:, None] + value_columns, mask=exist[:, None] & (value_columns < DV), other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    at = ((b.to(tl.int64) * sizes.heads + head) * sizes.q_len + i) * chunks + chunk
    tl.store(statistics + at * 2, maximum, mask=r < rows)
    tl.store(statistics + at * 2 + 1, total, mask=r < rows)
    tl.store(partial + at[:, None] * DV + value_columns, acc, mask=(r < rows)[:, None] & (value_columns < DV))


@triton.jit
def attention_join(
    partial, statistics, cache_seqlens, out, lse, sizes, scoring, added, capacity, chunks,
    DV: tl.constexpr, VALUE_COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Join the chunks of a query and head, a program for each, in their order, and its sink."""
    unit = tl.program_id(0).to(tl.int64)
    i, head, b = unit % sizes.q_len, unit // sizes.q_len % sizes.heads, unit // sizes.q_len // sizes.heads
    columns = tl.arange(0, VALUE_COLUMNS)
    maximum, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    acc = tl.zeros([VALUE_COLUMNS], tl.float32)
    length = cached_length(cache_seqlens, b, added, capacity)
    one = tl.arange(0, 1)
    for chunk in range(0, tl.cdiv(length, CHUNK)):
        at = unit * chunks + chunk
        its_maximum, its_total = tl.load(statistics + at * 2 + one), tl.load(statistics + at * 2 + 1 + one)
        new = tl.maximum(maximum, its_maximum)
        base = tl.where(new == float("-inf"), 0.0, new)
        rescale, share = tl.exp2((maximum - base) * LOG2E), tl.exp2((its_maximum - base) * LOG2E)
        part = tl.load(partial + at * DV + columns, mask=(columns < DV), other=0.0)
        acc = acc * rescale + part * share
        maximum, total = new, total * rescale + its_total * share
    out_scale, its_lse, _ = finish_softmax(maximum, total, 0.0, scoring, head, False)
    row = out.data + b * out.batch + head * out.head + i * out.row
    tl.store(row + columns, (acc * out_scale).to(out.data.dtype.element_ty), mask=columns < DV)
    tl.store(lse + unit + one, its_lse)
