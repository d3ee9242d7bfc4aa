"""Compute statistics of attention's weights in plain PyTorch, over the whole Lq x Lk matrix.

With scores s (B, Hq, Lq, Lk), after softcap, slopes and mask, and weights p before dropout, in which a sink has a share:

    entropy_i = -sum_j p_ij log p_ij, with the sink's term,    max_logit_i = max_j s_ij,    key_mass_j = sum_i p_ij

so that cotangents e of the entropy, x of the largest logit and c of the mass give the scores' gradients

    p_ij (c_j - sum_k p_ik c_k - e_i (log p_ij + entropy_i)) + x_i [j is the key that has the largest logit]

and the sink's those with c = 0 and x = 0. Autograd and torch.func differentiate everything here to any order.
"""

import math

import torch
from torch import Tensor

from .attention import attend, positions, scores, sequences, softmax_weights


def attend_with_stats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    places: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what ``attend`` does, entropy (B, Hq, Lq) in nats, max_logit (B, Hq, Lq) and key_mass (B, Hq, Lk).

    A row that sees no key has an entropy of 0, a max_logit of -inf, and no share in the mass.
    """
    packing = cu_seqlens_q, cu_seqlens_k, places
    out, lse = attend(query, key, value, mask, sinks, alibi_slopes, seed, *packing, left, right, scale, softcap, dropout_p)
    stats = []
    for rows, keys, slopes, _, own_places, _ in sequences(query, key, alibi_slopes, seed, *packing):
        q, k = query[:, :, rows], key[:, :, keys]
        s = scores(q, k, mask, slopes, left, right, scale, softcap, positions(q, k, own_places))
        p, _ = softmax_weights(s, sinks)
        stats.append((_entropy(p), _largest(s), p[..., : s.shape[3]].sum(dim=2)))
    entropy, max_logit, key_mass = (torch.cat(parts, dim=2) for parts in zip(*stats))
    return out, lse, entropy, max_logit, key_mass


def _entropy(p: Tensor) -> Tensor:
    """Return the entropy (...) of the weights (..., n). A weight of 0 adds nothing, and its derivative is finite."""
    return 0.0 - (p * torch.log(torch.where(p == 0.0, 1.0, p))).sum(dim=-1)


def _largest(s: Tensor) -> Tensor:
    """Return the largest of (..., n), whose gradient goes to the first that is as large; -inf where there is none."""
    if s.shape[-1] == 0:
        return s.sum(dim=-1) - math.inf
    largest = s.max(dim=-1).values
    return torch.where(largest == -math.inf, -math.inf, largest)  # Nobody gets a gradient of -inf.
