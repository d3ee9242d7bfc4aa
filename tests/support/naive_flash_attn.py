"""Compute attention in flash_attn's layouts with all scores in memory: an oracle that is written without fastlm."""

import math

import torch
from torch import Tensor


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return out (B, Sq, H, D) and the log-sum-exp (B, H, Sq) of q (B, Sq, H, D) and k, v (B, Sk, Hk, D).

    ``keep`` (B, H, Sq, Sk) says which weights dropout keeps. The softmax is float32 or better.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (tensor.repeat_interleave(group, dim=2) for tensor in (k, v))
    scale = 1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    query, key = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * (query - key).abs()
    left, right = window_size
    hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    if causal or right >= 0:
        hidden |= key > query + (0 if causal else right)
    if left >= 0:
        hidden |= key < query - left
    scores = scores.masked_fill(hidden, -math.inf)
    weights = scores.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    if keep is not None:
        weights = torch.where(keep, weights / (1 - dropout_p), 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v), scores.logsumexp(-1)


def naive_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options
) -> tuple[Tensor, Tensor]:
    """Return out (total_q, H, D) and the log-sum-exp (H, total_q) of packed sequences, one after the other."""
    slopes, results = options.pop("alibi_slopes", None), []
    for b in range(len(cu_seqlens_q) - 1):
        rows, keys = (slice(cu[b], cu[b + 1]) for cu in (cu_seqlens_q, cu_seqlens_k))
        own = slopes[b : b + 1] if slopes is not None and slopes.dim() == 2 else slopes
        results.append(naive_attention(q[None, rows], k[None, keys], v[None, keys], alibi_slopes=own, **options))
    outs, lses = zip(*results)
    return torch.cat(outs, 1)[0], torch.cat(lses, 2)[0]


def naive_rotation(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x (S, H, D) whose row s is turned, pair by pair, as a complex number, by row s of cos and sin (S, pairs)."""
    pairs, x = cos.shape[1], x.clone()
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    turn = torch.complex(cos.double(), sin.double())[:, None]
    turned = torch.complex(x[..., first].double(), x[..., second].double()) * turn
    x[..., first], x[..., second] = turned.real.to(x.dtype), turned.imag.to(x.dtype)
    return x
