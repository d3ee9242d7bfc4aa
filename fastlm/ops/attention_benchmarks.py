"""What to time of attention, and against what: torch's own attention, FlexAttention compiled, and eager code."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention
from .kvcache_attention import kvcache_attention
from .spec import Benchmark, Workload, seeded_normal
from .varlen_attention import varlen_attention

FP32, BF16, FP16 = _DTYPES = torch.float32, torch.bfloat16, torch.float16
WINDOW = 256


def _work(batch: int, heads: int, q_len: int, k_len: int, head_dim: int, passes: float = 1.0) -> int:
    """Floating-point operations of the two products of the forward; a backward has five, 2.5 times as many."""
    return int(4 * batch * heads * q_len * k_len * head_dim * passes)


# ---- peers ------------------------------------------------------------------------------------------------------------------


def _sdpa(query, key, value, causal=False, mask=None, window=None, **unused) -> Tensor:
    if window is not None:
        mask = _window_mask(query.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal and window is None)


def _eager(query, key, value, causal=False, window=None, **unused) -> Tensor:
    scores = query @ key.mT / math.sqrt(query.shape[3])
    if causal:
        seen = _window_mask(query.shape[2]) if window else torch.ones(scores.shape[2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    return torch.softmax(scores, dim=-1) @ value


@cache
def _window_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril().triu(-WINDOW)


@cache
def _flex(length: int, windowed: bool, dtype: torch.dtype):
    """FlexAttention compiled for one length, as a program that uses it would have it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch, head, query, key):
        return (query >= key) & (query - key <= WINDOW)

    torch.compiler.reset()  # past so many compilations of one function, dynamo gives up compiling it
    blocks = create_block_mask(seen, None, None, length, length, device="cpu") if windowed else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, block_mask=blocks)


def _flex_attention(query, key, value, causal=False, window=None, **unused) -> Tensor:
    with torch.no_grad():
        return _flex(query.shape[2], window is not None, query.dtype)(query, key, value)


def _sdpa_of_cache(query, key_cache, value_cache, cache_seqlens) -> Tensor:
    return F.scaled_dot_product_attention(query, key_cache, value_cache, enable_gqa=True)


def _eager_of_cache(query, key_cache, value_cache, cache_seqlens) -> Tensor:
    group = query.shape[1] // key_cache.shape[1]
    return _eager(query, key_cache.repeat_interleave(group, 1), value_cache.repeat_interleave(group, 1))


def _sdpa_each(query, key, value, cu_seqlens_q, cu_seqlens_k, causal) -> Tensor:
    """A call for each sequence."""
    bounds = cu_seqlens_q.tolist()
    outs = []
    for begin, end in zip(bounds, bounds[1:]):
        one = (t[begin:end].transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        outs.append(F.scaled_dot_product_attention(*one, is_causal=causal).squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def _sdpa_padded(query, key, value, cu_seqlens_q, cu_seqlens_k, causal) -> Tensor:
    """One call on sequences padded to the longest, and back. Causal: no query sees what was padded behind it."""
    lengths = cu_seqlens_q.diff().long()
    row = torch.arange(int(lengths.max()))
    real = row < lengths[:, None]  # (B, L)
    index = (cu_seqlens_q[:-1, None] + row).clamp(max=len(query) - 1)
    padded = (t[index].transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(*padded, is_causal=causal).transpose(1, 2)[real]


# ---- workloads --------------------------------------------------------------------------------------------------------------


def _square(
    batch: int, heads: int, length: int, head_dim=64, quick=(FP32, BF16), passes=1.0, memory=False, work=None, **options
):
    """Queries and keys of one length."""
    shape = (batch, heads, length, head_dim)
    numbers = 4 * math.prod(shape) if passes == 1.0 else 12 * math.prod(shape)  # q, k, v, out; with gradients, those and all
    return Workload(
        f"B{batch} H{heads} S{length}",
        lambda dtype: {n: seeded_normal(i, shape, dtype) for i, n in enumerate(("query", "key", "value"))} | options,
        size=length,
        work=work or int(_work(batch, heads, length, length, head_dim, passes) * (0.5 if options.get("causal") else 1.0)),
        numbers=numbers,
        quick=quick,
        memory=memory,
    )


_PEERS = {"SDPA": _sdpa, "eager": _eager}
_WITH_FLEX = {**_PEERS, "FlexAttention": _flex_attention}
_QKV = ("query", "key", "value")


def _section(name: str, workloads: tuple, peers=_PEERS, function=attention, unit="GFLOP/s", axis="sequence length", **more):
    return Benchmark(name, function, unit, axis, _DTYPES, ("cpu",), workloads, peers, slow_in_half=("eager",), **more)


def _decoding(batch: int, length: int, quick=(FP32, BF16, FP16)) -> Workload:
    """A step of 32 query heads over 8 heads of keys."""
    heads, kv_heads, head_dim = 32, 8, 128

    def make(dtype) -> dict:
        caches = {n: seeded_normal(i, (batch, kv_heads, length, head_dim), dtype) for i, n in enumerate(("key", "value"))}
        return {
            "query": seeded_normal(2, (batch, heads, 1, head_dim), dtype),
            **{f"{name}_cache": cache for name, cache in caches.items()},
            "cache_seqlens": torch.full((batch,), length, dtype=torch.int32),
        }

    cached = 2 * batch * kv_heads * length * head_dim
    return Workload(f"B{batch}, {length} cached", make, size=batch * length, work=cached, numbers=cached, quick=quick)


def _ragged(sequences: int, longest: int, quick=(FP32, BF16)) -> Workload:
    """Sequences of lengths that are spread evenly, packed."""
    lengths = [max(1, longest * (i + 1) // sequences) for i in range(sequences)]
    total, heads, head_dim = sum(lengths), 8, 64

    def make(dtype) -> dict:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        tensors = {n: seeded_normal(i, (total, heads, head_dim), dtype) for i, n in enumerate(_QKV)}
        return {**tensors, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "causal": True}

    work = sum(_work(1, heads, n, n, head_dim, 0.5) for n in lengths)
    numbers = 4 * total * heads * head_dim
    return Workload(f"{sequences} of up to {longest}", make, size=longest, work=work, numbers=numbers, quick=quick)


_HALF = (FP32, BF16, FP16)

BENCHMARKS = (
    _section(
        "attention, forward",
        (
            _square(16, 8, 128),
            _square(4, 8, 512, quick=_HALF),
            _square(1, 8, 2048, quick=_HALF),
            _square(1, 1, 8192, quick=(FP32,), memory=True),
            _square(1, 1, 16384, quick=()),
        ),
        _WITH_FLEX,
    ),
    _section("attention, forward, head_dim 128", (_square(4, 8, 512, 128), _square(1, 4, 2048, 128))),
    _section(
        "attention, forward, causal",
        tuple(_square(*sizes, causal=True) for sizes in ((16, 8, 128), (4, 8, 512), (1, 8, 2048))),
    ),
    _section(
        f"attention, forward, window {WINDOW}",
        (_square(1, 4, 4096, causal=True, window=(WINDOW, 0), work=_work(1, 4, 4096, WINDOW, 64)),),
        {"SDPA": _sdpa, "FlexAttention": _flex_attention},
    ),
    _section(
        "attention, forward + backward",
        (
            _square(4, 4, 128, passes=3.5),
            _square(1, 8, 512, passes=3.5, quick=_HALF),
            _square(1, 2, 2048, passes=3.5, memory=True),
            _square(1, 1, 8192, passes=3.5, quick=()),
        ),
        differentiable=_QKV,
    ),
    _section(
        "attention, forward + backward, causal",
        (_square(1, 8, 512, passes=3.5, causal=True), _square(1, 2, 2048, passes=3.5, causal=True)),
        differentiable=_QKV,
    ),
    _section("attention, a tiny call", (_square(1, 1, 16, 16, quick=(FP32,)),), {"SDPA": _sdpa}),
    _section(
        "varlen_attention, causal",
        (_ragged(16, 256), _ragged(8, 1024)),
        {"SDPA for each": _sdpa_each, "SDPA padded": _sdpa_padded},
        varlen_attention,
    ),
    _section(
        "kvcache_attention, decoding",
        (_decoding(1, 1024), _decoding(1, 4096), _decoding(4, 4096)),
        {"SDPA": _sdpa_of_cache, "eager": _eager_of_cache},
        kvcache_attention,
        unit="GB/s",
        axis="cached rows",
    ),
)
