"""Compute attention by parts of the keys, for sequences that no single call holds, and join the parts exactly.

A part is a call with places: all or some of the queries, some of the keys. With the log-sum-exp of each part's scores,

    lse = log sum_p exp(lse_p),    out = sum_p exp(lse_p - lse) out_p

and the backward of a part is that of the whole call, given the whole call's out, lse and statistics. A sink is in one part.
Source: the partial softmax of Milakov & Gimelshein (2018), between devices in Liu et al., "Ring Attention" (2023).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...backend import Implementation
from ...reference import attention as reference
from . import cpu, triton
from .call import DIFFERENTIABLE, AttentionCall


class PartPasses(NamedTuple):
    """Hold a backend's functions of a part.

    Attributes:
        forward: ``forward(call)`` returns (out, lse, statistics) of the part; statistics as in op.py.
        backward: ``backward(grad_out, grad_lse, out, lse, statistics, need_mask, need_sinks, call)`` returns the part's share
            of the gradients of query, key, value, mask and sinks, from what the whole call returned and its gradients.
        unit: ``unit(call)`` returns the factor from the statistics' maximum to a natural score.
    """

    forward: Callable
    backward: Callable
    unit: Callable


# ---- joining ----------------------------------------------------------------------------------------------------------------


class Joined(NamedTuple):
    """Hold the results of the keys seen so far."""

    out: Tensor  # (B, Hq, Lq, Dv), float32 (float64 for float64)
    lse: Tensor  # (B, Hq, Lq)
    statistics: Tensor  # (B, Hq, Lq, 2)


def first(out: Tensor, lse: Tensor, statistics: Tensor) -> Joined:
    """Return the results of one part."""
    return Joined(out.to(torch.promote_types(out.dtype, torch.float32)), lse, statistics)


def join(joined: Joined, out: Tensor, lse: Tensor, statistics: Tensor, unit: float) -> Joined:
    """Add the results of a part with other keys. ``joined.out`` is written in place."""
    both = torch.logaddexp(joined.lse, lse)
    ours, theirs = (torch.where(part == -math.inf, 0.0, torch.exp(part - both)) for part in (joined.lse, lse))
    results = joined.out.mul_(ours[..., None]).add_(out * theirs[..., None]), both
    return Joined(*results, _joined_statistics((joined.statistics, statistics), (joined.lse, lse), unit))


def _joined_statistics(statistics: tuple[Tensor, Tensor], lses: tuple[Tensor, Tensor], unit: float) -> Tensor:
    """Return the larger maximum, and log2 of the sum of the weights, which each part has relative to its own maximum.

    A row that sees no key in a part has no maximum there: its log-sum-exp is that of its sink, or -inf.
    """
    maximum = torch.maximum(statistics[0][..., 0], statistics[1][..., 0])

    def sum_of(part: Tensor, lse: Tensor) -> Tensor:
        own, log2_sum = part.unbind(-1)
        of_sink = (lse - maximum * unit) / math.log(2.0)
        return torch.where(own == -math.inf, of_sink, log2_sum + (own - maximum) * (unit / math.log(2.0)))

    joined = torch.stack([maximum, torch.logaddexp2(*map(sum_of, statistics, lses))], dim=-1)
    return torch.where((maximum == -math.inf)[..., None], statistics[0], joined)


def statistics_of(lse: Tensor, unit: float) -> Tensor:
    """Return statistics (B, Hq, Lq, 2) with the weights exp(score - lse), for parts that others joined by their lse alone."""
    return torch.stack([lse / unit, torch.zeros_like(lse)], dim=-1)


# ---- the reference ----------------------------------------------------------------------------------------------------------


def _forward_on_reference(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = reference.attend(*call)
    return out, lse, torch.stack([lse, torch.zeros_like(lse)], dim=-1)


def _backward_on_reference(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor,
    need_mask: bool,
    need_sinks: bool,
    call: AttentionCall,
) -> tuple[Tensor, ...]:
    """Differentiate the part again, with the gradients that joining it gives its out and its lse."""
    needed = True, True, True, need_mask, need_sinks
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() if need else tensor for tensor, need in zip(call[:DIFFERENTIABLE], needed)]
        part_out, part_lse = reference.attend(*leaves, *call[DIFFERENTIABLE:])
        share = torch.where(lse == -math.inf, 0.0, torch.exp(part_lse.detach() - lse))
        grad_share = torch.zeros_like(lse) if grad_lse is None else grad_lse
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_share = grad_share + (grad_out * (part_out.detach() - out)).to(lse.dtype).sum(dim=-1)
        cotangents = (grad_out * share[..., None]).to(out.dtype), grad_share * share
        grads = iter(torch.autograd.grad((part_out, part_lse), [t for t, n in zip(leaves, needed) if n], cotangents))
    return tuple(next(grads) if need else out.new_empty(0) for need in needed)


PASSES = (
    Implementation("cpu", PartPasses(cpu.forward, cpu.backward, cpu.score_unit), cpu.why_not),
    Implementation("triton", PartPasses(triton.forward, triton.backward, triton.score_unit), triton.why_not),
    Implementation(
        "reference",
        PartPasses(_forward_on_reference, _backward_on_reference, lambda call: 1.0),
        lambda query, value: None,
    ),
)
