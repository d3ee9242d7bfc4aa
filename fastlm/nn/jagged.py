"""torch.nn.functional.scaled_dot_product_attention of jagged tensors, by `fastlm.varlen_attention`."""

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor

from ..ops.attention import has_kernel, varlen_attention
from .why_not import call_why_not


def attend_jagged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor | None, str | None]:
    """Attend within each sequence of jagged tensors (B, H, lengths, D), which are transposes of (B, lengths, H, D).

    Return (the output, laid out like query, None), or (None, why the call is left to torch).
    """
    if reason := _why_not(query, key, value, attn_mask, is_causal, enable_gqa):
        return None, reason
    packed = [tensor.transpose(1, 2).values() for tensor in (query, key, value)]  # (total, H, D)
    if not has_kernel(packed[0], packed[2]):
        return None, f"no kernel takes {query.dtype} on {query.device}"
    bounds = [tensor.offsets().to(torch.int32) for tensor in (query, key)]
    try:
        out = varlen_attention(*packed, *bounds, causal=is_causal, scale=scale, dropout_p=dropout_p)
    except (TypeError, ValueError) as error:
        return None, str(error)
    lengths = {"min_seqlen": query._maybe_min_seqlen, "max_seqlen": query._maybe_max_seqlen}
    return torch.nested.nested_tensor_from_jagged(out, query.offsets(), **lengths).transpose(1, 2), None


def _why_not(query, key, value, attn_mask, is_causal, enable_gqa) -> str | None:
    if any(type(tensor) is not NestedTensor for tensor in (query, key, value)):
        return "jagged tensors and others in one call"
    if reason := call_why_not(()):
        return reason
    if any(t.dim() != 4 or t._ragged_idx != 2 or t.lengths() is not None for t in (query, key, value)):
        return "jagged tensors that are no transposes of (B, lengths, H, D), or have holes"
    if attn_mask is not None:
        return "attn_mask with jagged tensors"
    if key.shape[2] != value.shape[2] or query.shape[0] != key.shape[0] or (is_causal and query.shape[2] != key.shape[2]):
        return "jagged tensors of different lengths"
    if not enable_gqa and not query.shape[1] == key.shape[1] == value.shape[1]:
        return "different numbers of heads without enable_gqa"
    return None
