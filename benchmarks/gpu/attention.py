"""Times attention on a GPU: fastlm's Triton kernels beside torch's attention by each of its backends, FlexAttention and others.

    fastlm bench --only gpu        # a part of `make bench` where torch sees a GPU

Each row is the median of CUDA events around single calls with a cold second-level cache (triton.testing.do_bench). What cannot
run is a row that says why. Each fastlm row was checked against the reference in float32 before it was timed.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm

FASTLM = "fastlm triton"


class Work(NamedTuple):
    """One thing to time. Decoding has one query per sequence and a quarter as many heads of keys."""

    what: str  # "forward", "forward + backward" or "decoding"
    batch: int
    heads: int
    length: int
    head_dim: int
    causal: bool

    def flops(self) -> float:
        """Of the two products, halved where causal; a backward has five."""
        queries = 1 if self.what == "decoding" else self.length
        passes = 3.5 if "backward" in self.what else 1.0
        return 4.0 * self.batch * self.heads * queries * self.length * self.head_dim * passes * (0.5 if self.causal else 1.0)


WORKS = tuple(
    Work(what, 16384 // length, 2048 // head_dim, length, head_dim, causal)
    for what in ("forward", "forward + backward")
    for head_dim in (64, 128)
    for causal in (False, True)
    for length in (1024, 4096, 16384)
) + tuple(Work("decoding", batch, 32, 8192, 128, False) for batch in (1, 16, 64))


# ---- what is timed ----------------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend, query, key, value, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1])


def _fastlm(query, key, value, causal: bool) -> Tensor:
    if query.shape[2] == 1:
        lengths = torch.full((query.shape[0],), key.shape[2], dtype=torch.int32, device=query.device)
        return fastlm.kvcache_attention(query, key, value, lengths, backend="triton")
    return fastlm.attention(query, key, value, causal=causal, backend="triton")


@cache
def _flex(length: int, causal: bool, device: str) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device) if causal else None
    torch._dynamo.reset()  # it keeps a few compilations of a function, and runs it eagerly from there on
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value, causal: compiled(
        query, key, value, block_mask=blocks, enable_gqa=query.shape[1] != key.shape[1]
    )


def _flash_attn(query, key, value, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(t.transpose(1, 2) for t in (query, key, value)), causal=causal).transpose(1, 2)


def _xformers(query, key, value, causal: bool) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if causal else None
    return memory_efficient_attention(*(t.transpose(1, 2) for t in (query, key, value)), attn_bias=bias).transpose(1, 2)


def implementations(work: Work, device: str) -> dict[str, Callable]:
    """fastlm first, then what a user would pick instead."""
    sdpa = {f"SDPA {backend.name.split('_')[0].lower()}": partial(_sdpa, backend) for backend in (
        SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH,
    )}  # fmt: skip
    flex = lambda *args: _flex(work.length, work.causal, device)(*args)  # noqa: E731  (compiled when it is first called)
    return {FASTLM: _fastlm, **sdpa, "FlexAttention": flex, "flash-attn": _flash_attn, "xformers": _xformers}


def inputs(work: Work, dtype: torch.dtype, device: str) -> list[Tensor]:
    """query, key and value."""
    decoding = work.what == "decoding"
    kv_heads = work.heads // 4 if decoding else work.heads
    shapes = [(work.heads, 1 if decoding else work.length), (kv_heads, work.length), (kv_heads, work.length)]
    torch.manual_seed(0)
    tensors = [torch.randn(work.batch, *shape, work.head_dim, device=device, dtype=dtype) for shape in shapes]
    return [t.requires_grad_("backward" in work.what) for t in tensors]


def step_of(function: Callable, tensors: list[Tensor], causal: bool) -> Callable[[], tuple[Tensor, ...]]:
    """The call, and the gradients where inputs ask for them."""

    def step():
        out = function(*tensors, causal)
        return (out, *torch.autograd.grad(out, tensors, out.detach())) if tensors[0].requires_grad else (out,)

    return step


# ---- how --------------------------------------------------------------------------------------------------------------------


def check(work: Work, results: tuple[Tensor, ...], tensors: list[Tensor]) -> float:
    """The largest error over the largest value, against the reference in float32 on the first head; raises if it is wrong."""
    group = tensors[0].shape[1] // tensors[1].shape[1]
    one = [t.detach()[:1, : group if i == 0 else 1].float().requires_grad_(t.requires_grad) for i, t in enumerate(tensors)]
    out = fastlm.attention(*one, causal=work.causal, backend="reference")
    gradient = results[0].detach()[:1, :group].float()
    expected = (out, *torch.autograd.grad(out, one, gradient)) if one[0].requires_grad else (out,)
    error = max(float((a[:1, : e.shape[1]].float() - e).abs().max() / e.abs().max()) for a, e in zip(results, expected))
    if not error < 0.02:
        raise AssertionError(f"{FASTLM}: {work} is wrong by {error:.1%} of the largest value")
    return error


def measure(work: Work, name: str, function: Callable, tensors: list[Tensor], time: Callable) -> dict:
    """A row: the time, the throughput and the peak memory, or why there is none."""
    row = {**work._asdict(), "dtype": str(tensors[0].dtype).removeprefix("torch."), "implementation": name}
    step = step_of(function, tensors, work.causal)
    try:
        results = step()
        if name == FASTLM:
            row["error"] = check(work, results, tensors)
        del results
        milliseconds = time(step)
    except AssertionError:
        raise
    except Exception as error:  # a peer that is missing or does not do this is a row, and the rest goes on
        if name == FASTLM:
            raise
        return {**row, "why_not": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    cache_bytes = sum(t.numel() * t.element_size() for t in tensors[1:])
    rate = (
        {"gb_s": cache_bytes / milliseconds / 1e6}
        if work.what == "decoding"
        else {"tflop_s": work.flops() / milliseconds / 1e9}
    )
    return {**row, "ms": milliseconds, **rate, "peak_mib": peak_mib(step)}


def peak_mib(step: Callable) -> float:
    """What a call takes beyond its inputs."""
    if not torch.cuda.is_available():
        return math.nan
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def cold_median(step: Callable) -> float:
    """Milliseconds of a call."""
    from triton.testing import do_bench

    return do_bench(step, warmup=50, rep=200, return_mode="median")


def run(works=WORKS, dtype=torch.bfloat16, device: str = "cuda", time: Callable = cold_median) -> list[dict]:
    """All rows; implementations of a setting one after the other."""
    rows = []
    for work in works:
        tensors = inputs(work, dtype, device)
        rows += [measure(work, name, function, tensors, time) for name, function in implementations(work, device).items()]
    return rows


HEADER = ("work", "implementation", "ms", "throughput", "peak MiB")


def cells(row: dict) -> tuple[str, ...]:
    """A row as a reader sees it, under HEADER."""
    work = f"{row['what']} B{row['batch']} H{row['heads']} S{row['length']} D{row['head_dim']} {row['dtype']}"
    work += ", causal" if row["causal"] else ""
    if "why_not" in row:
        return work, row["implementation"], "–", row["why_not"], "–"
    rate = f"{row['gb_s']:.0f} GB/s" if "gb_s" in row else f"{row['tflop_s']:.1f} TFLOP/s"
    return work, row["implementation"], f"{row['ms']:.3f}", rate, f"{row['peak_mib']:.0f}"
