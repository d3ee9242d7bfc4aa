"""Attention on the CPU: what the C++ kernels are told, and the functions behind the CPU's torch ops."""

import torch
from torch import Tensor

from ...backend import DEFAULT
from ...backend import cpu as native
from ...backend.cpu import empty, view
from ..torch_op import may_bypass_dispatcher, sum_to
from .op import attention_op, empty_like, given_gradients, numbers, rows_of, sink_gradient

# ---- what the C++ code is told ----------------------------------------------------------------------------------------------


def empty_results(query: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Make (out, lse) of a call, to be written."""
    return empty_like(query, value_dim, empty), empty(query, query.shape[:3], torch.float32)


def _mask_rows(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Expanded to (B, Hq, Lq, Lk) by strides of 0."""
    if mask.dtype == torch.float64:
        mask = mask.float()
    if mask.dim() and mask.shape[-1] > 1 and mask.stride(-1) != 1:
        mask = mask.contiguous()
    return mask.expand(*query.shape[:3], key.shape[2])


def arranged(query, key, value, mask, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k) -> tuple:
    """The tensors as the C++ code reads them, in its order."""
    return (
        view(rows_of(query)),
        view(rows_of(key)),
        view(rows_of(value)),
        None if mask is None else view(_mask_rows(mask, query, key)),
        None if alibi_slopes is None else view(alibi_slopes.float().contiguous()),
        None if sinks is None else view(sinks.float().contiguous()),
        None if seed is None else view(seed.contiguous()),
        None if cu_seqlens_q is None else view(cu_seqlens_q.contiguous()),
        None if cu_seqlens_k is None else view(cu_seqlens_k.contiguous()),
    )


# ---- the two functions ------------------------------------------------------------------------------------------------------


def _infer(*args, statistics: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (out, lse), and write the ``statistics`` where they are wanted."""
    tensors, options = args[:9], args[9:]
    out, lse = empty_results(tensors[0], tensors[2].shape[3])
    results = view(out), view(lse), view(statistics)
    native.C.attention_forward(arranged(*tensors), numbers(*options), *results, torch.get_num_threads())
    return out, lse


def _forward(query, *args):
    statistics = empty(query, (*query.shape[:3], 2), torch.float32)
    return *_infer(query, *args, statistics=statistics), statistics


# Queries that share a row of the mask's gradient where the mask is one for all: kBlockRows of csrc/cpu/attention/attention.h.
_MASK_BLOCK = native.C.attention_block_rows if native.C else 1


def _mask_gradient_buffer(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """float32 zeros over the mask's batch and head, rows (blocks of queries where it is one for all), and all keys."""
    batch, heads, rows, _ = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if rows == 1:
        rows = -(-query.shape[2] // _MASK_BLOCK)
    return torch.zeros(batch, heads, rows, key.shape[2], dtype=torch.float32, device="cpu")


def _score_unit(mask: Tensor | None, alibi_slopes: Tensor | None, scale: float, softcap: float) -> float:
    """Return the C++ code's unit of scores in natural ones: `scores_are_products` in csrc/cpu/attention/scores-inl.h."""
    has_bias = alibi_slopes is not None or (mask is not None and mask.is_floating_point())
    return scale if 0.0 < scale < 2.0**127 and not softcap and not has_bias else 1.0


def _backward(grad_out, grad_lse, out, lse, statistics, query, key, value, mask, sinks, *rest):
    need_mask, need_sinks, options = *rest[4:6], rest[6:]
    grads = tuple(empty_like(t, t.shape[3], empty) for t in (query, key, value))
    grad_mask = _mask_gradient_buffer(mask, query, key) if need_mask else None
    expanded = None
    if need_mask:
        expanded = grad_mask.expand(query.shape[0], query.shape[1], *grad_mask.shape[2:])
    grad_out, grad_lse = given_gradients(out, grad_out, grad_lse)
    delta = empty(lse, lse.shape)
    native.C.attention_backward(
        arranged(query, key, value, mask, sinks, *rest[:4]),
        numbers(*options),
        tuple(map(view, (rows_of(out), grad_out, statistics.contiguous(), grad_lse, delta))),
        (*map(view, grads), view(expanded)),
        need_mask and (mask.dim() < 2 or mask.shape[-2] == 1),
        torch.get_num_threads(),
    )
    grad_mask = sum_to(grad_mask, mask) if need_mask else query.new_empty(0)
    grad_sinks = query.new_empty(0)
    if need_sinks:
        unit = _score_unit(mask, rest[0], *options[2:4])
        grad_sinks = sink_gradient(sinks, statistics, unit, lse, delta)
    return *grads, grad_mask, grad_sinks


# ---- the ops ----------------------------------------------------------------------------------------------------------------

attend = attention_op("attention", _forward, _backward, ("CPU",), _infer)

_SMALL = 1 << 18  # elements of a query up to which a call is all overhead, or might be


def fast_path(query, key, value, scale, causal, top_left, grouped, backend) -> Tensor | None:
    """Return the output of a small call without options and gradients, at the least cost; None for any other call.

    ``top_left``: the causal mask is aligned at the first query and key; ``grouped``: query heads may share heads of keys.
    """
    backend = backend or DEFAULT
    if native.C is None or (backend is not None and backend != "cpu"):
        return None
    if query is None or key is None or value is None:
        return None
    if not isinstance(causal, bool) or not (scale is None or isinstance(scale, float)):
        return None
    if not may_bypass_dispatcher(query, key, value) or query.numel() > _SMALL or torch._C._is_any_autocast_enabled():
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    out = torch.empty_like(query)
    threads = torch.get_num_threads()
    return out if native.C.attention_plain(query, key, value, out, scale, causal, top_left, grouped, threads) else None
