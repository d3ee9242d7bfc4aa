"""Spell out attention's forward-mode derivative (JVP) and the backward of it, over the whole Lq x Lk matrix in plain PyTorch.

They are the specification of fused kernels, and what these are tested against. One row of the scores S, with weights P (a sink
has one, too), dropout Z (its factor where a weight is kept, else 0; 0 for a sink) and values V, gives

    O = sum_j Z_j P_j V_j,    LSE = log sum_j exp S_j,    dP_j / dS_k = P_j ([j = k] - P_k),    dLSE / dS_k = P_k

so that a tangent dS of the scores and dV of the values give, with m = sum_j P_j dS_j,

    dO = sum_j Z_j P_j (dS_j - m) V_j + Z_j P_j dV_j = sum_j (Z_j P_j dS_j V_j + Z_j P_j dV_j) - m O,    dLSE = m

The second form of dO needs m only at the end of the row, as an online softmax has it. Given cotangents u of dO and w of dLSE,
the backward differentiates L = u . dO + w m. With a_j = Z_j u . V_j, b_j = Z_j u . dV_j and A = sum_j P_j a_j = u . O:

    F_j = dL / d(dS_j) = P_j (a_j - A + w)
    G_j = dL / dS_j    = P_j ((dS_j - m) (a_j - A + w) + b_j - u . dO)

Double backward needs no formulas of its own, as second derivatives commute: if the backward maps inputs x and cotangents v of
(out, lse) to gradients g, then for cotangents t of g, the gradient of v is ``jvp`` in direction t, and the gradients of x are
those that ``jvp_backward`` gives for cotangents v in direction t.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import (
    grouped_matmul,
    in_order_of,
    keep_mask,
    keep_scale,
    positions,
    scores,
    sequences,
    softmax_weights,
)
from .latent import accumulation_dtype

# The tangents or the gradients of query, key, value, mask and sinks. A tangent of None is zero.
Differentials = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _Rows(NamedTuple):
    """Hold what both derivatives need of sequences of one length. With sinks, p, z and ds have one column more, the last."""

    p: Tensor  # (B, Hq, Lq, Lk): the weights before dropout
    z: Tensor  # (B, Hq, Lq, Lk): dropout's factors
    ds: Tensor  # (B, Hq, Lq, Lk): the tangents of the scores
    m: Tensor  # (B, Hq, Lq, 1): the tangent of the LSE
    softcap_grad: Tensor | float  # (B, Hq, Lq, Lk): c' = 1 - tanh^2(x / softcap), with x = scale q . k
    softcap_grad_tangent: Tensor | float  # (B, Hq, Lq, Lk): dc'


def jvp(
    tangents: Differentials,
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
) -> tuple[Tensor, Tensor]:
    """Return the tangents (dout, dlse) of ``attend``, which takes the same arguments after the tangents of the first five."""
    tensors = query, key, value, mask, sinks
    tangents = _filled(tangents, tensors)
    options = left, right, scale, softcap, dropout_p
    douts, dlses = [], []
    packing = cu_seqlens_q, cu_seqlens_k, places
    for rows, keys, slopes, *of_sequence, first in sequences(query, key, alibi_slopes, seed, *packing):
        inputs, dinputs = _cut(tensors, rows, keys), _cut(tangents, rows, keys)
        v, dv = inputs[2], dinputs[2]
        p, z, ds, m, *_ = _rows(inputs, dinputs, slopes, *of_sequence, *options, first=first)
        dweights, weights = ((z * t)[..., : v.shape[2]].to(v.dtype) for t in (p * (ds - m), p))
        douts.append(grouped_matmul(dweights, v) + grouped_matmul(weights, dv))
        dlses.append(m.squeeze(3))
    return in_order_of(query, torch.cat(douts, dim=2)), torch.cat(dlses, dim=2)


def jvp_backward(
    grad_dout: Tensor | None,
    grad_dlse: Tensor | None,
    tangents: Differentials,
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
) -> tuple[Differentials, Differentials]:
    """Return the gradients of <grad_dout, dout> + <grad_dlse, dlse>, for the first five tensors and for their tangents.

    Tensors that are None, and bool masks, have gradients of None.
    """
    tensors = query, key, value, mask, sinks
    tangents = _filled(tangents, tensors)
    options = left, right, scale, softcap, dropout_p
    if grad_dout is None:
        grad_dout = query.new_zeros(*query.shape[:3], value.shape[3])
    if grad_dlse is None:
        grad_dlse = query.new_zeros(query.shape[:3], dtype=accumulation_dtype(query.dtype))
    parts = []
    packing = cu_seqlens_q, cu_seqlens_k, places
    for rows, keys, slopes, *of_sequence, first in sequences(query, key, alibi_slopes, seed, *packing):
        inputs, dinputs = _cut(tensors, rows, keys), _cut(tangents, rows, keys)
        r = _rows(inputs, dinputs, slopes, *of_sequence, *options, first=first)
        u, w = grad_dout[:, :, rows], grad_dlse[:, :, rows]
        parts.append(_backward(u, w.unsqueeze(3), inputs, dinputs, r, scale))
    return tuple(_joined([part[i] for part in parts]) for i in range(2))


def _filled(tangents: Differentials, tensors: tuple) -> list[Tensor | None]:
    """Return the tangents with zeros where one is missing, but None for a tensor that has none."""
    filled = []
    for tangent, tensor in zip(tangents, tensors, strict=True):
        has_tangent = tensor is not None and tensor.is_floating_point()
        filled.append(torch.zeros_like(tensor) if tangent is None and has_tangent else tangent)
    return filled


def _cut(tensors: tuple | list, rows: slice, keys: slice) -> tuple:
    """Return a sequence's part of query, key and value, and mask and sinks as they are: packed sequences have no mask."""
    query, key, value, mask, sinks = tensors
    return query[:, :, rows], key[:, :, keys], value[:, :, keys], mask, sinks


def _joined(parts: list[tuple]) -> Differentials:
    """Join the gradients of sequences: one after the other for rows; the sum for sinks. Packed sequences have no mask."""
    query, key, value = (torch.cat(grads, dim=2) for grads in list(zip(*parts))[:3])
    mask, sinks = parts[0][3:]
    return query, key, value, mask, sinks if sinks is None else sum(part[4] for part in parts)


def _rows(tensors, tangents, alibi_slopes, seed, places, left, right, scale, softcap, dropout_p, first) -> _Rows:
    query, key, value, mask, sinks = tensors
    dquery, dkey, _, dmask, dsinks = tangents
    position = positions(query, key, places)
    p, _ = softmax_weights(scores(query, key, mask, alibi_slopes, left, right, scale, softcap, position), sinks)
    shape, dtype = (*p.shape[:3], key.shape[2]), p.dtype
    dx = scale * (grouped_matmul(dquery, key.mT).to(dtype) + grouped_matmul(query, dkey.mT).to(dtype))
    softcap_grad, softcap_grad_tangent = 1.0, 0.0
    if softcap:
        tanh = torch.tanh(scale * grouped_matmul(query, key.mT).to(dtype) / softcap)
        softcap_grad = 1.0 - tanh * tanh
        softcap_grad_tangent = -2.0 * tanh * softcap_grad * dx / softcap
    ds = softcap_grad * dx
    if dmask is not None:
        ds = ds + dmask.to(dtype)
    z = torch.ones(shape, dtype=dtype, device=p.device)
    if seed is not None:
        keep = keep_mask(seed, dropout_p, *shape, first=first, places=places, device=p.device)
        z = z.masked_fill(~keep, 0.0) * keep_scale(dropout_p)
    if sinks is not None:
        ds = torch.cat([ds, dsinks.to(dtype)[:, None, None].expand(*shape[:3], 1)], dim=3)
        z = F.pad(z, (0, 1))
    m = (p * ds).sum(dim=3, keepdim=True)
    return _Rows(p, z, ds, m, softcap_grad, softcap_grad_tangent)


def _backward(u, w, tensors, tangents, rows: _Rows, scale: float) -> tuple[Differentials, Differentials]:
    """Return the gradients of one batch of sequences, given the cotangents u (B, Hq, Lq, Dv) and w (B, Hq, Lq, 1)."""
    query, key, value, mask, sinks = tensors
    dquery, dkey, dvalue, *_ = tangents
    p, z, ds, m, softcap_grad, softcap_grad_tangent = rows
    keys, has_sink, dtype = key.shape[2], sinks is not None, query.dtype

    a, b = (z * F.pad(grouped_matmul(u, v.mT).to(p.dtype), (0, has_sink)) for v in (value, dvalue))
    a = a - (p * a).sum(dim=3, keepdim=True)  # a - A
    u_dout = (p * ((ds - m) * a + b)).sum(dim=3, keepdim=True)
    f = p * (a + w)
    g = p * ((ds - m) * (a + w) + b - u_dout)
    f_keys, g_keys = f[..., :keys], g[..., :keys]

    # The product x = scale q . k goes through the softcap, whose slope depends on x, too.
    grad_x = (scale * (softcap_grad * g_keys + softcap_grad_tangent * f_keys)).to(dtype)
    grad_dx = (scale * (softcap_grad * f_keys)).to(dtype)
    dweights, weights = ((z * t)[..., :keys].to(dtype) for t in (p * (ds - m), p))
    has_mask = mask is not None and mask.is_floating_point()
    grads = (
        grouped_matmul(grad_x, key) + grouped_matmul(grad_dx, dkey),
        _sum_over_rows(grad_x, query, key) + _sum_over_rows(grad_dx, dquery, key),
        _sum_over_rows(dweights, u, key),
        g_keys.sum_to_size(mask.shape).to(mask.dtype) if has_mask else None,
        g[..., keys].sum(dim=(0, 2)).to(sinks.dtype) if has_sink else None,
    )
    tangent_grads = (
        grouped_matmul(grad_dx, key),
        _sum_over_rows(grad_dx, query, key),
        _sum_over_rows(weights, u, key),
        f_keys.sum_to_size(mask.shape).to(mask.dtype) if has_mask else None,
        f[..., keys].sum(dim=(0, 2)).to(sinks.dtype) if has_sink else None,
    )
    return grads, tangent_grads


def _sum_over_rows(weights: Tensor, rows: Tensor, key: Tensor) -> Tensor:
    """Return weights^T @ rows for (B, Hq, Lq, Lk) and (B, Hq, Lq, n), summed over each key head's group: (B, Hkv, Lk, n)."""
    heads = key.shape[1]
    groups = heads, rows.shape[1] // max(heads, 1)
    weights, rows = (t.unflatten(1, groups).flatten(2, 3) for t in (weights, rows))  # A group's rows follow one another.
    return weights.mT @ rows
