"""Define what a user would write or pick instead of fastlm's functions, by the names that the ops' benchmarks give them.

Each peer takes the keyword arguments of the function that it stands in for, gets ready (compiles, builds a graph, lays its
inputs out as it likes them) and returns the call that is timed. It raises where it is not installed or does not do the call.
"""

import math
import os
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlm.testing import separate_compiler_caches

# With one thread, torch.compile starts no workers that are busy beside what is timed.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
separate_compiler_caches()

Call = Callable[[], Tensor | tuple[Tensor, ...]]


def _as_is(function: Callable) -> Callable[..., Call]:
    """Return a function as a peer that needs no preparation."""
    return lambda **arguments: partial(function, **arguments)


def _compiled(function: Callable) -> Callable[..., Call]:
    """Return the same under torch.compile, for these shapes alone, as in a program that has one."""
    return lambda **arguments: partial(torch.compile(function, dynamic=False), **arguments)


# ---- attention --------------------------------------------------------------------------------------------------------------


def _seen(length: int, window: tuple[int | None, int | None] | None, device: torch.device) -> Tensor:
    """Return what a causal query sees, of a window where there is one: (L, L) bool."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen.triu(-window[0]) if window else seen


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = False, window=None, dropout_p=0.0, seed=None, mask=None
) -> Call:
    mask = _seen(query.shape[2], window, query.device) if window else mask
    options = {"is_causal": causal and mask is None, "enable_gqa": query.shape[1] != key.shape[1], "dropout_p": dropout_p}
    return lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def _sdpa_on(backend: SDPBackend) -> Callable[..., Call]:
    """Return SDPA as a peer that runs on one of its backends or not at all."""

    def ready(**arguments) -> Call:
        call = _sdpa(**arguments)

        def on_backend() -> Tensor:
            with sdpa_kernel(backend):
                return call()

        return on_backend

    return ready


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, dropout_p: float = 0.0) -> Tensor:
    scores = query @ key.mT / math.sqrt(query.shape[3])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return F.dropout(torch.softmax(scores, dim=-1), dropout_p) @ value


def _eager(query, key, value, causal=False, window=None, dropout_p=0.0, seed=None, attend=_softmax_attention) -> Call:
    hidden = ~_seen(query.shape[2], window, query.device) if causal else None
    return lambda: attend(query, key, value, hidden, dropout_p)


def _eager_compiled(**arguments) -> Call:
    return _eager(**arguments, attend=torch.compile(_softmax_attention, dynamic=False))


def _flex_attention(query, key, value, causal: bool = False, window=None, mask=None) -> Call:
    """Compile FlexAttention for one length. A mask hides keys, (B, 1, 1, L). On CPUs it has no backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch, head, row, column):
        return (row >= column) & (row - column <= (window[0] if window else length))

    def unmasked(batch, head, row, column):
        return mask[batch, 0, 0, column]

    length, batch = query.shape[2], None if mask is None else query.shape[0]
    rule = unmasked if mask is not None else seen if causal else None
    blocks = create_block_mask(rule, batch, None, length, length, device=query.device) if rule else None
    compiled = torch.compile(flex_attention, dynamic=False)
    call = partial(compiled, query, key, value, block_mask=blocks, enable_gqa=query.shape[1] != key.shape[1])
    return call if query.is_cuda else torch.no_grad()(call)


def _flash_attn(query, key, value, causal: bool = False, window=None) -> Call:
    """Prepare flash-attn, which takes (B, L, H, D)."""
    from flash_attn import flash_attn_func

    tensors, window = [t.transpose(1, 2) for t in (query, key, value)], window or (-1, -1)
    return lambda: flash_attn_func(*tensors, causal=causal, window_size=window).transpose(1, 2)


def _xformers(query, key, value, causal: bool = False) -> Call:
    """Prepare xformers' attention, which takes (B, L, H, D)."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    tensors, bias = [t.transpose(1, 2) for t in (query, key, value)], LowerTriangularMask() if causal else None
    return lambda: memory_efficient_attention(*tensors, attn_bias=bias).transpose(1, 2)


def _onnx_runtime(query, key, value, causal: bool = False, window=None) -> Call:
    """Prepare ONNX Runtime's fused MultiHeadAttention, which takes (B, L, H * D). Its tensors are bound where they lie."""
    import onnxruntime
    from onnx import TensorProto, helper

    if window or query.dtype != torch.float32:
        raise NotImplementedError(f"MultiHeadAttention on CPUs has no {'window' if window else query.dtype}")
    batch, heads, length, _ = query.shape
    inputs = {n: t.transpose(1, 2).flatten(2).contiguous() for n, t in (("query", query), ("key", key), ("value", value))}
    out = torch.empty_like(inputs["query"])
    described = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, t.shape) for n, t in (inputs | {"out": out}).items()}
    options = {"domain": "com.microsoft", "num_heads": heads, "unidirectional": int(causal)}
    node = helper.make_node("MultiHeadAttention", list(inputs), ["out"], **options)
    graph = helper.make_graph([node], "attention", [described[n] for n in inputs], [described["out"]])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning while others are timed.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, tensor in inputs.items():
        binding.bind_input(name, "cpu", 0, "float32", tuple(tensor.shape), tensor.data_ptr())
    binding.bind_output("out", "cpu", 0, "float32", tuple(out.shape), out.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return out.view(batch, length, heads, -1).transpose(1, 2)

    call.keeps = inputs  # The binding holds addresses alone.
    return call


def _jax(query, key, value, causal: bool = False, window=None) -> Call:
    """Compile jax.nn.dot_product_attention, which takes (B, L, H, D), by XLA."""
    import jax

    query, key, value = (jax.dlpack.from_dlpack(t.transpose(1, 2).contiguous()) for t in (query, key, value))
    options = {"is_causal": causal, "local_window_size": window[0] if window else None}
    attend = jax.jit(partial(jax.nn.dot_product_attention, **options))
    return lambda: torch.from_dlpack(attend(query, key, value).block_until_ready()).transpose(1, 2)


# ---- decoding, and packed sequences -----------------------------------------------------------------------------------------


def _of_cache(peer: Callable[..., Call]) -> Callable[..., Call]:
    """Return a peer of attention as one of decoding with a full cache."""
    return lambda query, key_cache, value_cache, cache_seqlens: peer(query=query, key=key_cache, value=value_cache)


def _eager_of_cache(query, key_cache, value_cache, cache_seqlens) -> Tensor:
    group = query.shape[1] // key_cache.shape[1]
    return _softmax_attention(query, key_cache.repeat_interleave(group, 1), value_cache.repeat_interleave(group, 1), None)


def _sdpa_each(query, key, value, cu_seqlens_q, cu_seqlens_k, causal) -> Tensor:
    """Call SDPA once for each sequence."""
    bounds = cu_seqlens_q.tolist()
    outs = []
    for begin, end in zip(bounds, bounds[1:]):
        one = (t[begin:end].transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        outs.append(F.scaled_dot_product_attention(*one, is_causal=causal).squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def _sdpa_padded(query, key, value, cu_seqlens_q, cu_seqlens_k, causal) -> Tensor:
    """Pad the sequences to the longest, call SDPA once, and unpad. Causal queries do not see the padding behind them."""
    lengths = cu_seqlens_q.diff().long()
    row = torch.arange(int(lengths.max()), device=lengths.device)
    real = row < lengths[:, None]  # (B, L)
    index = (cu_seqlens_q[:-1, None] + row).clamp(max=len(query) - 1)
    padded = (t[index].transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(*padded, is_causal=causal).transpose(1, 2)[real]


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max())


def _flash_attn_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, causal) -> Call:
    from flash_attn import flash_attn_varlen_func

    longest = _longest(cu_seqlens_q), _longest(cu_seqlens_k)
    return lambda: flash_attn_varlen_func(query, key, value, cu_seqlens_q, cu_seqlens_k, *longest, causal=causal)


def _torch_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, causal) -> Call:
    """Prepare torch's own attention over packed sequences, which is flash-attn's."""
    from torch.nn.attention.varlen import varlen_attn

    longest, window = (_longest(cu_seqlens_q), _longest(cu_seqlens_k)), (-1, 0 if causal else -1)
    return lambda: varlen_attn(query, key, value, cu_seqlens_q, cu_seqlens_k, *longest, window_size=window)


def _xformers_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, causal) -> Call:
    """Prepare xformers' attention over packed sequences of causal queries."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    bias = BlockDiagonalCausalMask.from_seqlens(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())
    tensors = [t.unsqueeze(0) for t in (query, key, value)]
    return lambda: memory_efficient_attention(*tensors, attn_bias=bias).squeeze(0)


# ---- the latent -------------------------------------------------------------------------------------------------------------


def eager_latent(mu: Tensor, logvar: Tensor, seed: int | None = None, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return z (B, D) and its KL (B,), as users write it. The noise is ``eps`` or comes from torch, which ignores the seed."""
    std = torch.exp(0.5 * logvar)
    z = mu + std * (torch.randn_like(std) if eps is None else eps)
    # Often wrong: the last term is the variance, exp(logvar). Without the exp, logvar cancels out of the sum, and nothing
    # keeps the posterior's width near the prior's.
    return z, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=-1)


def _randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape)


_GPU_ATTENTION: dict[str, Callable[..., Call]] = {
    "SDPA flash": _sdpa_on(SDPBackend.FLASH_ATTENTION),
    "SDPA efficient": _sdpa_on(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA cudnn": _sdpa_on(SDPBackend.CUDNN_ATTENTION),
    "SDPA math": _sdpa_on(SDPBackend.MATH),
    "flash-attn": _flash_attn,
    "xformers": _xformers,
}

# By the name of a function of fastlm, and by their own.
ATTENTION: dict[str, dict[str, Callable[..., Call]]] = {
    "attention": {
        "SDPA": _sdpa,
        "eager": _eager,
        "eager, compiled": _eager_compiled,
        "FlexAttention": _flex_attention,
        "ONNX Runtime": _onnx_runtime,
        "JAX": _jax,
        **_GPU_ATTENTION,
    },
    "varlen_attention": {
        "SDPA for each": _as_is(_sdpa_each),
        "SDPA padded": _as_is(_sdpa_padded),
        "torch's varlen_attn": _torch_varlen,
        "flash-attn": _flash_attn_varlen,
        "xformers": _xformers_varlen,
    },
    "kvcache_attention": {
        "SDPA": _of_cache(_sdpa),
        "eager": _as_is(_eager_of_cache),
        "FlexAttention": _of_cache(_flex_attention),
        **{name: _of_cache(peer) for name, peer in _GPU_ATTENTION.items()},
    },
}
LATENT = {"reparameterize_with_kl": {"eager": _as_is(eager_latent), "eager, compiled": _compiled(eager_latent)}}
LINEAR = {"linear": {"torch": _as_is(F.linear)}}
NOISE = {"normal": {"torch.randn": _as_is(_randn)}}
