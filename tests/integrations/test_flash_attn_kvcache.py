"""flash_attn_with_kvcache on fastlm: what it attends to, what it appends and where, and how it rotates.

The options are drawn at random from the space of flash_attn's own tests. Golden is a naive version in float64 that walks over
the sequences, and the rule is that of tests/support/oracle.py.
"""

import random

import pytest
import torch
from support.naive_flash_attn import naive_attention, naive_rotation
from support.oracle import Oracle
from torch import Tensor

import fastlm
from fastlm.integrations.flash_attn import flash_attn_with_kvcache
from fastlm.testing import seeded_normal

BATCH, LONGEST = 3, 48


def call_of(seed: int) -> dict:
    """Draw a call: tensors, where the sequences lie in the caches, and options."""
    draw = random.Random(seed)
    dtype = draw.choice([torch.float16, torch.bfloat16, torch.float32])
    heads, kv_heads = draw.choice([(4, 4), (6, 2), (6, 1)])
    head_dim, rows = draw.choice([32, 59, 64]), draw.choice([1, 1, 3, 20])
    layout = draw.choice(["rows", "indexed", "padded", "indexed and padded", "paged"])
    lengths = [draw.randint(21, LONGEST - 21) for _ in range(BATCH)]
    new = draw.choice([None, rows, 5])
    call = {
        "query": seeded_normal(1, (BATCH, rows, heads, head_dim), dtype),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "causal": draw.random() < 0.5,
        "window_size": draw.choice([(-1, -1), (7, 3), (11, 0)]),
        "softcap": draw.choice([0.0, 2.0]),
    }
    sequences = 5 if "indexed" in layout else BATCH
    if layout == "paged":
        pages, page = draw.choice([(19, 8), (4, LONGEST)])
        sequences, length = pages, page
        table = torch.tensor(draw.sample(range(pages), BATCH * (LONGEST // page))).reshape(BATCH, -1)
        call["block_table"] = table.int()
    else:
        length = LONGEST
    call["k_cache"], call["v_cache"] = seeded_normal(2, (2, sequences, length, kv_heads, head_dim), dtype)
    if "indexed" in layout:
        call["cache_batch_idx"] = torch.tensor(draw.sample(range(sequences), BATCH), dtype=torch.int32)
    if "padded" in layout:
        call["cache_leftpad"] = torch.tensor([draw.randint(0, 20) for _ in range(BATCH)], dtype=torch.int32)
    if draw.random() < 0.3:
        call["alibi_slopes"] = seeded_normal(13, (BATCH, heads), torch.float32).abs() / 8
    if new is not None:
        call["k"], call["v"] = seeded_normal(3, (2, BATCH, new, kv_heads, head_dim), dtype)
        if draw.random() < 0.7:
            angles = seeded_normal(4, (LONGEST, draw.choice([8, 16])), torch.float64)
            call["rotary_cos"], call["rotary_sin"] = angles.cos().to(dtype), angles.sin().to(dtype)
            call["rotary_interleaved"] = draw.random() < 0.5
    return call


def naive_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k=None,
    v=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    rotary_cos=None,
    rotary_sin=None,
    rotary_interleaved=True,
    alibi_slopes=None,
    **options,
) -> tuple[Tensor, Tensor]:
    """Return out (B, Sq, H, D) and the log-sum-exp (B, H, Sq), sequence by sequence; append in place."""
    moves = options["causal"] or options["window_size"] != (-1, -1)
    results = []
    for b, length in enumerate(cache_seqlens.tolist()):
        query, end = q[b], length + (0 if k is None else k.shape[1])
        if rotary_cos is not None:
            at = [slice(length, length + len(query)) if moves else [length] * len(query), slice(length, end)]
            query, key = (
                naive_rotation(x, rotary_cos[rows], rotary_sin[rows], rotary_interleaved) for x, rows in zip((query, k[b]), at)
            )
        elif k is not None:
            key = k[b]
        row = torch.arange(end)
        if block_table is None:
            place = torch.full_like(row, b if cache_batch_idx is None else cache_batch_idx[b]), row
        else:
            place = block_table[b].long()[row // k_cache.shape[1]], row % k_cache.shape[1]
        if k is not None:
            new = tuple(index[length:] for index in place)
            k_cache[new], v_cache[new] = key, v[b]
        first = 0 if cache_leftpad is None else cache_leftpad[b]
        cached = (cache[place][None, first:] for cache in (k_cache, v_cache))
        slopes = None if alibi_slopes is None else alibi_slopes[b]
        results.append(naive_attention(query[None], *cached, alibi_slopes=slopes, **options))
    return tuple(map(torch.cat, zip(*results)))


@pytest.mark.parametrize("seed", range(40))
def test_any_call(seed):
    call = call_of(seed)

    def function(query, k_cache, v_cache, cache_seqlens, backend=None, **options):
        caches = k_cache.clone(), v_cache.clone()
        if backend == "reference":
            out, lse = naive_with_kvcache(query, *caches, cache_seqlens, **options)
        else:
            options |= {"cache_seqlens": cache_seqlens, "return_softmax_lse": True}
            out, lse = flash_attn_with_kvcache(query, *caches, **options)
            out.view(BATCH, out.shape[1], -1)
        return out.transpose(1, 2), lse, *caches

    Oracle(function, call, (), set()).check()


def tensors_of(rows: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.randn(BATCH, n, 4, 16) for n in (rows, LONGEST, LONGEST))


@pytest.mark.parametrize("lengths", [None, 9])
def test_lengths_that_are_one_number_or_the_cache_s(lengths):
    q, k_cache, v_cache = tensors_of()
    given = torch.full((BATCH,), lengths or LONGEST, dtype=torch.int32)
    expected = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=given, causal=True)
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, causal=True), expected)


@pytest.mark.parametrize("layout", ["one of more rows", "one of two", "heads before rows"])
def test_padding_in_caches_of_any_strides(layout):
    """Append behind padding, in place, to caches that are views."""
    q, *_ = tensors_of()
    whole = torch.randn(BATCH, LONGEST + 3, 2, 4, 16)
    caches = whole[:, :LONGEST].unbind(2)
    if layout == "one of more rows":
        caches = tuple(torch.randn(2, BATCH, LONGEST + 5, 4, 16)[:, :, 1:-4])
    elif layout == "heads before rows":
        caches = tuple(cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches)
    k, v, lengths, padding = q + 1, q - 1, torch.tensor([9, 20, 40], dtype=torch.int32), torch.tensor([0, 7, 39]).int()
    copies = tuple(cache.clone() for cache in caches)
    options = {"causal": True, "cache_leftpad": padding}
    expected, _ = naive_with_kvcache(q, *copies, lengths, k, v, window_size=(-1, -1), **options)
    actual = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, **options)
    torch.testing.assert_close(actual, expected)
    assert all(map(torch.equal, caches, copies))


def test_padding_in_caches_that_lie_apart():
    q, k_cache, v_cache = tensors_of()
    padding = torch.zeros(BATCH, dtype=torch.int32)
    apart = torch.randn(BATCH, LONGEST * 4 * 16 + 1)[:, :-1].unflatten(1, (LONGEST, 4, 16))
    longer = torch.randn(BATCH, LONGEST + 1, 4, 16)[:, :LONGEST]
    for caches in ((apart, apart), (k_cache, longer)):
        with pytest.raises(fastlm.UnsupportedError, match="cache_leftpad"):
            flash_attn_with_kvcache(q, *caches, cache_seqlens=9, cache_leftpad=padding)


def test_flash_attn_s_own_errors():
    q, k_cache, v_cache = tensors_of()
    tables, indices = torch.ones(LONGEST, 8), torch.zeros(BATCH, 1, dtype=torch.int32)

    def refused(error: type, message: str, *caches: Tensor, **options) -> None:
        with pytest.raises(error, match=message):
            flash_attn_with_kvcache(q, *(caches or (k_cache, v_cache)), **options)

    refused(AssertionError, "k_cache must have contiguous last dimension", k_cache.mT.contiguous().mT, v_cache)
    refused(AssertionError, "v_cache must have contiguous last dimension", k_cache, v_cache.mT.contiguous().mT)
    refused(RuntimeError, "query and key must have the same dtype", k_cache.half(), v_cache.half())
    refused(RuntimeError, "value must also be passed in", k=q, cache_seqlens=3)
    refused(RuntimeError, "seqlens_k must also be passed in", k=q, v=q)
    refused(RuntimeError, "seqlens_k must have dtype int32", cache_seqlens=torch.full((BATCH,), 3))
    refused(RuntimeError, "new key / value", rotary_cos=tables, rotary_sin=tables)
    refused(RuntimeError, "rotary sin must also be provided", k=q, v=q, cache_seqlens=3, rotary_cos=tables)
    refused(
        AssertionError, "must have x's dtype", k=q, v=q, cache_seqlens=3, rotary_cos=tables.half(), rotary_sin=tables.half()
    )
    refused(RuntimeError, "does not support cache_batch_idx", block_table=indices, cache_batch_idx=indices[:, 0])
    refused(RuntimeError, "Paged KV and leftpad_k", block_table=indices, cache_leftpad=indices[:, 0])
    refused(RuntimeError, "leftpad_k must have dtype int32", cache_leftpad=indices[:, 0].long())
