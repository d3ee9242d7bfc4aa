"""Name the tensors and options of one call, in the order that schemas, the reference, C++ and Triton share."""

from typing import NamedTuple

from torch import Tensor

from ...reference.attention import drop_below, keep_scale


class Place(NamedTuple):
    """Hold where the rows of a call's sequence stand in a larger call, of which the call computes some queries or keys."""

    position: int  # Query i stands at key i + position of the call's own keys: before, among or behind them.
    first_query: int  # Dropout's counter takes query i as i + first_query,
    first_key: int  # key j as j + first_key, a multiple of 4,
    stream: int  # and head h as stream + h.


class AttentionCall(NamedTuple):
    """Hold a checked call of attention. Packed sequences are a batch of one, with offsets along the rows.

    No float has a default, because torch.compile would make it an input of the graph.
    """

    query: Tensor  # (B, Hq, Lq, D)
    key: Tensor  # (B, Hkv, Lk, D)
    value: Tensor  # (B, Hkv, Lk, Dv)
    mask: Tensor | None  # bool or floating, broadcastable to (B, Hq, Lq, Lk)
    sinks: Tensor | None  # (Hq,)
    alibi_slopes: Tensor | None  # (Hq,) or (B, Hq)
    seed: Tensor | None  # int64, 0-d or (B,); None without dropout
    cu_seqlens_q: Tensor | None  # int32 (sequences + 1,)
    cu_seqlens_k: Tensor | None
    # Where each sequence's rows stand in a larger call, of which this one computes a part: int64 (B, 4), the rows of Place.
    places: Tensor | None
    left: int | None  # Query i, at key p = i + Lk - Lq (or Place), sees keys from p - left to p + right; None: no limit.
    right: int | None
    scale: float
    softcap: float  # 0: no softcap
    dropout_p: float

    def requires_grad(self) -> bool:
        """Tell whether one of the differentiable tensors requires a gradient."""
        mask, sinks = self.mask, self.sinks
        required = self.query.requires_grad or self.key.requires_grad or self.value.requires_grad
        return required or (mask is not None and mask.requires_grad) or (sinks is not None and sinks.requires_grad)


INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, Tensor? alibi_slopes, Tensor? seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? places, "
    "SymInt? left, SymInt? right, float scale, float softcap, float dropout_p"
)
TENSORS = 10  # The first 10 fields are the tensors.
DIFFERENTIABLE = 5  # The first 5 of them have gradients.


class Tangents(NamedTuple):
    """Hold the tangents of a call's differentiable tensors, of their shapes and dtypes. None counts as zeros."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    mask: Tensor | None
    sinks: Tensor | None


TANGENTS = ", ".join(f"Tensor? {name}_tangent" for name in Tangents._fields)


class KVCacheCall(NamedTuple):
    """Hold a checked call of attention to caches (B, Hkv, Lmax, D), or (pages, page, Hkv, D) with a block_table."""

    query: Tensor  # (B, Hq, Lq, D)
    key_cache: Tensor
    value_cache: Tensor
    cache_seqlens: Tensor  # int32 (B,): rows before appending
    key: Tensor | None  # (B, Hkv, L, D), to be appended
    value: Tensor | None
    block_table: Tensor | None  # int32 (B, max_pages)
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    left: int | None
    right: int | None
    scale: float
    softcap: float


KVCACHE_INPUTS = (
    "Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, Tensor? key, Tensor? value, "
    "Tensor? block_table, Tensor? sinks, Tensor? alibi_slopes, SymInt? left, SymInt? right, float scale, float softcap"
)
KVCACHE_TENSORS = 9


def kernel_options(call: AttentionCall) -> tuple:
    """Return the options for kernels: left, right, scale, softcap, drop_below and keep_scale.

    A random word below ``drop_below`` drops its weight (2**32 drops all), and ``keep_scale`` is 1 / (1 - dropout_p).
    """
    if call.dropout_p:
        return call.left, call.right, call.scale, call.softcap, drop_below(call.dropout_p), keep_scale(call.dropout_p)
    return call.left, call.right, call.scale, call.softcap, 0, 1.0
