"""Attention computed by parts of a call, with records that say where each part's rows stand in the whole (`Place`)."""

import math

import torch
from torch import Tensor

import fastlm
from fastlm.ops.attention.batched import run
from fastlm.ops.attention.call import AttentionCall, Place
from fastlm.ops.attention.checks import score_options, window_bounds

Result = tuple[Tensor, Tensor]  # out, lse


def attention_in_parts(
    *, query, key, value, mask=None, causal=False, window=None, scale=None, softcap=None, alibi_slopes=None, sinks=None,
    dropout_p=0.0, seed=None, return_lse=True, key_cuts=(), query_cuts=(), backend=None,
) -> Result:  # fmt: skip
    """Return fastlm.attention's (out, lse): each example and each key head by itself, cut at these queries and keys.

    ``key_cuts`` are multiples of 4. The reference computes the whole call, so that an Oracle compares the parts with it.
    """
    if backend == "reference":
        return fastlm.attention(
            query, key, value, mask=mask, causal=causal, window=window, scale=scale, softcap=softcap, sinks=sinks,
            alibi_slopes=alibi_slopes, dropout_p=dropout_p, seed=seed, return_lse=True, backend=backend,
        )  # fmt: skip
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    group = heads // max(kv_heads, 1)
    options = *window_bounds(causal, window), *score_options(scale, softcap, query.shape[3]), dropout_p
    seeds = None if seed is None else torch.as_tensor(seed, device=query.device)
    per_example = seeds is not None and seeds.dim() == 1
    mask = None if mask is None else mask[(None,) * (4 - mask.dim())]
    slopes = None if alibi_slopes is None else alibi_slopes.expand(batch, heads)

    def part(b: int, kv_head: int, rows: slice, columns: slice) -> Result:
        one, of_group = slice(b, b + 1), slice(kv_head * group, (kv_head + 1) * group)
        i, j, h = rows.start, columns.start, of_group.start
        place = Place(i + keys - queries - j, i, j, h if per_example else b * heads + h)
        call = AttentionCall(
            query[one, of_group, rows],
            *(tensor[one, kv_head : kv_head + 1, columns] for tensor in (key, value)),
            None if mask is None else _cut(mask, one, of_group, rows, columns),
            sinks[of_group] if sinks is not None and j == 0 else None,
            None if slopes is None else slopes[one, of_group],
            None,
            None,
            None,
            torch.tensor([place], device=query.device),
            *options,
        )
        return run("attention", call, seeds[one] if per_example else seeds, backend)[:2]

    def of_head(b: int, kv_head: int) -> Result:
        columns = _slices(keys, key_cuts)
        return _cat((_joined([part(b, kv_head, rows, at) for at in columns]) for rows in _slices(queries, query_cuts)), dim=2)

    return _cat((_cat((of_head(b, h) for h in range(kv_heads)), dim=1) for b in range(batch)), dim=0)


def attention_at(*, seed=None, return_stats=(), backend=None, **fields) -> tuple:
    """Return (out, lse) of the record of a call with these fields, places among them, and its statistics where asked for."""
    unset = dict.fromkeys(AttentionCall._fields) | {"scale": 0.3, "softcap": 0.0, "dropout_p": 0.0}
    out, lse, stats = run("attention", AttentionCall(**unset | fields), seed, backend, frozenset(return_stats))
    return (out, lse, stats) if return_stats else (out, lse)


def _slices(length: int, cuts: tuple[int, ...]) -> list[slice]:
    bounds = [0, *(cut for cut in cuts if cut < length), length]
    return [slice(begin, end) for begin, end in zip(bounds, bounds[1:])]


def _cut(mask: Tensor, *parts: slice) -> Tensor:
    """Return a part of a mask, all of it along the dimensions that it is broadcast along."""
    return mask[tuple(part if size > 1 else slice(None) for part, size in zip(parts, mask.shape))]


def _cat(parts, dim: int) -> Result:
    return tuple(torch.cat(tensors, dim=dim) for tensors in zip(*parts))


def _joined(parts: list[Result]) -> Result:
    """Return (out, lse) of all keys, from those of some keys each."""
    if len(parts) == 1:
        return parts[0]
    outs, lses = (torch.stack(tensors) for tensors in zip(*parts))
    alive = (lses != -math.inf).any(dim=0)
    lse = torch.where(alive, torch.logsumexp(torch.where(alive, lses, 0.0), dim=0), -math.inf)
    weights = torch.where(alive, torch.exp(lses - torch.where(alive, lse, 0.0)), 0.0)  # (parts, B, Hq, Lq)
    return (weights[..., None] * outs.float()).sum(dim=0).to(outs.dtype), lse
