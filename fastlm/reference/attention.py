"""Compute attention in plain PyTorch: the oracle of every backend, and the fallback where no backend runs.

    s = scale q k^T;  s = softcap tanh(s / softcap);  s += mask - slope |p_i - j|;  masked s = -inf;  out = softmax(s) v

with p_i = i + Lk - Lq, the position of query i among the keys. Scores and softmax are float32 or better; the two products are
in the tensors' own dtype. All Lq x Lk scores are held in memory. Autograd and torch.func can differentiate everything here, in
forward and reverse mode, to any order; attention_derivatives.py has the JVP and its backward in closed form.
Sources: Vaswani et al., "Attention Is All You Need" (2017); ALiBi: Press et al. (2021); softcap: Gemma 2 (2024); sinks: Xiao et
al., "Efficient Streaming Language Models with Attention Sinks" (2023), as a learned logit per head in GPT-OSS (2025).
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from .latent import accumulation_dtype
from .noise import philox


def attend(
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
    """Return (out, lse) for query (B, Hq, Lq, D), key (B, Hkv, Lk, D) and value (B, Hkv, Lk, Dv).

    With cu_seqlens, B is 1 and the sequences lie one after the other along the rows. Query i sees key j if
    p_i - left <= j <= p_i + right; None sets no limit. A ``softcap`` of 0 means none. ``seed`` is None without dropout.

    ``places`` int64 (B, 4) say where each sequence's rows stand in a larger call, of which this one computes a part: its
    position, first_query, first_key and stream. p_i is i + position, and dropout's counters go on from the other three
    (`keep_mask`); first_key is a multiple of 4.
    """
    options = (left, right, scale, softcap, dropout_p)
    if cu_seqlens_q is None:
        return _attend(query, key, value, mask, sinks, alibi_slopes, seed, places, *options)
    outs, lses = [], []
    for rows, keys, slopes, *of_sequence, first in sequences(
        query, key, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k, places
    ):
        q, k, v = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        out, lse = _attend(q, k, v, None, sinks, slopes, *of_sequence, *options, first=first)
        outs.append(out)
        lses.append(lse)
    return in_order_of(query, torch.cat(outs, dim=2)), torch.cat(lses, dim=2)


def sequences(
    query: Tensor,
    key: Tensor,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    places: Tensor | None,
) -> list[tuple[slice, slice, Tensor | None, Tensor | None, Tensor | None, int]]:
    """Return each sequence's rows of query, rows of key, slopes, seed, place, and index in dropout's counters.

    Without cu_seqlens, the whole batch is one entry.
    """
    if cu_seqlens_q is None:
        return [(slice(None), slice(None), alibi_slopes, seed, places, 0)]
    q_offsets = _checked_offsets("cu_seqlens_q", cu_seqlens_q, query.shape[2])
    k_offsets = _checked_offsets("cu_seqlens_k", cu_seqlens_k, key.shape[2])
    if len(q_offsets) == 1:  # No sequence is computed as one empty sequence.
        return [(slice(None), slice(None), None, None, None, 0)]
    found = []
    for b in range(len(q_offsets) - 1):
        rows, keys = slice(q_offsets[b], q_offsets[b + 1]), slice(k_offsets[b], k_offsets[b + 1])
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        own_seed = seed if seed is None or seed.dim() == 0 else seed[b : b + 1]
        found.append((rows, keys, slopes, own_seed, None if places is None else places[b : b + 1], b))
    return found


def _checked_offsets(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{name} must start at 0; got {offsets[0]}")
    for b, (begin, end) in enumerate(zip(offsets, offsets[1:])):
        if end < begin:
            raise ValueError(f"{name} must not fall; got {begin}, then {end} at {b + 1}")
    if offsets[-1] != total:
        raise ValueError(f"{name} must end at the number of rows, {total}; got {offsets[-1]}")
    return offsets


def _attend(query, key, value, mask, sinks, alibi_slopes, seed, places, left, right, scale, softcap, dropout_p, first=0):
    """Return (out, lse) of one batch of sequences of one length. ``first`` is the first one's index in dropout's counters."""
    position = positions(query, key, places)
    p, lse = softmax_weights(scores(query, key, mask, alibi_slopes, left, right, scale, softcap, position), sinks)
    p = p[..., : key.shape[2]]
    if seed is not None:
        keep = keep_mask(seed, dropout_p, *p.shape, first=first, places=places, device=p.device)
        p = torch.where(keep, p * keep_scale(dropout_p), 0.0)
    return in_order_of(query, grouped_matmul(p.to(value.dtype), value)), lse


def softmax_weights(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (weights, lse) of `scores`: (B, Hq, Lq, Lk), or (B, Hq, Lq, Lk + 1) with sinks, and (B, Hq, Lq)."""
    if sinks is not None:
        s = with_sinks(s, sinks)
    alive = (s != -math.inf).any(dim=3, keepdim=True)
    s = torch.where(alive, s, 0.0)  # A row that sees no key stays finite, so that its gradients are zeros.
    p, lse = _softmax(s)
    return torch.where(alive, p, 0.0), torch.where(alive, lse, -math.inf).squeeze(3)


def with_sinks(s: Tensor, sinks: Tensor) -> Tensor:
    """Return the scores with one column more: a sink is one more key, with no value."""
    return torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)], dim=3)


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax of (..., n) and its log-sum-exp (..., 1).

    The weights are divided by their sum, not computed from the log-sum-exp, which has no room for log(n) beside -1e9.
    """
    if s.shape[-1] == 0:
        return s, s.sum(dim=-1, keepdim=True)
    top = s.detach().amax(dim=-1, keepdim=True)  # Any shift gives the same softmax, so that it needs no derivative.
    e = torch.exp(s - top)
    total = e.sum(dim=-1, keepdim=True)
    return e / total, top + torch.log(total)


def positions(query: Tensor, key: Tensor, places: Tensor | None) -> Tensor:
    """Return where queries stand among the keys: (Lq, 1), as the last of them, or (B, 1, Lq, 1) by their ``places``."""
    i = torch.arange(query.shape[2], device=query.device)[:, None]
    return i + key.shape[2] - query.shape[2] if places is None else i + places[:, 0].reshape(-1, 1, 1, 1)


def scores(query, key, mask, alibi_slopes, left, right, scale, softcap, position: Tensor) -> Tensor:
    """Return the scores (B, Hq, Lq, Lk), -inf where a query does not see a key.

    ``position`` (Lq, 1) or (B, 1, Lq, 1) says where the queries stand among the keys.
    """
    s = grouped_matmul(query, key.transpose(-1, -2)).to(accumulation_dtype(query.dtype)) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    j = torch.arange(key.shape[2], device=s.device)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype)[..., None, None] * (position - j).abs()
    seen = torch.ones_like(position == j)
    if left is not None:
        seen = seen & (j >= position - left)
    if right is not None:
        seen = seen & (j <= position + right)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        s = s + mask.to(s.dtype)
    return torch.where(seen, s, -math.inf)


def grouped_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right for left (B, Hq, M, K) and right (B, Hkv, K, N), whose heads serve a group each, without a copy."""
    heads = right.shape[1]
    groups = heads, left.shape[1] // max(heads, 1)
    return torch.matmul(left.unflatten(1, groups), right.unsqueeze(2)).flatten(1, 2)


def keep_mask(
    seed: Tensor,
    dropout_p: float,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    *,
    first: int = 0,
    places: Tensor | None = None,
    device=None,
) -> Tensor:
    """Return which weights dropout keeps: bool (batch, heads, queries, keys).

    Word j % 4 of counter (j // 4, i, b * heads + h, 0) decides on key j of query i; with a seed per sequence the third word
    is h. A weight is kept if (word + 1/2) / 2**32 >= dropout_p. ``first`` is the first sequence's b. With ``places``, i counts
    from first_query, j from first_key, and the third word is stream + h.
    """
    block = torch.arange((keys + 3) // 4, device=device)
    query = torch.arange(queries, device=device)[:, None]
    head = torch.arange(heads, device=device)[:, None, None]
    if places is not None:
        first_query, first_key, stream = places[:, 1:].reshape(-1, 3, 1, 1, 1).unbind(1)
        block, query, head = block + first_key // 4, query + first_query, head + stream
    elif seed.dim() == 0:
        head = head + heads * (first + torch.arange(batch, device=device))[:, None, None, None]
    seed = seed.reshape(-1, 1, 1, 1)
    words = torch.broadcast_tensors(*philox(seed, block, query, head, torch.zeros_like(block)))
    kept = torch.stack(words, dim=-1) >= drop_below(dropout_p)
    return kept.flatten(-2)[..., :keys].expand(batch, heads, queries, keys)


def drop_below(dropout_p: float) -> int:
    """Return the smallest kept word, exactly: the first with (word + 1/2) / 2**32 >= dropout_p, or 2**32 if there is none."""
    return math.ceil(Fraction(dropout_p) * 2**32 - Fraction(1, 2))


def keep_scale(dropout_p: float) -> float:
    """Return the factor of kept weights, 1 / (1 - dropout_p), or 0 if nothing is kept, so that no inf meets a zero."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def in_order_of(query: Tensor, out: Tensor) -> Tensor:
    """Return ``out`` contiguous; if the query is a transposed (B, L, H, D) tensor, ``out`` is such a transpose, too."""
    if query.shape[1] > 1 and query.shape[2] > 1 and query.stride(1) < query.stride(2):
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


# ---- decoding ---------------------------------------------------------------------------------------------------------------


def attend_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    block_table: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Append key and value to the caches, and return (out, lse) of query (B, Hq, Lq, D) with each sequence's cached keys.

    Caches are (B, Hkv, Lmax, D), or (n_pages, page, Hkv, D) with a block_table (B, max_pages).
    """
    added = 0 if key is None else key.shape[2]
    lengths = _checked_lengths(cache_seqlens, added, key_cache, block_table)
    outs, lses = [], []
    for b, length in enumerate(lengths):
        if added:
            for cache, new in ((key_cache, key), (value_cache, value)):
                _write_rows(cache, block_table, b, length, new[b])
        rows = [_read_rows(cache, block_table, b, length + added) for cache in (key_cache, value_cache)]
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        out, lse = _attend(query[b : b + 1], *rows, None, sinks, slopes, None, None, left, right, scale, softcap, 0.0)
        outs.append(out)
        lses.append(lse)
    if not outs:
        shape = query.shape[:3]
        return query.new_empty(*shape, value_cache.shape[3]), query.new_empty(shape, dtype=accumulation_dtype(query.dtype))
    return in_order_of(query, torch.cat(outs)), torch.cat(lses)


def _checked_lengths(cache_seqlens: Tensor, added: int, cache: Tensor, block_table: Tensor | None) -> list[int]:
    lengths = cache_seqlens.tolist()
    page, pages = (cache.shape[2], 1) if block_table is None else (cache.shape[1], block_table.shape[1])
    for b, length in enumerate(lengths):
        if length < 0 or length + added > page * pages:
            raise ValueError(
                f"cache_seqlens must lie between 0 and the cache's {page * pages} rows less the {added} appended; "
                f"got {length} (sequence {b})"
            )
        for entry in [] if block_table is None else block_table[b, : -(-(length + added) // page)].tolist():
            if not 0 <= entry < cache.shape[0]:
                raise ValueError(f"block_table must hold pages from 0 to {cache.shape[0] - 1}; got {entry} (sequence {b})")
    return lengths


def _write_rows(cache: Tensor, block_table: Tensor | None, b: int, at: int, rows: Tensor) -> None:
    """Write rows (Hkv, L, D) into the cache of sequence b, from its row ``at`` on."""
    if block_table is None:
        cache[b, :, at : at + rows.shape[1]] = rows
        return
    position = torch.arange(at, at + rows.shape[1], device=cache.device)
    page = cache.shape[1]
    cache[block_table[b].long()[position // page], position % page] = rows.transpose(0, 1)


def _read_rows(cache: Tensor, block_table: Tensor | None, b: int, length: int) -> Tensor:
    """Return the first ``length`` rows of sequence b: (1, Hkv, length, D)."""
    if block_table is None:
        return cache[b : b + 1, :, :length]
    pages = block_table[b, : -(-length // cache.shape[1])].long()
    return cache[pages].flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0)
