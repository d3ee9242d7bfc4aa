"""Compute attention over a sequence that is spread over the processes of a group, each of which has some of its rows."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import UnsupportedError
from ..ops.attention import observer
from ..ops.attention.batched import attention as whole_attention
from ..ops.attention.batched import batched_call, results
from ..ops.attention.call import DIFFERENTIABLE, TENSORS, AttentionCall
from ..ops.attention.checks import check_mask
from ..ops.attention.stats import AttentionStats, check_return_stats
from ..ops.attention.varlen import packed_results, varlen_call
from ..ops.attention.varlen import varlen_attention as whole_varlen_attention
from ..ops.noise import check_seed, seed_tensor
from ..ops.torch_op import are_plain
from . import all_gather, all_to_all, ring
from .ranks import Checked, Ranks, agree, ranks_of
from .sequences import Shards

METHODS = ("auto", "all-to-all", "all-gather", "ring")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any = None,
    mesh: Any = None,
    method: str = "auto",
    mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_stats: Iterable[str] = (),
    backend: str | None = None,
) -> Tensor | tuple[Tensor | AttentionStats, ...]:
    """Compute `fastlm.attention` over the rows of all processes of a group, of which each has a part, in the order of ranks.

    All processes must call it, and its backward, in the same order. Lengths may differ between ranks, and be 0.

    Args:
        query: (B, Hq, L, D), this rank's rows of the queries.
        key, value: (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv), this rank's rows of the keys and values.
        group: the processes, a ProcessGroup; None are all.
        mesh: the processes as a DeviceMesh of one dimension, in place of a group.
        method: "all-to-all" gives each rank all rows of some heads: the results and gradients are one process's to the bit,
            with all derivatives, on up to Hq ranks (with fewer key heads than ranks, the gradients of keys and values are
            right to rounding). "all-gather" gives each rank all keys and values: any number of heads, right to rounding, with
            all derivatives. "ring" sends keys and values round: any number of heads, the least memory, transfers behind the
            computation, right to rounding, differentiable once, no return_stats. "auto" takes all-to-all, unless there are
            more ranks than query heads, or a mask with a row for each query, all of which every rank would hold: then
            all-gather for return_stats, else ring.
        mask: as in `fastlm.attention`, of this rank's rows over the keys of all ranks: broadcastable to (B, Hq, L, sum of Lk).
            Its gradient is this rank's part where it is the same for all queries: sum it over the ranks, as a parameter's.
        sinks: (Hq,), the same on all ranks, and alibi_slopes. The gradient of sinks is this rank's part, to be summed.
        seed: as in `fastlm.attention`, the same on all ranks. None draws one on each rank; rank 0's counts.
        causal, window, scale, softcap, dropout_p, return_lse, return_stats, backend: as in `fastlm.attention`, the same on all
            ranks. Positions and noise are those of the whole sequence.

    Returns:
        This rank's rows of what `fastlm.attention` returns.

    Raises:
        TypeError, ValueError: naming the argument that does not fit, or that differs between ranks, on all ranks.
        RuntimeError: naming another rank whose arguments do not fit.
        UnsupportedError: the named ``backend`` cannot run the call, or the method has no such statistics.
        torch.distributed's errors, where a process has died or takes longer than the group's timeout.
    """
    ranks = ranks_of(group, mesh)
    options = {"mask": mask, "causal": causal, "window": window, "scale": scale, "softcap": softcap}
    options |= {"alibi_slopes": alibi_slopes, "sinks": sinks, "dropout_p": dropout_p}
    if ranks.size == 1:
        _check_method(method)
        more = {"seed": seed, "return_lse": return_lse, "return_stats": return_stats, "backend": backend}
        return whole_attention(query, key, value, **options, **more)

    def checked_call() -> AttentionCall:
        call = batched_call(query, key, value, **options)
        check_seed(seed, query)
        return call

    out, lse, stats = _attend(ranks, checked_call, query, seed, method, return_lse, return_stats, backend)
    return results(out, lse, stats, return_lse)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    group: Any = None,
    mesh: Any = None,
    method: str = "auto",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_stats: Iterable[str] = (),
    backend: str | None = None,
) -> Tensor | tuple[Tensor | AttentionStats, ...]:
    """Compute `fastlm.varlen_attention` over packed rows of which each process of a group has a part, in the order of ranks.

    Args:
        query: (L, Hq, D), this rank's rows of the packed queries. A sequence may lie on several ranks.
        key, value: (Lk, Hkv, D) and (Lk, Hkv, Dv), this rank's rows.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), as in `fastlm.varlen_attention`: the bounds of the sequences in the rows of
            all ranks, the same on all.
        group, mesh, method, sinks, seed and the other options: as in `attention`.

    Returns:
        This rank's rows of what `fastlm.varlen_attention` returns.

    Raises:
        As `attention`.
    """
    ranks = ranks_of(group, mesh)
    options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap}
    options |= {"alibi_slopes": alibi_slopes, "sinks": sinks, "dropout_p": dropout_p}
    if ranks.size == 1:
        _check_method(method)
        more = {"seed": seed, "return_lse": return_lse, "return_stats": return_stats, "backend": backend}
        return whole_varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, **options, **more)

    def checked_call() -> AttentionCall:
        call = varlen_call(query, key, value, cu_seqlens_q, cu_seqlens_k, **options)
        if seed is not None:
            check_seed(seed, cu_seqlens_q[1:])
        return call

    out, lse, stats = _attend(ranks, checked_call, query, seed, method, return_lse, return_stats, backend)
    return packed_results(out, lse, stats, return_lse)


# ---- both -------------------------------------------------------------------------------------------------------------------


def _attend(
    ranks: Ranks,
    checked_call: Callable[[], AttentionCall],
    query: Tensor,
    seed: int | Tensor | None,
    method: str,
    return_lse: bool,
    return_stats: Iterable[str],
    backend: str | None,
) -> tuple[Tensor, Tensor | None, AttentionStats | None]:
    """Agree with the other ranks on the call, and run it. Return this rank's out, lse and statistics."""
    options = {"seed": seed, "method": method, "return_lse": return_lse, "return_stats": return_stats, "backend": backend}
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    (call, wanted), told = agree(ranks, device, lambda: _check(checked_call, **options), len(_Told._fields))
    told = [_Told(*numbers) for numbers in told]
    shards = Shards(ranks, tuple(t.queries for t in told), tuple(t.keys for t in told), _mask_has_rows(call.mask, told))
    _check_offsets("cu_seqlens_q", call.cu_seqlens_q, sum(shards.queries))
    _check_offsets("cu_seqlens_k", call.cu_seqlens_k, sum(shards.keys))
    if shards.mask_has_rows:
        call = call._replace(mask=call.mask[:, :, : call.query.shape[2]])
    if call.dropout_p:
        drawn = told[0].seed if seed is None else seed
        call = call._replace(seed=seed_tensor(drawn, call.query))
    method = _chosen(method, call, shards, wanted)
    if wanted and method == "ring":
        raise UnsupportedError("return_stats needs method='all-to-all' or 'all-gather'; got 'ring'")
    with observer.missed(observer.SPREAD):
        if method == "ring":
            return *ring.attend(shards, call, backend), None
        by = all_to_all if method == "all-to-all" else all_gather
        return by.attend(shards, call, backend, wanted, return_lse)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")


class _Told(NamedTuple):
    """Hold what the ranks tell each other of their parts."""

    queries: int
    keys: int
    mask_rows: int
    mask_keys: int
    seed: int  # that this rank would draw


def _check(
    checked_call: Callable[[], AttentionCall],
    seed: int | Tensor | None,
    method: str,
    return_lse: bool,
    return_stats: Iterable[str],
    backend: str | None,
) -> Checked:
    """Check a rank's arguments. The result is its call, with a mask of 4 dimensions, and the statistics that are wanted."""
    _check_method(method)
    call, wanted = checked_call(), check_return_stats(return_stats)
    query, key, value, mask = call[:4]
    of_mask = 0, 0
    if mask is not None:
        of_mask = ((1, 1, *mask.shape)[-2:]) if isinstance(mask, Tensor) else of_mask
        check_mask(mask, (*query.shape[:2], *of_mask), query.device)
        call = call._replace(mask=mask[(None,) * (4 - mask.dim())])
    if not are_plain(call[:TENSORS]):
        raise TypeError("query, key and value must be plain tensors, this rank's rows; fastlm.attention takes DTensors")
    drawn = int(seed_tensor(None, call.query)) if call.dropout_p and seed is None else 0
    same = {
        "query's batch size, heads and head_dim": (*query.shape[:2], query.shape[3]),
        "key's number of heads": key.shape[1],
        "value's head_dim": value.shape[3],
        "query's dtype": query.dtype,
        "query's kind of device": query.device.type,
        "mask": None if mask is None else (mask.dtype, tuple(call.mask.shape[:2])),
        "sinks": call.sinks is not None,
        "alibi_slopes": None if call.alibi_slopes is None else tuple(call.alibi_slopes.shape),
        "seed": seed.tolist() if isinstance(seed, Tensor) else seed,
        "cu_seqlens_q": None if call.cu_seqlens_q is None else call.cu_seqlens_q.tolist(),
        "cu_seqlens_k": None if call.cu_seqlens_k is None else call.cu_seqlens_k.tolist(),
        "causal or window": (call.left, call.right),
        "scale": call.scale,
        "softcap": call.softcap,
        "dropout_p": call.dropout_p,
        "method": method,
        "return_lse": return_lse,
        "return_stats": sorted(wanted),
        "backend": backend,
        "what requires gradients": torch.is_grad_enabled()
        and tuple(tensor is not None and tensor.requires_grad for tensor in call[:DIFFERENTIABLE]),
    }
    return Checked((call, wanted), _Told(query.shape[2], key.shape[2], *of_mask, drawn), same)


def _mask_has_rows(mask: Tensor | None, told: list[_Told]) -> bool:
    """Tell whether the ranks' masks have a row for each query, and refuse what does not fit. All ranks come to one result."""
    if mask is None:
        return False
    keys = sum(t.keys for t in told)
    for rank, t in enumerate(told):
        if t.mask_keys not in (1, keys) or t.mask_rows not in (1, t.queries):
            raise ValueError(
                f"mask must broadcast to a rank's queries and the keys of all ranks, ({t.queries}, {keys}) on rank {rank}; "
                f"got ({t.mask_rows}, {t.mask_keys})"
            )
    has_rows = all(t.mask_rows == t.queries for t in told if t.queries)
    if not has_rows and any(t.mask_rows != 1 for t in told):
        raise ValueError(
            f"mask must have a row for each query on all ranks, or on none; got {[t.mask_rows for t in told]} rows"
        )
    return has_rows


def _check_offsets(name: str, cu_seqlens: Tensor | None, total: int) -> None:
    if cu_seqlens is None:
        return
    offsets = cu_seqlens.tolist()
    if offsets != sorted(offsets) or offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(f"{name} must start at 0, not fall, and end at the rows of all ranks, {total}; got {offsets}")


def _chosen(method: str, call: AttentionCall, shards: Shards, wanted: frozenset[str]) -> str:
    """Return the method that "auto" takes, or the one that was asked for."""
    heads, size = call.query.shape[1], shards.ranks.size
    if method == "all-to-all" and heads < size:
        raise ValueError(f"method='all-to-all' needs a query head for each of the {size} ranks; got {heads}")
    if method != "auto":
        return method
    if heads >= size and not shards.mask_has_rows:
        return "all-to-all"
    return "all-gather" if wanted else "ring"
