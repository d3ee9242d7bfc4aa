"""Test decoding against attention on the same rows, with caches of any layout, and that it stays inside the cache."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guarded import SENTINEL, Guarded
from support.oracle import Oracle

import fastlm
from fastlm.testing import seeded_normal

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def paged(cache: torch.Tensor, page: int, spare: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a cache (B, H, L, D) as pages in random order among ``spare`` pages of NaN, and its block_table."""
    batch, heads, rows, dim = cache.shape
    pages = cache.unflatten(2, (-1, page)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (B * L / page, page, H, D)
    order = torch.randperm(len(pages) + spare, generator=torch.Generator().manual_seed(seed))[: len(pages)]
    scattered = torch.full((len(pages) + spare, page, heads, dim), math.nan, dtype=cache.dtype)
    scattered[order] = pages
    return scattered, order.int().view(batch, rows // page)


@st.composite
def calls(draw, longest: int = 700, most_heads: int = 3) -> dict:
    batch, kv_heads = draw(st.integers(0, 3)), draw(st.integers(1, most_heads))
    group = draw(st.sampled_from([1, 2, 4, 7]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    dim, value_dim = (draw(st.sampled_from([1, 8, 20, 64, 128])) for _ in range(2))
    page = draw(st.sampled_from([1, 3, 16, 64]))
    capacity = page * draw(st.integers(1, max(1, longest // page)))
    added = draw(st.integers(0, min(9, capacity)))
    lengths = [draw(st.integers(0, capacity - added)) for _ in range(batch)]
    q_len, heads = draw(st.sampled_from([1, 1, 2, 5, 60])), kv_heads * group
    call = {"query": seeded_normal(1, (batch, heads, q_len, dim), dtype), "return_lse": True}
    call["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    for i, (name, columns) in enumerate((("key", dim), ("value", value_dim))):
        cache = seeded_normal(2 + i, (batch, kv_heads, capacity, columns), dtype)
        for b, length in enumerate(lengths):
            cache[b, :, length:] = math.nan
        call[f"{name}_cache"] = cache
        if added:
            call[name] = seeded_normal(4 + i, (batch, kv_heads, added, columns), dtype)
    if draw(st.booleans()):
        call["key_cache"], call["block_table"] = paged(call["key_cache"], page, 3, seed=7)
        call["value_cache"], _ = paged(call["value_cache"], page, 3, seed=7)
        past = torch.arange(capacity // page) * page >= torch.tensor(lengths)[:, None] + added
        call["block_table"] = call["block_table"].masked_fill(past, draw(st.sampled_from([-1, 2**31 - 1])))
    call["causal"] = draw(st.booleans())
    if draw(st.booleans()):
        call["window"] = (draw(st.sampled_from([None, 0, 5, 300])), draw(st.sampled_from([None, 0, 3])))
    if draw(st.booleans()):
        call["softcap"] = 2.0
    if draw(st.booleans()):
        call["sinks"] = seeded_normal(8, (heads,), dtype)
    if draw(st.booleans()):
        call["alibi_slopes"] = seeded_normal(9, draw(st.sampled_from([(heads,), (batch, heads)])), torch.float32).abs() / 9
    return call


class Fresh(Oracle):
    """Give each run of the oracle its own caches, because a run appends to them."""

    def __init__(self, call: dict):
        super().__init__(_on_copies, call, (), set())


def _on_copies(key_cache, value_cache, **call):
    return fastlm.kvcache_attention(key_cache=key_cache.clone(), value_cache=value_cache.clone(), **call)


@settings(max_examples=150)
@given(calls())
def test_decoding_anywhere(call):
    Fresh(call).check_on_every_isa()


@settings(max_examples=100)
@given(calls())
def test_both_backends_append_the_same_rows(widest_isa, call):
    names = ("key_cache", "value_cache")
    caches = [{name: call[name].clone() for name in names} for _ in range(2)]
    for backend, own in zip(("cpu", "reference"), caches):
        fastlm.kvcache_attention(**{**call, **own}, backend=backend)
    for name in names:
        assert torch.equal(caches[0][name].nan_to_num(SENTINEL), caches[1][name].nan_to_num(SENTINEL))


@DTYPES
@pytest.mark.parametrize("page", [None, 16])
def test_a_sequence_decoded_step_by_step_is_the_whole_one_at_once(dtype, page, isa):
    """After a prompt of 20 rows, each step adds one row, which attends to all rows before it."""
    total, prompt = 48, 20
    query, key, value = (seeded_normal(i, (2, heads, total, 32), dtype) for i, heads in enumerate((6, 2, 2)))
    whole = fastlm.attention(query, key, value, causal=True, backend="cpu")
    caches = [torch.full((2, 2, total, 32), math.nan, dtype=dtype) for _ in range(2)]
    options = {}
    if page:
        (caches[0], table), (caches[1], _) = (paged(cache, page, 2, seed=1) for cache in caches)
        options["block_table"] = table
    for begin, end in ((0, prompt), *((row, row + 1) for row in range(prompt, total))):
        lengths = torch.full((2,), begin, dtype=torch.int32)
        new = {"key": key[:, :, begin:end], "value": value[:, :, begin:end]}
        out = fastlm.kvcache_attention(query[:, :, begin:end], *caches, lengths, **new, **options, causal=True, backend="cpu")
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(out, whole[:, :, begin:end], rtol=tolerance, atol=tolerance)
        assert lengths.tolist() == [begin, begin]


def test_no_gradient_and_no_graph(isa):
    query = seeded_normal(1, (1, 2, 1, 8), torch.float32).requires_grad_()
    cache = seeded_normal(2, (1, 2, 4, 8), torch.float32)
    for backend in ("cpu", "reference"):
        out = fastlm.kvcache_attention(query, cache, cache, torch.tensor([3], dtype=torch.int32), backend=backend)
        assert not out.requires_grad


def test_under_autocast_the_caches_keep_their_dtype(isa):
    cache, lengths = seeded_normal(2, (1, 2, 4, 8), torch.float32), torch.tensor([3], dtype=torch.int32)
    query, new = seeded_normal(1, (1, 2, 1, 8), torch.bfloat16), seeded_normal(3, (1, 2, 1, 8), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastlm.kvcache_attention(query, cache, cache.clone(), lengths, key=new, value=new, backend="cpu")
    assert out.dtype == torch.float32 and torch.equal(cache[:, :, 3], new[:, :, 0].float())


# ---- nothing outside the tensors --------------------------------------------------------------------------------------------


SIZES = [(1, 1, 1, 1, 1, 1), (2, 4, 2, 37, 70, 24), (1, 6, 2, 5, 129, 17), (2, 2, 2, 65, 3, 64), (1, 8, 1, 1, 900, 40)]


@DTYPES
@pytest.mark.parametrize("sizes", SIZES)
def test_attention_reads_nothing_outside_its_tensors(sizes, dtype, isa):
    batch, heads, kv_heads, q_len, k_len, dim = sizes
    shapes = {"query": (heads, q_len, dim), "key": (kv_heads, k_len, dim), "value": (kv_heads, k_len, dim + 3)}
    shapes["mask"] = (heads, q_len, k_len)
    call = {name: seeded_normal(i, (batch, *shape), dtype) for i, (name, shape) in enumerate(shapes.items())}
    guarded = Guarded()
    inside = {name: guarded.put(tensor).requires_grad_() for name, tensor in call.items()}
    out = fastlm.attention(**inside, backend="cpu")
    gradients = torch.autograd.grad(out, list(inside.values()), guarded.put(torch.ones_like(out)))
    assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)
    plain = {name: tensor.requires_grad_() for name, tensor in call.items()}
    expected = fastlm.attention(**plain, backend="cpu")
    assert torch.equal(out, expected)
    for result, wanted in zip(gradients, torch.autograd.grad(expected, list(plain.values()), torch.ones_like(out))):
        assert torch.equal(result, wanted)
    guarded.check(math.nan)


@DTYPES
@pytest.mark.parametrize("q_len", [1, 9])
def test_decoding_writes_its_rows_and_nothing_else(q_len, dtype, isa):
    lengths = torch.tensor([30, 0, 61], dtype=torch.int32)
    key_cache, value_cache = (seeded_normal(i, (3, 2, 64, 20), dtype) for i in range(2))
    key, value = (seeded_normal(i, (3, 2, 3, 20), dtype) for i in (2, 3))
    guarded = Guarded()
    caches = [guarded.put(cache, SENTINEL) for cache in (key_cache, value_cache)]
    query = seeded_normal(4, (3, 4, q_len, 20), dtype)
    fastlm.kvcache_attention(query, *caches, lengths, key=key, value=value, backend="cpu")
    guarded.check(SENTINEL)
    for cache, before, new in zip(caches, (key_cache, value_cache), (key, value)):
        for b, length in enumerate(lengths.tolist()):
            before[b, :, length : length + 3] = new[b]
        assert torch.equal(cache, before)
