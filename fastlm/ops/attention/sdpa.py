"""Replace torch.nn.functional.scaled_dot_product_attention, with its signature and rules."""

import torch
from torch import Tensor

from ..checks import autocast, check_tensor
from .batched import run
from .call import AttentionCall
from .checks import check_dropout_p, check_groups, check_keys, check_mask, score_options
from .cpu import fast_path


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute what ``torch.nn.functional.scaled_dot_product_attention`` does, as a drop-in for it.

    Args:
        query: (..., Hq, Lq, D). A query of two dimensions is one head.
        key: (..., Hkv, Lk, D); leading dimensions broadcast with query's. Hkv is Hq; with ``enable_gqa`` it divides Hq.
        value: (..., Hkv, Lk, Dv).
        attn_mask: bool (True: attend) or floating (added to the scores), broadcastable to (..., Hq, Lq, Lk).
        dropout_p: the share of weights that are dropped, in [0, 1], by a seed from torch's default generator.
        is_causal: query i sees keys j <= i: aligned at the first query and key, as in torch. Excludes ``attn_mask``.
        scale: multiplies the scores; None means 1 / sqrt(D).
        enable_gqa: query heads may share heads of keys and values.
        backend: as in `fastlm.attention`.

    Returns:
        (..., Hq, Lq, Dv). A query that sees no key gets zeros.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        UnsupportedError: the named ``backend`` cannot run the call.
    """
    if attn_mask is None and dropout_p == 0.0:
        out = fast_path(query, key, value, scale, is_causal, True, enable_gqa, backend)
        if out is not None:
            return out
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have shape (..., rows, head_dim); got {tuple(tensor.shape)}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool; got {type(is_causal).__name__}")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None where is_causal is set: put the causal mask into attn_mask")
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    outer = None
    if not query.dim() == key.dim() == value.dim() == 4 or not query.shape[0] == key.shape[0] == value.shape[0]:
        outer, query, key, value, attn_mask = _as_batches(query, key, value, attn_mask)
    if query.shape[1] != key.shape[1] or key.shape[1] != value.shape[1]:
        query, key, value = _with_heads(query, key, value, enable_gqa)
    check_keys(query, key, value)
    queries, keys = query.shape[2], key.shape[2]
    check_mask(attn_mask, (*query.shape[:3], keys), query.device, "attn_mask")
    right = queries - keys if is_causal else None  # From alignment at the last query and key to alignment at the first.
    scale, _ = score_options(scale, None, query.shape[3])
    dropout_p = check_dropout_p(dropout_p)
    call = AttentionCall(query, key, value, attn_mask, None, None, None, None, None, None, None, right, scale, 0.0, dropout_p)
    out, _, _ = run("scaled_dot_product_attention", call, None, backend)
    return out if outer is None else out.reshape(*outer, *out.shape[2:])


def _as_batches(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple:
    """Return the result's leading shape, and the tensors (batch, heads, rows, dim), with broadcast batches folded into one."""
    heads = query.dim() > 2 or key.dim() > 2 or value.dim() > 2
    query, key, value = (t if t.dim() > 2 else t.unsqueeze(0) for t in (query, key, value))
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ValueError(f"key and value must have leading dimensions that broadcast with query's; got {shapes}") from None
    if isinstance(mask, Tensor) and mask.dim() > 3:
        fits = mask.dim() <= len(batch) + 3 and all(m in (1, n) for m, n in zip(reversed(mask.shape[:-3]), reversed(batch)))
        if not fits:
            raise ValueError(f"attn_mask must broadcast to the leading dimensions {tuple(batch)}; got {tuple(mask.shape)}")
        mask = mask.expand(*batch, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
    query, key, value = (t.expand(*batch, *t.shape[-3:]).reshape(batch.numel(), *t.shape[-3:]) for t in (query, key, value))
    outer = (*batch, max(t.shape[1] for t in (query, key, value))) if heads else ()
    return outer, query, key, value, mask


def _with_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Expand heads that broadcast, or that divide query's. A single head of keys and values needs no expansion."""
    if enable_gqa:
        for name, tensor in (("key", key), ("value", value)):
            check_groups(query.shape[1], tensor.shape[1], name)
        if key.shape[1] == value.shape[1]:
            return query, key, value
        return query, *(t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    heads = [t.shape[1] for t in (query, key, value)]
    most = max(heads)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.shape[1] not in (1, most):
            divides = "; enable_gqa=True lets heads of queries share one of keys" if name != "query" else ""
            raise ValueError(f"{name} must have 1 or {most} heads{divides}; got shape {tuple(tensor.shape)}")
    shared = heads[1] == heads[2] == 1
    return query.expand(-1, most, -1, -1), *((key, value) if shared else (t.expand(-1, most, -1, -1) for t in (key, value)))
