"""Look at attention's weights without the whole matrix: those of chosen queries, or the largest of every query."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...backend import Implementation, select
from ...reference import attention_weights as reference
from ..checks import check_integer, check_tensor
from ..tensor_classes import runner
from ..torch_op import define_op, export_only
from . import cpu
from .call import AttentionCall
from .checks import (
    BATCHED,
    check_groups,
    check_like,
    check_mask,
    check_no_gradient,
    check_per_head,
    check_rows,
    score_options,
    window_bounds,
)
from .op import one_by_one

MOST_KEYS = 32  # kMostTopKeys of csrc/cpu/attention/attention.h


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    rows: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the weights that chosen queries give to all keys, in plain PyTorch and memory linear in the number of keys.

    Args:
        query, key: (B, Hq, Lq, D) and (B, Hkv, Lk, D), as they were given to `fastlm.attention`.
        lse: (B, Hq, Lq), which `fastlm.attention` returned for them with ``return_lse=True``. Where ``key`` is a part of the
            keys, the weights are those of this part in the whole.
        rows: int64 or int32 (n,), the queries, from 0 to Lq - 1 in any order.
        mask, causal, window, scale, softcap, alibi_slopes, sinks: as they were given to `fastlm.attention`. The weights are
            those before dropout.

    Returns:
        (B, Hq, n, Lk), float32 (float64 for float64), differentiable by query, key, lse, mask and sinks. The weights of a
        query that sees no key are zeros; a sink has the rest of the weights.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    numbers = _checked(query, key, lse, mask, causal, window, scale, softcap, alibi_slopes, sinks)
    _check_chosen(rows, query)

    def run(query, key, lse, mask, sinks, alibi_slopes, rows):
        return (reference.weights_of_rows(query, key, lse, rows.long(), mask, sinks, alibi_slopes, *numbers),)

    return _run(run, query, key, lse, mask, sinks, alibi_slopes, rows)[0]


def top_keys(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the keys that each query attends to most, in memory linear in the lengths.

    Args:
        query, key, lse, mask, causal, window, scale, softcap, alibi_slopes, sinks: as in `attention_weights`.
        k: how many keys, from 1 to 32.
        backend: 'cpu' or 'reference', which a GPU has; None picks the fastest one that can run the call.

    Returns:
        (indices, weights), both (B, Hq, Lq, k), the largest weight first, and the first of equal keys first. indices are
        int64, and -1 with a weight of 0 where a query sees fewer keys; weights are float32 (float64 for float64), without a
        gradient: `attention_weights` has one.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    numbers = _checked(query, key, lse, mask, causal, window, scale, softcap, alibi_slopes, sinks)
    k = check_integer("k", k, 1, MOST_KEYS)

    def run(query, key, lse, mask, sinks, alibi_slopes, _):
        chosen = select("top_keys", IMPLEMENTATIONS, (query, key), backend, export_only())
        return chosen(query, key, lse, mask, sinks, alibi_slopes, *numbers, k)

    with torch.no_grad():
        return _run(run, query, key, lse, mask, sinks, alibi_slopes, None)


def _run(run: Callable, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Call ``run(*tensors)`` outside of autocast, for DTensors on this rank's parts."""
    elsewhere = runner("attention_weights", tensors)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return run(*tensors) if elsewhere is None else elsewhere(run, *tensors)


def _run_on_cpu(query, key, lse, mask, sinks, alibi_slopes, left, right, scale, softcap, k):
    call = AttentionCall(
        query, key, key, mask, sinks, alibi_slopes, None, None, None, None, left, right, scale, softcap, dropout_p=0.0
    )
    return cpu.top_keys(call, lse, k)


def _empty_results(query, key, lse, *options):
    shape = (*lse.shape, options[-1])
    return query.new_empty(shape, dtype=torch.int64), query.new_empty(shape, dtype=torch.float32)


_op = define_op(
    "attention_top_keys",
    "(Tensor query, Tensor key, Tensor lse, Tensor? mask, Tensor? sinks, Tensor? alibi_slopes, SymInt? left, SymInt? right, "
    "float scale, float softcap, int k) -> (Tensor indices, Tensor weights)",
    _run_on_cpu,
    _empty_results,
    vmap=lambda op, info, in_dims, *args: (one_by_one(op, info.batch_size, in_dims, args), (0, 0)),
)
IMPLEMENTATIONS = (
    Implementation("cpu", _op, cpu.why_not),
    Implementation("reference", reference.top_keys, lambda query, key: None, is_torch=True),
)


def _checked(query, key, lse, mask, causal, window, scale, softcap, alibi_slopes, sinks) -> tuple:
    """Check the arguments of both functions, and return left, right, scale and softcap."""
    check_rows("query", query, BATCHED)
    check_rows("key", key, BATCHED)
    check_like("key", key, "query", query)
    batch, heads, _, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"key must have query's batch {batch} and head_dim {head_dim}; got shape {tuple(key.shape)}")
    check_groups(heads, key.shape[1])
    check_tensor("lse", lse)
    if lse.shape != query.shape[:3]:
        raise ValueError(f"lse must have shape {tuple(query.shape[:3])}, a number for each query; got {tuple(lse.shape)}")
    if lse.device != query.device:
        raise ValueError(f"lse must be on query's device {query.device}; got {lse.device}")
    check_mask(mask, (*query.shape[:3], key.shape[2]), query.device)
    check_per_head(alibi_slopes, sinks, batch, query, heads)
    check_no_gradient(alibi_slopes)
    left, right = window_bounds(causal, window)
    return left, right, *score_options(scale, softcap, head_dim)


def _check_chosen(rows: Tensor, query: Tensor) -> None:
    """Check the indices of queries. On a GPU, torch checks the numbers when it uses them."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows must be an int64 or int32 tensor; got {type(rows).__name__}")
    if rows.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"rows must be int64 or int32; got {rows.dtype}")
    if rows.dim() != 1:
        raise ValueError(f"rows must have shape (*,); got {tuple(rows.shape)}")
    if rows.device != query.device:
        raise ValueError(f"rows must be on query's device {query.device}; got {rows.device}")
    queries = query.shape[2]
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and rows.numel():
        low, high = map(int, rows.aminmax())
        if low < 0 or high >= queries:
            raise ValueError(f"rows must lie between 0 and {queries - 1}; got {low if low < 0 else high}")
