"""xformers' attention functions, by its layouts: (B, M, H, K), (B, M, K) of one head, (B, M, G, H, K) of G groups of heads."""

import torch
from torch import Tensor

from ...ops.attention import attention
from ...ops.attention.batched import batched_call, run
from ...ops.attention.call import Place
from ...ops.attention.checks import check_mask
from ...ops.attention.varlen import varlen_call
from . import attn_bias as attn_bias
from .attn_bias import ALL, AttentionBias, Band, BlockDiagonalMask, LowerTriangularMask, _Blocks

__all__ = [
    "AttentionBias",
    "BlockDiagonalMask",
    "LowerTriangularMask",
    "attn_bias",
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
]


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute attention as ``xformers.ops.memory_efficient_attention`` does.

    Args:
        query: (B, Mq, H, K), (B, Mq, K) or (B, Mq, G, H, K); float32, bfloat16, float16, or float64 on the reference.
        key: (B, Mk, H, K), (B, Mk, K) or (B, Mk, G, H, K). Heads that are expanded, as xformers wants them for grouped queries,
            are read once; in four dimensions there may be fewer heads than query's.
        value: as key, with Kv in place of K.
        attn_bias: a mask of `attn_bias`, or a floating tensor that is added to the scores, broadcastable to (B, H, Mq, Mk),
            (B, Mq, Mk) or (B, G, H, Mq, Mk), and gets a gradient.
        p: the probability to drop a weight, by a seed from torch's default generator.
        scale: multiplies the scores; None means 1 / sqrt(K).
        op: xformers' kernels by name; must be None, as fastlm chooses its own.
        output_dtype: the output's dtype; query's by default.

    Returns:
        The output, of query's shape with Kv in place of K. A query that sees no key gets zeros.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        NotImplementedError: an ``op`` is given.
    """
    out, _ = _attend(query, key, value, attn_bias, p, scale, op, output_dtype, want_lse=False)
    return out


@torch.no_grad()
def memory_efficient_attention_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """Compute `memory_efficient_attention` without a gradient."""
    return memory_efficient_attention(query, key, value, attn_bias, p, scale, op=op, output_dtype=output_dtype)


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
) -> tuple[Tensor, Tensor]:
    """Return (out, lse), with lse float32 (B, H, Mq), or (B, G, H, Mq) for five dimensions; (1, H, total_q) with blocks."""
    return _attend(query, key, value, attn_bias, p, scale, op, output_dtype, want_lse=True)


def _attend(query, key, value, bias, p, scale, op, output_dtype, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Return (out, lse) in xformers' layouts, or (out, None)."""
    if op is not None:
        raise NotImplementedError(f"op must be None, because fastlm chooses its own kernels; got {op!r}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must lie in [0, 1]; got {p!r}")
    layout = query.dim()
    if not (key.dim() == value.dim() == layout and layout in (3, 4, 5)):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"query, key and value must all have shape (B, M, H, K), (B, M, K) or (B, M, G, H, K); got {shapes}")
    mask, bias = (None, None) if bias is None else _mask_and_bias(bias, layout)
    key, value = _heads_once(key, value)
    if isinstance(mask, _Blocks):
        out, lse = _attend_blocks(query, key, value, mask, scale, p)
    else:
        rows = _by_heads(query, key, value, layout)
        out, lse = _attend_band(*rows, bias, ALL if mask is None else mask.band, scale, p, want_lse)
    out = out.transpose(1, 2)
    if layout == 3:
        out = out.squeeze(2)
    elif layout == 5:
        out, lse = out.unflatten(2, query.shape[2:4]), None if lse is None else lse.unflatten(1, query.shape[2:4])
    return out if output_dtype is None else out.to(output_dtype), lse


def _mask_and_bias(given: Tensor | AttentionBias, layout: int) -> tuple[AttentionBias | None, Tensor | None]:
    """Return the mask, and the tensor (B, H, Mq, Mk) that is added to the scores; each may be None."""
    mask, bias = (given, given._bias) if isinstance(given, AttentionBias) else (None, given)
    if bias is not None and not (isinstance(bias, Tensor) and bias.is_floating_point()):
        what = f"a tensor of {bias.dtype}" if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"attn_bias must be a floating tensor or one of the masks of attn_bias; got {what}")
    if bias is not None and bias.dim() == layout != 4:
        bias = bias.unsqueeze(1) if layout == 3 else bias.flatten(1, 2)
    return mask, bias


def _by_heads(query: Tensor, key: Tensor, value: Tensor, layout: int) -> tuple[Tensor, ...]:
    """Return views (B, H, M, K) of one of xformers' layouts."""
    if layout == 4:
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if layout == 3:
        return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    return tuple(tensor.flatten(2, 3).transpose(1, 2) for tensor in (query, key, value))


def _packed(tensor: Tensor) -> Tensor:
    """Return (M, H, K) of one of xformers' layouts, of a batch of one."""
    layout, packed = tensor.dim(), tensor.squeeze(0)
    if layout == 4:
        return packed
    return packed.unsqueeze(1) if layout == 3 else packed.flatten(1, 2)


def _heads_once(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values with one head of a group, if all heads of a group are the same memory, as `expand` makes them."""
    heads = key.dim() - 2
    if heads > 1 and key.stride(heads) == 0 and value.stride(heads) == 0:
        return key.narrow(heads, 0, 1), value.narrow(heads, 0, 1)
    return key, value


def _attend_band(query, key, value, bias, band: Band, scale, p: float, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Attend within a band around the diagonal of all queries and keys."""
    left, right, top_left = band
    if bias is None and (not top_left or query.shape[2] == key.shape[2]):
        window = None if left is None and not right else (left, right)
        causal = right == 0
        out = attention(query, key, value, causal=causal, window=window, scale=scale, dropout_p=p, return_lse=want_lse)
        return out if want_lse else (out, None)
    queries, keys = query.shape[2], key.shape[2]
    call = batched_call(query, key, value, bias, False, None, scale, None, None, None, p)
    check_mask(call.mask, (*call.query.shape[:3], keys), query.device, "attn_bias")
    if top_left:
        right += queries - keys  # from alignment at the last query and key to alignment at the first
    return run("attention", call._replace(left=left, right=right), None, None)[:2]


def _attend_blocks(query, key, value, mask: _Blocks, scale, p: float) -> tuple[Tensor, Tensor]:
    """Attend within sequences that lie one after the other, each in its band."""
    if not query.shape[0] == key.shape[0] == value.shape[0] == 1:
        batches = query.shape[0], key.shape[0], value.shape[0]
        raise ValueError(f"query, key and value must be batches of one where attn_bias has blocks; got batches of {batches}")
    call = varlen_call(*map(_packed, (query, key, value)), *mask.offsets(), False, None, scale, None, None, None, p)
    left, right, top_left = mask.band
    moved = top_left and mask.q_seqinfo is not mask.k_seqinfo
    places = _at_first_keys(call.cu_seqlens_q, call.query.shape[1]) if moved else None
    return run("varlen_attention", call._replace(left=left, right=right, places=places), None, None)[:2]


def _at_first_keys(cu_seqlens: Tensor, heads: int) -> Tensor:
    """Return the places (sequences, 4) of sequences whose first query stands at their first key (`Place` in call.py)."""
    places = torch.zeros(len(cu_seqlens) - 1, len(Place._fields), dtype=torch.int64, device=cu_seqlens.device)
    places[:, Place._fields.index("stream")] = torch.arange(len(places), device=places.device) * heads
    return places
