"""Compute exact attention of batched queries and keys, without holding the Lq x Lk scores.

    s = scale q k^T;  s = softcap tanh(s / softcap);  s += mask - slope |p_i - j|;  masked s = -inf;  out = softmax(s) v

with p_i = i + Lk - Lq, the position of query i among the keys. `attention` and `varlen_attention` call one op (op.py); decoding
with a cache is in kvcache.py.
Sources: Vaswani et al., "Attention Is All You Need" (2017); the tiled softmax: Milakov & Gimelshein, "Online normalizer
calculation for softmax" (2018), Dao et al., "FlashAttention" (2022), Dao, "FlashAttention-2" (2023).
"""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from ...backend import DEFAULT, Implementation, select
from ...reference import attention as reference
from ..checks import autocast
from ..noise import check_seed, seed_tensor
from ..tensor_classes import runner
from ..torch_op import export_only, reference_only
from . import cpu, observer, triton
from .call import DIFFERENTIABLE, TENSORS, AttentionCall
from .checks import (
    BATCHED,
    check_dropout_p,
    check_groups,
    check_keys,
    check_mask,
    check_no_gradient,
    check_per_head,
    check_rows,
    score_options,
    window_bounds,
)
from .stats import AttentionStats, attend_on_reference, check_return_stats, stats_of


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
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
    """Compute softmax attention ``softmax(scale * query @ key.mT + ...) @ value`` in one fused pass.

    Args:
        query: (B, Hq, Lq, D), float32, bfloat16 or float16 (float64 runs on the reference). Any strides; a transposed
            (B, Lq, Hq, D) tensor is read where it lies.
        key: (B, Hkv, Lk, D), in query's dtype. Hq is a multiple of Hkv: query head h uses key head h // (Hq // Hkv).
        value: (B, Hkv, Lk, Dv), in query's dtype.
        mask: bool (True: attend) or floating (added to the scores), broadcastable to (B, Hq, Lq, Lk). A floating mask gets a
            gradient, summed over what it was broadcast along.
        causal: query i sees only keys j <= i + Lk - Lq: aligned at the last query and key, as decoding with a cache needs.
        window: (left, right): query i sees keys from i + Lk - Lq - left to i + Lk - Lq + right; None sets no limit on a side.
        scale: multiplies the scores; None means 1 / sqrt(D).
        softcap: scores become ``softcap * tanh(s / softcap)`` before masks and slopes are added.
        alibi_slopes: (Hq,) or (B, Hq), floating: subtracts ``slope * |i + Lk - Lq - j|``. No gradient.
        sinks: (Hq,), floating: one logit per head that takes part in the softmax but has no value. Sinks get gradients.
        dropout_p: the share of weights that are dropped, in [0, 1]; the others are scaled by 1 / (1 - dropout_p).
        seed: the seed of the dropout: an int, a 0-d int64 tensor, or an int64 tensor (B,), one stream per example. None draws
            a seed from torch's default generator. The same seed drops the same weights on every backend.
        return_lse: also return the natural logarithm of the softmax's denominator, which is differentiable.
        return_stats: names of statistics to return from the same pass, of "entropy", "max_logit" and "key_mass":
            `fastlm.AttentionStats` says what they are. They have gradients, too; derivatives of second order and forward mode
            are the reference's.
        backend: 'cpu', 'triton' or 'reference'; None picks the fastest one that can run the call.

    Returns:
        out (B, Hq, Lq, Dv) in query's dtype, laid out in memory like query; or (out, lse), lse float32 (B, Hq, Lq), which
        includes the sinks. A query that sees no key gets zeros, and an LSE of -inf or its sink. Both have all derivatives up to
        the second order, forward and backward mode, in memory linear in the lengths. With ``return_stats``, a last element
        holds the statistics.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        UnsupportedError: the named ``backend`` cannot run the call.
    """
    no_option = mask is None and window is None and softcap is None and alibi_slopes is None and sinks is None
    if no_option and dropout_p == 0.0 and seed is None and not return_lse and return_stats == ():
        out = cpu.fast_path(query, key, value, scale, causal, False, True, backend)
        if out is not None:
            return out
    call = batched_call(query, key, value, mask, causal, window, scale, softcap, alibi_slopes, sinks, dropout_p)
    check_mask(call.mask, (*call.query.shape[:3], call.key.shape[2]), call.query.device)
    check_seed(seed, query)
    wanted = check_return_stats(return_stats)
    return results(*run("attention", call, seed, backend, wanted), return_lse)


def batched_call(query, key, value, mask, causal, window, scale, softcap, alibi_slopes, sinks, dropout_p) -> AttentionCall:
    """Check the arguments of `attention` but its seed and the mask's shape, and return the call without its seed."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_rows(name, tensor, BATCHED)
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have query's batch size {query.shape[0]}; got shape {tuple(key.shape)}")
    query, key, value, mask = autocast(query, key, value, mask)
    check_keys(query, key, value)
    check_groups(query.shape[1], key.shape[1])
    check_per_head(alibi_slopes, sinks, query.shape[0], query, query.shape[1])
    check_no_gradient(alibi_slopes)
    left, right = window_bounds(causal, window)
    scale, softcap = score_options(scale, softcap, query.shape[3])
    dropout_p = check_dropout_p(dropout_p)
    return AttentionCall(
        query, key, value, mask, sinks, alibi_slopes, None, None, None, None, left, right, scale, softcap, dropout_p
    )


def run(
    op: str, call: AttentionCall, seed: int | Tensor | None, backend: str | None, wanted: frozenset[str] = frozenset()
) -> tuple[Tensor, Tensor, AttentionStats | None]:
    """Choose the backend, draw a seed if there is dropout, and run the call. Return out, lse, and what is ``wanted`` of stats.

    The seed is drawn after the choice, so that explain() leaves torch's generator alone.
    """
    elsewhere = runner("attention", call[:TENSORS])
    if elsewhere is not None:
        with observer.missed(observer.SPREAD):
            return elsewhere(run, op, call, seed, backend, wanted)
    deciding = call.query, call.value
    observers = observer.current() if observer.any_open() else ()
    if not wanted:
        attend = select(op, IMPLEMENTATIONS, deciding, backend, export_only())
        call = _seeded(call, seed)
        return *(_attend_watched(attend, call, observers) if observers else attend(call)), None
    attend = select(op, WITH_STATS, deciding, backend, reference_only(*call[:DIFFERENTIABLE]))
    want_mass = "key_mass" in wanted or _want_mass(observers)
    out, lse, *stats = attend(_seeded(call, seed), bool(observers or wanted & {"entropy", "max_logit"}), want_mass)
    if observers:
        _tell(observers, call, observer.why_not(call[:TENSORS]), stats)
    return out, lse, stats_of(wanted, *stats)


def _attend_watched(attend: Callable, call: AttentionCall, observers: Sequence[observer.Observer]) -> tuple[Tensor, Tensor]:
    """Return ``attend(call)``, to the bit and with all its derivatives, and tell the observers the call's statistics.

    One pass does both. What it tells has no gradient.
    """
    if reason := observer.why_not(call[:TENSORS]):
        _tell(observers, call, reason, ())
        return attend(call)
    out, lse, *stats = WATCHED[attend](call, _want_mass(observers))
    _tell(observers, call, None, stats)
    return out, lse


def _want_mass(observers: Sequence[observer.Observer]) -> bool:
    return any(one.watch.key_mass for one in observers)


def _tell(observers: Sequence[observer.Observer], call: AttentionCall, reason: str | None, stats: Sequence[Tensor]) -> None:
    """Give the observers the statistics of a call, or the reason why there are none."""
    for one in observers:
        one.record(call, *(stat.detach() for stat in stats)) if reason is None else one.miss(reason)


def _seeded(call: AttentionCall, seed: int | Tensor | None) -> AttentionCall:
    return call._replace(seed=seed_tensor(seed, call.query)) if call.dropout_p else call


def results(out: Tensor, lse: Tensor | None, stats: AttentionStats | None, return_lse: bool) -> Tensor | tuple:
    """Return what a public function returns: out alone, or a tuple with lse and stats, where asked for."""
    if stats is not None:
        return (out, lse, stats) if return_lse else (out, stats)
    return (out, lse) if return_lse else out


def _attend_on_reference(call: AttentionCall) -> tuple[Tensor, Tensor]:
    return reference.attend(*call)


IMPLEMENTATIONS = (
    Implementation("cpu", cpu.attend, cpu.why_not),
    Implementation("triton", triton.attend, triton.why_not),
    Implementation("reference", _attend_on_reference, lambda query, value: None),
)

# By the function of an implementation: the same with statistics that have no gradient.
WATCHED = {
    cpu.attend: cpu.attend_watched,
    triton.attend: triton.attend_watched,
    _attend_on_reference: lambda call, want_mass: attend_on_reference(call, True, want_mass),
}

WITH_STATS = (
    Implementation("cpu", cpu.attend_with_stats, cpu.why_not),
    Implementation("triton", triton.attend_with_stats, triton.why_not),
    Implementation("reference", attend_on_reference, lambda query, value: None),
)


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Tell whether a drop-in should take a call. torch is faster than the reference, but FASTLM_BACKEND overrides that."""
    if DEFAULT is not None:
        return True
    return any(i.backend != "reference" and i.why_not(query, value) is None for i in IMPLEMENTATIONS)
