"""Compute attention's weights of chosen queries, and the largest weights of every query, in plain PyTorch."""

import math

import torch
from torch import Tensor

from .attention import positions, scores, with_sinks
from .latent import accumulation_dtype

_CHUNK = 1 << 22  # Scores that are held at a time, if the keys allow.


def weights_of_rows(query, key, lse, rows, mask, sinks, alibi_slopes, left, right, scale, softcap) -> Tensor:
    """Return the weights (B, Hq, n, Lk) of the queries ``rows`` (n,), float32 or better.

    query is (B, Hq, Lq, D), key (B, Hkv, Lk, D), and lse (B, Hq, Lq).
    """
    s = _scores_of_rows(query, key, rows, mask, alibi_slopes, left, right, scale, softcap)
    return torch.exp(_log_weights(s, lse[:, :, rows], sinks))


def top_keys(query, key, lse, mask, sinks, alibi_slopes, left, right, scale, softcap, k) -> tuple[Tensor, Tensor]:
    """Return (indices, weights), both (B, Hq, Lq, k), of the k largest weights of each query, the first of equal keys first.

    Beyond the keys that a query sees, the indices are -1 and the weights 0.
    """
    queries, keys = query.shape[2], key.shape[2]
    step = max(1, _CHUNK // max(1, query.shape[0] * query.shape[1] * keys))
    indices = torch.full((*query.shape[:3], k), -1, dtype=torch.int64, device=query.device)
    weights = torch.zeros(indices.shape, dtype=accumulation_dtype(query.dtype), device=query.device)
    for start in range(0, queries, step) if keys else ():
        rows = torch.arange(start, min(start + step, queries), device=query.device)
        s = _scores_of_rows(query, key, rows, mask, alibi_slopes, left, right, scale, softcap)
        logs = _log_weights(s, lse[:, :, rows], sinks)
        for n in range(min(k, keys)):
            largest, place = s.max(dim=3, keepdim=True)  # torch promises the first of equal ones.
            indices[:, :, rows, n] = torch.where(largest == -math.inf, -1, place).squeeze(3)
            weights[:, :, rows, n] = torch.exp(logs.gather(3, place)).squeeze(3)
            s.scatter_(3, place, -math.inf)
            logs.scatter_(3, place, -math.inf)
    return indices, weights


def _scores_of_rows(query, key, rows, mask, alibi_slopes, left, right, scale, softcap) -> Tensor:
    """Return the scores (B, Hq, n, Lk) of the queries ``rows``, which are not rounded to the query's dtype."""
    dtype = accumulation_dtype(query.dtype)
    if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
        mask = mask.index_select(-2, rows)
    position = positions(query, key, None)[rows]
    return scores(query[:, :, rows].to(dtype), key.to(dtype), mask, alibi_slopes, left, right, scale, softcap, position)


def _log_weights(s: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the logarithms of the weights of scores (B, Hq, n, Lk) with the log-sum-exp lse (B, Hq, n).

    Where the scores sum up to lse, their own sum takes its place, in two parts: beside scores near -1e9, float32 has no room
    for the logarithm of the number of keys, and all weights would be 1. Elsewhere, lse counts keys that are not here.
    """
    if s.shape[3] == 0:
        return s
    lse, every = lse.to(s.dtype).unsqueeze(3), s if sinks is None else with_sinks(s, sinks)
    top = every.detach().amax(dim=3, keepdim=True)
    alive = top != -math.inf
    top = torch.where(alive, top, 0.0)
    log_total = torch.log(torch.where(alive, torch.exp(every - top).sum(dim=3, keepdim=True), 1.0))
    rounding = 4 * torch.finfo(s.dtype).eps * torch.maximum(lse.abs(), torch.ones_like(lse))
    rest = torch.where((lse - top - log_total).abs() <= rounding, log_total, lse - top)
    return torch.where(s == -math.inf, -math.inf, s - top - rest)
