"""Test that the Triton kernels' indices do not wrap around at 2**31: the order of programs, and offsets inside a tile."""

import pytest
import torch
from support.triton_interpreter import DEVICE

triton = pytest.importorskip("triton", reason="the Triton kernels need Triton")

import triton.language as tl  # noqa: E402
from fastlm.kernels import attention  # noqa: E402
from fastlm.kernels.attention.arguments import rows_of  # noqa: E402
from fastlm.kernels.attention.device import program_order  # noqa: E402
from fastlm.kernels.attention.kvcache import KVCache, advance, block_offsets, block_pointers  # noqa: E402
from fastlm.kernels.attention.rows import tile_pointers  # noqa: E402

pytestmark = pytest.mark.gpu


@triton.jit
def write_order(order, heads, blocks, heads_per_group, PROGRAMS: tl.constexpr):
    program = tl.arange(0, PROGRAMS)
    head, block = program_order(program, heads, blocks, heads_per_group)
    tl.store(order + program * 2, head)
    tl.store(order + program * 2 + 1, block)


@pytest.mark.filterwarnings("error:divide by zero")  # NumPy, in the interpreter, goes on with 0.
@pytest.mark.parametrize(("heads", "k_len"), [(1, 0), (4, 0), (4, 1), (4, 1 << 17)])
def test_each_block_has_one_program_however_few_the_keys(heads, k_len):
    """Without keys 24 Mi heads share the cache. Times 1,024 blocks that is 0 in 32 bits, and the order divides by it."""
    query, key = (torch.empty(1, heads, length, 64, dtype=torch.float16, device="meta") for length in (1 << 17, k_len))
    call = attention.Call(query, key, key, right=0, arch="sm_90")
    launch = attention.plan_forward(call, query, query[..., 0].float(), query[..., :2].float())[-1]
    blocks = launch.grid // heads
    order = torch.full((launch.grid, 2), -1, dtype=torch.int32, device=DEVICE)
    write_order[(1,)](order, heads, blocks, launch.arguments["heads_per_group"], launch.grid)
    assert sorted(map(tuple, order.tolist())) == [(head, block) for head in range(heads) for block in range(blocks)]


@triton.jit
def write_offsets(offsets, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    zero = tl.program_id(0)
    pointers = tile_pointers(rows, zero.to(tl.int64), zero, 0, ROWS, COLUMNS)  # (ROWS, COLUMNS)
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(offsets + at, pointers.to(tl.int64) - rows.data.to(tl.int64))


@pytest.mark.parametrize("stride", [16, 24, 61, 17_000_000, 17_000_008, 1 << 31])
def test_the_rows_of_a_tile_may_lie_far_apart(stride):
    """Compute pointers to 128 rows: from a stride of 16,909,321 on the last one lies past 2**31 elements."""
    far = torch.empty(0, dtype=torch.int8, device="meta").as_strided((1, 1, 128, 16), (0, 0, stride, 1))
    rows = rows_of(far)._replace(data=torch.empty(1, dtype=torch.int8, device=DEVICE))
    offsets = torch.empty(128, 16, dtype=torch.int64, device=DEVICE)
    write_offsets[(1,)](offsets, rows, 128, 16)
    assert torch.equal(offsets.cpu(), torch.arange(128)[:, None] * stride + torch.arange(16))


@triton.jit
def write_cached_offsets(offsets, cache, pages, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAGE: tl.constexpr):
    if PAGE is None:
        page = 0
    elif PAGE % ROWS == 0:
        page = tl.load(pages)
    else:
        page = tl.load(pages + tl.arange(0, ROWS))
    first = advance(cache, cache.data, start, PAGE)
    pointers = block_pointers(cache, first, block_offsets(cache, PAGE, ROWS, COLUMNS), page, start, PAGE, ROWS)
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(offsets + at, pointers.to(tl.int64) - cache.data.to(tl.int64))


def _keys_of_plan(cache, block_table=None) -> KVCache:
    """Return the keys of a plan to attend to a cache, as its kernel takes them."""
    query = torch.empty(1, 1, 1, cache.shape[3], dtype=cache.dtype, device="meta")
    lengths = torch.empty(1, dtype=torch.int32, device="meta")
    call = attention.KVCacheCall(query, cache, cache, lengths, block_table=block_table, arch="sm_90")
    return attention.plan_kvcache(call, query, query[..., 0].float())[-2].arguments["keys"]


@pytest.mark.parametrize("page", [None, 8, 12, 32, 64])
@pytest.mark.parametrize("stride", [16, 24, 17_000_000, 1 << 31])
def test_the_rows_and_pages_of_a_cache_may_lie_far_apart(page, stride):
    """Compute pointers to a block of 32 rows, in pages that hold less, as much and more, and end in it or not."""
    rows, start = 32, 96
    pages = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[: start + rows].int()
    data = torch.empty(0, dtype=torch.float16, device="meta")
    position = torch.arange(start, start + rows)
    if page is None:
        keys = _keys_of_plan(data.as_strided((1, 1, 4096, 16), (0, 0, stride, 1)))
        expected, needed = position * stride, pages
    else:
        table = torch.empty(1, len(pages), dtype=torch.int32, device="meta")
        keys = _keys_of_plan(data.as_strided((1000, page, 1, 16), (stride * page, stride, 16, 1)), table)
        expected = (pages.long()[position // page] * page + position % page) * stride
        needed = pages[position // page]
    assert (keys.wide is None) == (stride < 1000)
    keys = keys._replace(data=torch.empty(1, dtype=torch.int8, device=DEVICE), table=None)
    offsets = torch.empty(rows, 16, dtype=torch.int64, device=DEVICE)
    write_cached_offsets[(1,)](offsets, keys, needed.to(DEVICE), start, rows, 16, page)
    assert torch.equal(offsets.cpu(), expected[:, None] + torch.arange(16))
