"""List what to time of attention, and against what: torch's own attention, FlexAttention, eager code and other libraries."""

import math
from dataclasses import replace
from functools import partial

import torch

from fastlm import attention, kvcache_attention, varlen_attention
from fastlm.testing import seeded_normal
from workloads import attention_stats, derivatives, peers
from workloads.workload import ON_GPU, Benchmark, Workload

FP32, BF16, FP16 = _DTYPES = torch.float32, torch.bfloat16, torch.float16
_HALF = (FP32, BF16, FP16)
PEERS = peers.ATTENTION | derivatives.PEERS | attention_stats.PEERS  # what the sections name as their peers
WINDOW = 256
BACKWARD = 3.5  # A forward and backward has seven products, over the forward's two.
JVP = 3.0  # A forward with tangents has six.
PENALTY = 11.5  # Forward, backward, and its backward, which has six products of tangents and ten of gradients.
LONGEST_EAGER = 8192  # Beyond this length, the scores of eager code fill a machine's memory.


def _work(batch: int, heads: int, q_len: int, k_len: int, head_dim: int, passes: float = 1.0) -> int:
    """Count the floating-point operations of the forward's two products, ``passes`` times."""
    return int(4 * batch * heads * q_len * k_len * head_dim * passes)


# ---- workloads --------------------------------------------------------------------------------------------------------------


def _square(
    batch: int,
    heads: int,
    length: int,
    head_dim: int = 64,
    *,
    passes: float = 1.0,
    work: int | None = None,
    size: int | None = None,
    name: str | None = None,
    options: dict | None = None,
    **more,
) -> Workload:
    """Return a workload with queries and keys of one length. ``options`` go to the call, ``more`` to the workload."""
    options = options or {}
    shape = (batch, heads, length, head_dim)
    # The forward moves q, k, v and out. With gradients, those move again, and so do all four gradients.
    numbers = 4 * math.prod(shape) if passes == 1.0 else 12 * math.prod(shape)
    half = 0.5 if options.get("causal") else 1.0
    return Workload(
        name or f"B{batch} H{heads} S{length}",
        lambda dtype: {n: seeded_normal(i, shape, dtype) for i, n in enumerate(_QKV)} | options,
        size=size or length,
        work=work or int(_work(batch, heads, length, length, head_dim, passes) * half),
        numbers=numbers,
        without=(*_EAGER, "JAX") if length > LONGEST_EAGER else (),
        **more,
    )


def _windowed(batch: int, heads: int, length: int, head_dim: int = 64, **more) -> Workload:
    options = {"causal": True, "window": (WINDOW, 0)}
    work = _work(batch, heads, length, min(WINDOW, length), head_dim)
    return _square(batch, heads, length, head_dim, work=work, options=options, **more)


def _gpu_square(head_dim: int, length: int, **more) -> Workload:
    """Return a workload of sixteen thousand tokens of a model of width 2048."""
    return _square(16384 // length, 2048 // head_dim, length, head_dim, quick=(BF16,), memory=length == 4096, **more)


def _padded(batch: int, heads: int, length: int, head_dim: int, **more) -> Workload:
    """Return a batch whose sequences end at lengths that are spread evenly; a bool mask (B, 1, 1, L) hides their padding."""
    lengths = torch.tensor([max(1, length * (i + 1) // batch) for i in range(batch)])
    mask = (torch.arange(length) < lengths[:, None])[:, None, None]
    work = sum(_work(1, heads, length, n, head_dim) for n in lengths.tolist())
    return _square(batch, heads, length, head_dim, work=work, options={"mask": mask}, **more)


def _grouped(batch: int, heads: int, length: int, head_dim: int, **more) -> Workload:
    """Return a prompt of a model with four query heads (fewer, where ``heads`` is odd) for each head of keys."""
    square = _square(batch, heads, length, head_dim, options=_CAUSAL, **more)
    kv_heads = heads // math.gcd(heads, 4)

    def make(dtype) -> dict:
        call = square.make(dtype)
        return call | {name: call[name][:, :kv_heads].contiguous() for name in ("key", "value")}

    return replace(square, make=make)


def _decoding(batch: int, length: int, quick=_HALF, memory: bool = False) -> Workload:
    """Return a step of decoding, with 32 query heads over 8 heads of keys."""
    heads, kv_heads, head_dim = 32, 8, 128

    def make(dtype) -> dict:
        caches = {n: seeded_normal(i, (batch, kv_heads, length, head_dim), dtype) for i, n in enumerate(("key", "value"))}
        return {
            "query": seeded_normal(2, (batch, heads, 1, head_dim), dtype),
            **{f"{name}_cache": cache for name, cache in caches.items()},
            "cache_seqlens": torch.full((batch,), length, dtype=torch.int32),
        }

    cached = 2 * batch * kv_heads * length * head_dim
    name = f"B{batch}, {length} cached"
    return Workload(name, make, size=batch * length, work=cached, numbers=cached, quick=quick, memory=memory)


def _ragged(sequences: int, longest: int, quick=(FP32, BF16), heads: int = 8, head_dim: int = 64, passes=1.0) -> Workload:
    """Return a workload of packed sequences, whose lengths are spread evenly."""
    lengths = [max(1, longest * (i + 1) // sequences) for i in range(sequences)]
    total = sum(lengths)

    def make(dtype) -> dict:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        tensors = {n: seeded_normal(i, (total, heads, head_dim), dtype) for i, n in enumerate(_QKV)}
        return {**tensors, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "causal": True}

    work = sum(_work(1, heads, n, n, head_dim, 0.5 * passes) for n in lengths)
    numbers = (4 if passes == 1.0 else 12) * total * heads * head_dim
    return Workload(f"{sequences} of up to {longest}", make, size=longest, work=work, numbers=numbers, quick=quick)


def _with(passes: float, extra: tuple[str, ...], *sizes: int, **more) -> Workload:
    """Return a square workload with more tensors of the query's shape."""
    square = _square(*sizes, passes=passes, **more)

    def make(dtype) -> dict:
        call = square.make(dtype)
        return call | {name: seeded_normal(5 + i, tuple(call["query"].shape), dtype) for i, name in enumerate(extra)}

    return replace(square, make=make)


def _on_threads(threads: int) -> Workload:
    return _square(1, 4, 2048, name=f"{threads} threads", size=threads, threads=threads)


def _doubling(most: int) -> list[int]:
    """Return 1, 2, 4, ... and ``most`` as the last one."""
    return [*(1 << i for i in range((most - 1).bit_length())), most]


# ---- sections ---------------------------------------------------------------------------------------------------------------

_QKV = ("query", "key", "value")
_EAGER = ("eager", "eager, compiled")
_GPU_PEERS = ("SDPA", "SDPA flash", "SDPA efficient", "SDPA cudnn", "SDPA math", "FlexAttention", "flash-attn", "xformers")
_STATS_PEERS = ("eager", "output_attentions")
_ON_GPU = {"device": "cuda", "backends": ("triton",), "dtypes": (BF16,)}
_VARLEN_PEERS = ("SDPA for each", "SDPA padded", "torch's varlen_attn", "flash-attn", "xformers")
_SLOW_TO_COMPILE = ("FlexAttention", "ONNX Runtime", "JAX")
_CAUSAL = {"causal": True}
_both = partial(_square, passes=BACKWARD)
_causal = partial(_square, options=_CAUSAL)
_with_tangents = partial(_with, JVP, ("query_tangent", "key_tangent", "value_tangent"))
_penalized = partial(_with, PENALTY, ("grad_out",))
_dropping = partial(_both, options={"dropout_p": 0.1, "seed": 0})


def _section(name, workloads, peers=("SDPA", "eager"), sized=_square, **more) -> Benchmark:
    common = {"function": attention, "unit": "GFLOP/s", "axis": "sequence length", "sizes": "BxHxSxD", "slow_in_half": _EAGER}
    common |= {"dtypes": _DTYPES, "backends": ("cpu",)}
    return Benchmark(name=name, workloads=tuple(workloads), peers=peers, sized=sized, **common | more)


def _gpu_varlen(backward: bool) -> Benchmark:
    sized = partial(_ragged, quick=(BF16,), heads=16, head_dim=128, passes=BACKWARD if backward else 1.0)
    return _section(
        f"{ON_GPU}varlen_attention, causal{', forward + backward' * backward}",
        (sized(32, 1024), sized(8, 4096)),
        _VARLEN_PEERS,
        sized=sized,
        sizes="sequences x longest",
        function=varlen_attention,
        differentiable=_QKV if backward else (),
        tiny="3x20",
        **_ON_GPU,
    )


def _gpu_decoding(graph: bool) -> Benchmark:
    """Return a section of decoding, as it is called or from a CUDA graph, where the host has nothing to do."""
    return _section(
        f"{ON_GPU}kvcache_attention, decoding{', CUDA graph' * graph}",
        (_decoding(batch, 8192, (BF16,), memory=batch == 16 and not graph) for batch in (1, 16, 64)),
        _GPU_PEERS,
        sized=partial(_decoding, quick=(BF16,)),
        sizes="B x cached rows",
        function=kvcache_attention,
        unit="GB/s",
        axis="cached rows",
        graph=graph,
        tiny="1x40",
        **_ON_GPU,
    )


def _gpu_section(head_dim: int, causal: bool, backward: bool) -> Benchmark:
    more = {"options": _CAUSAL if causal else {}, "passes": BACKWARD if backward else 1.0}
    name = f"{ON_GPU}attention, forward{' + backward' * backward}, head_dim {head_dim}{', causal' * causal}"
    return _section(
        name,
        (_gpu_square(head_dim, length, **more) for length in (1024, 4096, 16384)),
        _GPU_PEERS,
        sized=partial(_square, quick=(BF16,), **more),
        differentiable=_QKV if backward else (),
        **_ON_GPU,
    )


BENCHMARKS = (
    _section(
        "attention, forward",
        (
            _square(16, 8, 128, quick=(FP32, BF16)),
            _square(4, 8, 512, quick=_HALF),
            _square(1, 8, 2048, quick=_HALF),
            _square(1, 1, 8192, memory=True),
            _square(1, 1, 16384, quick=()),
        ),
        ("SDPA", *_EAGER, *_SLOW_TO_COMPILE),
        slow_in_half=_EAGER + _SLOW_TO_COMPILE,
    ),
    _section(
        "attention, forward, head_dim 128",
        (_square(4, 8, 512, 128, quick=(FP32, BF16)), _square(1, 4, 2048, 128, quick=(FP32, BF16))),
    ),
    _section(
        "attention, forward, causal",
        (_causal(*sizes, quick=(FP32, BF16)) for sizes in ((16, 8, 128), (4, 8, 512), (1, 8, 2048))),
        sized=_causal,
    ),
    _section(
        f"attention, forward, window {WINDOW}",
        (_windowed(1, 4, 4096, quick=(FP32, BF16)),),
        ("SDPA", "FlexAttention"),
        sized=_windowed,
    ),
    _section(
        "attention, forward + backward",
        (
            _both(4, 4, 128, quick=(FP32, BF16)),
            _both(1, 8, 512, quick=_HALF),
            _both(1, 2, 2048, quick=(FP32, BF16), memory=True),
            _both(1, 1, 8192, quick=()),
        ),
        sized=_both,
        differentiable=_QKV,
    ),
    _section(
        "attention, forward + backward, causal",
        (_both(1, 8, 512, options=_CAUSAL, quick=(FP32, BF16)), _both(1, 2, 2048, options=_CAUSAL, quick=(FP32, BF16))),
        sized=partial(_both, options=_CAUSAL),
        differentiable=_QKV,
    ),
    _section(
        "attention, forward + backward, dropout 0.1",
        (_dropping(1, 8, 512, quick=(FP32, BF16)), _dropping(1, 2, 2048, quick=(FP32, BF16), memory=True)),
        sized=_dropping,
        differentiable=_QKV,
        own_noise=True,
    ),
    _section(
        "attention, forward mode (jvp)",
        (_with_tangents(1, 8, 512, quick=(FP32, BF16)), _with_tangents(1, 2, 2048, memory=True)),
        ("SDPA math", "eager", "JAX"),
        sized=_with_tangents,
        function=derivatives.attention_jvp,
        slow_in_half=("eager", "JAX"),
        checked_whole=True,
    ),
    _section(
        "attention, gradient penalty (double backward)",
        (_penalized(1, 8, 512, quick=(FP32, BF16)), _penalized(1, 2, 2048, memory=True)),
        ("SDPA math", "eager"),
        sized=_penalized,
        function=derivatives.attention_gradient_penalty,
        checked_whole=True,
    ),
    _section(
        "attention with entropy and largest logit",
        (
            _square(1, 8, 512, quick=(FP32, BF16)),
            _square(1, 8, 2048, quick=(FP32, BF16)),
            _square(1, 1, 8192, quick=(), memory=True),
        ),
        _STATS_PEERS,
        function=attention_stats.attention_with_row_stats,
        slow_in_half=(),
    ),
    _section(
        "attention with key mass",
        (
            _square(1, 8, 512, quick=(FP32, BF16)),
            _square(1, 8, 2048, quick=(FP32, BF16)),
            _square(1, 1, 8192, quick=(), memory=True),
        ),
        _STATS_PEERS,
        function=attention_stats.attention_with_key_mass,
        slow_in_half=(),
        checked_whole=True,
    ),
    _section(
        "attention with entropy, forward + backward",
        (_both(1, 8, 512, quick=(FP32, BF16)), _both(1, 2, 2048, quick=(FP32, BF16), memory=True)),
        _STATS_PEERS,
        function=attention_stats.attention_with_entropy,
        differentiable=_QKV,
        slow_in_half=(),
    ),
    _section("attention, a tiny call", (_square(1, 1, 16, 16),), ("SDPA",)),
    _section(
        "varlen_attention, causal",
        (_ragged(16, 256), _ragged(8, 1024)),
        ("SDPA for each", "SDPA padded"),
        sized=_ragged,
        sizes="sequences x longest",
        function=varlen_attention,
    ),
    _section(
        "kvcache_attention, decoding",
        (_decoding(1, 1024), _decoding(1, 4096), _decoding(4, 4096)),
        sized=_decoding,
        sizes="B x cached rows",
        function=kvcache_attention,
        unit="GB/s",
        axis="cached rows",
    ),
    *(
        _gpu_section(head_dim, causal, backward)
        for backward in (False, True)
        for head_dim in (64, 128)
        for causal in (False, True)
    ),
    _section(
        f"{ON_GPU}attention, forward, window {WINDOW}",
        (_windowed(16384 // length, 16, length, 128, quick=(BF16,)) for length in (4096, 16384)),
        ("SDPA", "FlexAttention", "flash-attn"),
        sized=partial(_windowed, quick=(BF16,)),
        **_ON_GPU,
    ),
    _section(
        f"{ON_GPU}attention, forward, padding mask",
        (_padded(16384 // length, 16, length, 128, quick=(BF16,)) for length in (1024, 4096)),
        ("SDPA", "SDPA efficient", "SDPA cudnn", "SDPA math", "FlexAttention"),
        sized=partial(_padded, quick=(BF16,)),
        **_ON_GPU,
    ),
    _section(
        f"{ON_GPU}attention, forward, grouped prefill",
        (_grouped(16384 // length, 32, length, 128, quick=(BF16,)) for length in (1024, 4096, 16384)),
        _GPU_PEERS,
        sized=partial(_grouped, quick=(BF16,)),
        **_ON_GPU,
    ),
    *(_gpu_varlen(backward) for backward in (False, True)),
    *(_gpu_decoding(graph) for graph in (False, True)),
    _section(
        "growth of attention with the sequence",
        (_square(1, 1, length, memory=True) for length in (128, 512, 2048, 8192, 32768)),
        growth=True,
    ),
    _section(
        "growth of attention with the heads",
        (_square(1, heads, 512, size=heads) for heads in (1, 2, 4, 8, 16)),
        axis="heads",
        growth=True,
    ),
    _section(
        "growth of attention with the batch",
        (_square(batch, 4, 256, size=batch) for batch in (1, 2, 4, 8, 16)),
        axis="batch",
        growth=True,
    ),
    _section(
        "growth of attention with the threads",
        map(_on_threads, _doubling(torch.get_num_threads())),
        axis="threads",
        sized=_on_threads,
        sizes="threads",
        growth=True,
    ),
)
