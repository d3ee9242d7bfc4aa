"""Test that attention refuses bad input with an error that names the argument, before it touches any memory."""

import math
import re

import pytest
import torch
from support.triton_interpreter import ON_GPU

import fastlm

Q, KV = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8)
BIG = 2**31 - 1


def cu(*offsets):
    return torch.tensor(offsets, dtype=torch.int32)


HEADS = "must have a number of heads that divides query's 4; got 3"
MASK = "mask must broadcast to (2, 4, 5, 6); got shape "

SHARED = [
    ({"query": [1.0]}, TypeError, "query must be a tensor; got list"),
    ({"key": None}, TypeError, "key must be a tensor; got NoneType"),
    ({"query": "int"}, TypeError, "query must be float32, float64, bfloat16 or float16; got torch.int32"),
    ({"value": "sparse"}, TypeError, "value must be a dense tensor; got layout torch.sparse_coo"),
    ({"key": "half"}, TypeError, "key must have query's dtype torch.float32; got torch.float16"),
    ({"value": "meta"}, ValueError, "value must be on query's device cpu; got meta"),
    ({"window": 3}, TypeError, "window must be a pair (left, right); got 3"),
    ({"window": (1, 2, 3)}, TypeError, "window must be a pair (left, right); got (1, 2, 3)"),
    ({"window": (1.5, 0)}, TypeError, "window must hold integers or None; got (1.5, 0)"),
    ({"window": (-1, 0)}, ValueError, "window must not be negative; got (-1, 0)"),
    ({"window": (0, -3)}, ValueError, "window must not be negative; got (0, -3)"),
    ({"causal": 1}, TypeError, "causal must be a bool; got int"),
    ({"scale": "1"}, TypeError, "scale must be a number; got str"),
    ({"scale": math.nan}, ValueError, "scale must be finite; got nan"),
    ({"scale": -math.inf}, ValueError, "scale must be finite; got -inf"),
    ({"softcap": 0.0}, ValueError, "softcap must be positive, or None for no softcap; got 0.0"),
    ({"softcap": -2.0}, ValueError, "softcap must be finite and at least 0; got -2.0"),
    ({"sinks": torch.zeros(3)}, ValueError, "sinks must have shape (4,), one per query head; got (3,)"),
    ({"sinks": torch.zeros(4).int()}, TypeError, "sinks must be float32, float64, bfloat16 or float16"),
    ({"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks must be on query's device cpu; got meta"),
    ({"alibi_slopes": torch.zeros(2)}, ValueError, "alibi_slopes must have shape (4,) or (2, 4); got (2,)"),
    ({"alibi_slopes": torch.zeros(4).long()}, TypeError, "alibi_slopes must be float32, float64, bfloat16 or float16"),
    ({"alibi_slopes": torch.zeros(4, requires_grad=True)}, ValueError, "alibi_slopes get no gradient"),
    ({"backend": "gpu"}, ValueError, "backend (or FASTLM_BACKEND) must be one of"),
    ({"backend": "cuda"}, fastlm.UnsupportedError, "has no kernel for backend 'cuda'"),
]

DROPOUT = [
    ({"dropout_p": 1.5}, ValueError, "dropout_p must lie between 0 and 1; got 1.5"),
    ({"scale": 1e39}, ValueError, "scale must be a number of float32's range; got 1e+39"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be finite and at least 0; got -0.1"),
    ({"dropout_p": math.nan}, ValueError, "dropout_p must be finite and at least 0; got nan"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number; got str"),
    ({"seed": 1.5, "dropout_p": 0.1}, TypeError, "seed must be an int, an int64 tensor or None; got float"),
    ({"seed": torch.zeros(3).long()}, ValueError, "seed must be 0-d or of shape (2,), one per example; got shape (3,)"),
]

BATCHED = [
    ({"query": Q[0]}, ValueError, "query must have 4 dimensions (batch, heads, rows, head_dim); got shape (4, 5, 8)"),
    ({"key": KV[..., :0]}, ValueError, "key must have query's head_dim 8; got shape (2, 2, 6, 0)"),
    ({"query": torch.zeros(())}, ValueError, "query must have 4 dimensions (batch, heads, rows, head_dim); got shape ()"),
    ({"key": KV[..., :7]}, ValueError, "key must have query's head_dim 8; got shape (2, 2, 6, 7)"),
    ({"key": KV[:1], "value": KV[:1]}, ValueError, "key must have query's batch size 2; got shape (1, 2, 6, 8)"),
    ({"value": KV[:, :, :5]}, ValueError, "value must have key's shape (2, 2, 6, any head_dim); got (2, 2, 5, 8)"),
    ({"value": KV[:, :1]}, ValueError, "value must have key's shape (2, 2, 6, any head_dim); got (2, 1, 6, 8)"),
    ({"key": torch.zeros(2, 3, 6, 8), "value": torch.zeros(2, 3, 6, 8)}, ValueError, "key " + HEADS),
    ({"key": torch.zeros(2, 0, 6, 8), "value": torch.zeros(2, 0, 6, 8)}, ValueError, "key must have a number of heads"),
    ({"mask": [[True]]}, TypeError, "mask must be a tensor or None; got list"),
    ({"mask": torch.zeros(5, 6).int()}, TypeError, "mask must be bool (True: attend) or floating (added to the scores)"),
    ({"mask": torch.zeros(5, 5)}, ValueError, MASK + "(5, 5)"),
    ({"mask": torch.zeros(2, 5, 6)}, ValueError, MASK + "(2, 5, 6)"),
    ({"mask": torch.zeros(1, 1, 1, 5, 6)}, ValueError, MASK + "(1, 1, 1, 5, 6)"),
    ({"mask": torch.zeros(5, 0)}, ValueError, MASK + "(5, 0)"),
    ({"mask": torch.zeros(5, 6, device="meta")}, ValueError, "mask must be on query's device cpu; got meta"),
    ({"mask": torch.zeros(5, 6).to_sparse()}, TypeError, "mask must be a dense tensor; got layout torch.sparse_coo"),
]


def spoiled(value, tensor):
    spoils = {"int": tensor.int, "sparse": tensor.to_sparse, "half": tensor.half, "meta": lambda: tensor.to("meta")}
    return spoils[value]() if isinstance(value, str) and value in spoils else value


def refused(function, arguments: dict, wrong: dict, error: type, message: str) -> None:
    wrong = {name: spoiled(value, arguments[name]) if name in arguments else value for name, value in wrong.items()}
    with pytest.raises(error, match=re.escape(message)) as raised:
        function(**{**arguments, **wrong})
    assert raised.type is error


@pytest.mark.parametrize(("wrong", "error", "message"), SHARED + DROPOUT + BATCHED)
def test_attention_refuses_by_name(wrong, error, message):
    refused(fastlm.attention, {"query": Q, "key": KV, "value": KV}, wrong, error, message)


# ---- varlen -----------------------------------------------------------------------------------------------------------------

PACKED = {"query": torch.zeros(9, 4, 8), "key": torch.zeros(7, 2, 8), "value": torch.zeros(7, 2, 8)}
PACKED |= {"cu_seqlens_q": cu(0, 4, 9), "cu_seqlens_k": cu(0, 7, 7)}
VARLEN = [
    ({"query": Q}, ValueError, "query must have 3 dimensions (total, heads, head_dim); got shape (2, 4, 5, 8)"),
    ({"value": torch.zeros(6, 2, 8)}, ValueError, "value must have key's shape (7, 2, any head_dim); got (6, 2, 8)"),
    ({"cu_seqlens_q": [0, 9]}, TypeError, "cu_seqlens_q must be an int32 tensor; got list"),
    ({"cu_seqlens_q": cu(0, 4, 9).long()}, TypeError, "cu_seqlens_q must be int32; got torch.int64"),
    ({"cu_seqlens_q": cu()}, ValueError, "cu_seqlens_q must hold at least the 0 that it starts with"),
    ({"cu_seqlens_q": cu(0, 9)[None]}, ValueError, "cu_seqlens_q must have shape (*,); got (1, 2)"),
    ({"cu_seqlens_k": cu(0, 7)}, ValueError, "cu_seqlens_k must have shape (3,); got (2,)"),
    ({"cu_seqlens_k": cu(0, 7, 7).to("meta")}, ValueError, "cu_seqlens_k must be on query's device cpu; got meta"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must lie between 0 and 2147483647; got -1"),
    ({"max_seqlen_k": 2.0}, TypeError, "max_seqlen_k must be an int; got float"),
]
OFFSETS = [
    ("cu_seqlens_q", cu(1, 4, 9), "cu_seqlens_q must start at 0; got 1"),
    ("cu_seqlens_q", cu(0, 10, 9), "cu_seqlens_q must not fall; got 10, then 9 at 2"),
    ("cu_seqlens_q", cu(0, -4, 9), "cu_seqlens_q must not fall; got 0, then -4 at 1"),
    ("cu_seqlens_q", cu(0, 4, 8), "cu_seqlens_q must end at the number of rows, 9; got 8"),
    ("cu_seqlens_k", cu(0, 4, BIG), f"cu_seqlens_k must end at the number of rows, 7; got {BIG}"),
    ("cu_seqlens_k", cu(-1, 4, 7), "cu_seqlens_k must start at 0; got -1"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), SHARED + DROPOUT + VARLEN)
def test_varlen_attention_refuses_by_name(wrong, error, message):
    refused(fastlm.varlen_attention, PACKED, wrong, error, message)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("name", "offsets", "message"), OFFSETS)
def test_offsets_outside_the_rows_are_refused(name, offsets, message, grad, backend, widest_isa):
    call = {**PACKED, "query": PACKED["query"].clone().requires_grad_(grad)}
    refused(fastlm.varlen_attention, call, {name: offsets, "backend": backend}, ValueError, message)


# ---- decoding ---------------------------------------------------------------------------------------------------------------

CACHED = {"query": torch.zeros(2, 4, 1, 8), "key_cache": torch.zeros(2, 2, 6, 8), "value_cache": torch.zeros(2, 2, 6, 8)}
CACHED |= {"cache_seqlens": cu(3, 6)}
PAGED = {**CACHED, "key_cache": torch.zeros(5, 4, 2, 8), "value_cache": torch.zeros(5, 4, 2, 8)}
PAGED |= {"block_table": cu(0, 1, 2, 3).view(2, 2)}
NEW, THREE = torch.zeros(2, 2, 1, 8), torch.zeros(3, 2, 6, 8)
DECODING = [
    ({"query": Q[0]}, ValueError, "query must have 4 dimensions"),
    (
        {"key_cache": torch.zeros(3, 2, 6, 8), "value_cache": torch.zeros(3, 2, 6, 8)},
        ValueError,
        "key_cache must have query's batch",
    ),
    ({"key_cache": torch.zeros(2, 2, 6, 7)}, ValueError, "key_cache must have query's head_dim 8; got shape (2, 2, 6, 7)"),
    ({"value_cache": torch.zeros(2, 2, 5, 8)}, ValueError, "value_cache must have key_cache's shape (2, 2, 6, any head_dim)"),
    ({"value_cache": torch.zeros(2, 2, 6, 8).half()}, TypeError, "value_cache must have query's dtype torch.float32"),
    ({"key_cache": torch.zeros(2, 3, 6, 8), "value_cache": torch.zeros(2, 3, 6, 8)}, ValueError, "key_cache " + HEADS),
    ({"cache_seqlens": cu(3)}, ValueError, "cache_seqlens must have shape (2,); got (1,)"),
    ({"cache_seqlens": torch.tensor([3, 6])}, TypeError, "cache_seqlens must be int32; got torch.int64"),
    ({"key": NEW}, ValueError, "key and value must be given together; got only key"),
    ({"value": NEW}, ValueError, "key and value must be given together; got only value"),
    (
        {"key": NEW[:1], "value": NEW[:1]},
        ValueError,
        "key must have the caches' batch and heads (2, 2); got shape (1, ",
    ),
    ({"key": NEW, "value": NEW[..., :7]}, ValueError, "value must have value_cache's head_dim 8; got shape (2, 2, 1, 7)"),
    ({"key": NEW.half(), "value": NEW}, TypeError, "key must have query's dtype torch.float32; got torch.float16"),
    ({"sinks": torch.zeros(3)}, ValueError, "sinks must have shape (4,)"),
    ({"window": (-1, 0)}, ValueError, "window must not be negative"),
]
ROWS = "cache_seqlens must lie between 0 and the cache's "
LENGTHS = [
    (CACHED, {"cache_seqlens": cu(3, 7)}, ROWS + "6 rows less the 0 appended; got 7"),
    (
        CACHED,
        {"cache_seqlens": cu(-1, 3)},
        ROWS + "6 rows less the 0 appended; got -1",
    ),
    (
        CACHED,
        {"cache_seqlens": cu(BIG, 3)},
        ROWS + f"6 rows less the 0 appended; got {BIG}",
    ),
    (CACHED, {"key": NEW, "value": NEW}, ROWS + "6 rows less the 1 appended; got 6"),
    (PAGED, {"cache_seqlens": cu(3, 9)}, ROWS + "8 rows less the 0 appended; got 9"),
    (PAGED, {"block_table": cu(0, 1, 2, 5).view(2, 2)}, "block_table must hold pages from 0 to 4; got 5 (sequence 1)"),
    (PAGED, {"block_table": cu(-1, 1, 2, 3).view(2, 2)}, "block_table must hold pages from 0 to 4; got -1 (sequence 0)"),
]


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ([[0]], TypeError, "block_table must be an int32 tensor; got list"),
        (cu(0, 1), ValueError, "block_table must have shape (2, *); got (2,)"),
        (torch.zeros(2, 2), TypeError, "block_table must be int32; got torch.float32"),
    ],
)
def test_a_table_that_is_none_is_refused(table, error, message):
    refused(fastlm.kvcache_attention, PAGED, {"block_table": table}, error, message)


@pytest.mark.parametrize(("wrong", "error", "message"), DECODING)
def test_kvcache_attention_refuses_by_name(wrong, error, message):
    refused(fastlm.kvcache_attention, CACHED, wrong, error, message)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("call", "wrong", "message"), LENGTHS)
def test_lengths_and_pages_outside_the_cache_are_refused_and_nothing_is_appended(call, wrong, message, backend, widest_isa):
    caches = {name: call[name].clone() for name in ("key_cache", "value_cache")}
    refused(fastlm.kvcache_attention, {**call, **caches}, {**wrong, "backend": backend}, ValueError, message)
    assert not any(cache.any() for cache in caches.values())


def test_a_cache_whose_rows_are_not_contiguous_is_refused_as_it_is_written_in_place(widest_isa):
    cache = torch.zeros(2, 2, 8, 6).mT
    with pytest.raises(ValueError, match="key_cache is written in place: its last dimension must be contiguous"):
        fastlm.kvcache_attention(Q[:, :, :1], cache, cache, cu(3, 6), backend="cpu")


# ---- odd but legal input ----------------------------------------------------------------------------------------------------


def test_legal_oddities_are_taken(isa):
    out = fastlm.attention(Q, KV, KV, scale=2, softcap=1, dropout_p=0, window=[BIG, None], backend="cpu")
    assert out.shape == Q.shape and not out.any()
    out = fastlm.attention(Q, KV, KV, window=(2**62, 2**62), seed=torch.tensor([1, 2]), backend="cpu")
    assert out.shape == Q.shape and not out.any()
    out, lse = fastlm.attention(Q, KV, KV, mask=torch.tensor(0.5), scale=0, return_lse=True, backend="cpu")
    torch.testing.assert_close(lse, torch.full((2, 4, 5), math.log(6) + 0.5))
    assert fastlm.kvcache_attention(**{**CACHED, "cache_seqlens": cu(0, 0)}, backend="cpu").shape == (2, 4, 1, 8)


def test_float64_runs_on_the_reference(widest_isa):
    query, key = Q.double(), KV.double()
    assert fastlm.attention(query, key, key).dtype == torch.float64
    why_not_triton = "query has dtype torch.float64; float32, bfloat16 and float16 have kernels"
    assert fastlm.explain(fastlm.attention, query, key, key).why_not == {
        "cpu": "float64 runs on the reference",
        "triton": "the tensors are on cpu" if ON_GPU else why_not_triton,  # Elsewhere the interpreter takes CPU tensors.
    }
    with pytest.raises(fastlm.UnsupportedError, match="float64 runs on the reference"):
        fastlm.attention(query, key, key, backend="cpu")


@pytest.mark.parametrize("function", [fastlm.attention, fastlm.scaled_dot_product_attention])
def test_a_plain_call_is_checked_as_any_other(function, widest_isa):
    """Small calls without options take a path of their own, which must refuse the same."""
    with pytest.raises(TypeError, match="key must have query's dtype"):
        function(KV, KV.half(), KV)
    for wrong in ((Q, KV[:, :1], KV), (KV, KV, KV[:, :, :3]), (KV, KV[..., :7], KV)):
        with pytest.raises(ValueError, match="key|value"):
            function(*wrong)
    with pytest.raises(TypeError, match="causal"):
        function(Q, Q, Q, **{"causal" if function is fastlm.attention else "is_causal": 1})
    with pytest.raises(ValueError, match="scale"):
        function(Q, Q, Q, scale=math.nan)
