"""The torch ops behind attention, a pair for each backend: schema, fake tensors, vmap and autograd around its two functions.

fastlm::attention returns (out, lse, statistics) and fastlm::attention_backward the gradients of query, key, value, mask and
sinks; one that is not wanted is an empty tensor, as an op returns no None. Tensors are (batch, head, row, column); with
cu_seqlens, sequences lie one after the other along the rows of a batch of one. cpu.py and triton.py hold
the functions.

``statistics`` (B, Hq, Lq, 2) is what a backend's own backward computes the weights again from: the score that a row's weights
were taken against, in the backend's unit, and log2 of the sum of these weights. The log-sum-exp, which adds the two, cannot
serve: beside scores near -1e9, float32 has no room for the logarithm of the number of keys.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...reference.attention import drop_below, keep_scale
from ..torch_op import define_op, may_bypass_dispatcher, sum_to, with_gradient

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, Tensor? alibi_slopes, Tensor? seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_OPTIONS = "SymInt? left, SymInt? right, float scale, float softcap, float dropout_p"
_TENSORS = 9  # the leading arguments of the forward
_DIFFERENTIABLE = 5  # query, key, value, mask, sinks: the first of them

# ---- layout: results lie in memory as what they belong to --------------------------------------------------------------------


def empty_like(tensor: Tensor, columns: int, make: Callable) -> Tensor:
    """(B, H, L, columns) by ``make(tensor, shape)``; in (B, L, H, columns) order where ``tensor`` is a transpose of that."""
    batch, heads, rows, _ = tensor.shape
    if heads > 1 and rows > 1 and tensor.stride(1) < tensor.stride(2):
        return make(tensor, (batch, rows, heads, columns)).transpose(1, 2)
    return make(tensor, (batch, heads, rows, columns))


def attention_fake(query, key, value, *rest):
    """Make (out, lse, statistics) to be written, on the query's device."""
    out = empty_like(query, value.shape[3], Tensor.new_empty)
    rows = query.shape[:3]
    return out, query.new_empty(rows, dtype=torch.float32), query.new_empty((*rows, 2), dtype=torch.float32)


def backward_fake(grad_out, grad_lse, out, lse, statistics, query, key, value, mask, sinks, *rest):
    """The gradients to be written; empty ones that are not wanted."""
    need_mask, need_sinks = rest[4:6]

    def like(tensor):
        return empty_like(tensor, tensor.shape[3], Tensor.new_empty)

    grad_mask = mask.new_empty(mask.shape) if need_mask else query.new_empty(0)
    grad_sinks = sinks.new_empty(sinks.shape) if need_sinks else query.new_empty(0)
    return like(query), like(key), like(value), grad_mask, grad_sinks


# ---- what every backend is given --------------------------------------------------------------------------------------------


def rows_of(tensor: Tensor) -> Tensor:
    """With a contiguous last dimension."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] <= 1 else tensor.contiguous()


def numbers(left, right, scale, softcap, dropout_p) -> tuple:
    """Convert options for the kernels: dropout_p becomes the first word of the generator to be kept (2**32: none is), and the
    factor 1 / (1 - dropout_p) of what is kept.
    """
    if dropout_p:
        return left, right, scale, softcap, drop_below(dropout_p), keep_scale(dropout_p)
    return left, right, scale, softcap, 0, 1.0


def given_gradients(out: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of the outputs as kernels read them; none of the output is zero."""
    grad_out = torch.zeros_like(out) if grad_out is None else rows_of(grad_out)
    return grad_out, None if grad_lse is None else grad_lse.contiguous()


def sink_gradient(sinks: Tensor, statistics: Tensor, unit: float, lse: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient of the sinks (Hq,), which have no value: the sum of p (0 - delta), with p a sink's share of a row.

    lse and delta are (B, Hq, Lq); ``unit`` makes a natural score of a row's maximum. Beside a huge one, the LSE has no room for
    the total; far from it, a sink is all of its row, or nothing.
    """
    logits, maximum = sinks.float()[:, None], statistics[..., 0] * unit
    by_lse = logits - lse.masked_fill(lse == -math.inf, math.inf)
    by_total = logits - maximum - statistics[..., 1] * math.log(2.0)
    share = torch.exp(torch.where((logits - maximum).abs() < 64.0, by_total, by_lse))
    return sum_to(-share * delta, sinks[:, None]).reshape(sinks.shape)


# ---- vmap: entries become one batch where the op has a place for that, and calls of their own elsewhere ---------------------


def _is_one_batch(in_dims: tuple, inputs: tuple, wanted: tuple = ()) -> bool:
    """Whether vmapped calls can be one: dropout counts heads by their batch, and masks, slopes and sinks may not go along."""
    mask, _, slopes, seed, cu_seqlens_q, _ = inputs[3:]
    shared = mask is None or mask.dim() < 4 or mask.shape[0] == 1
    shared &= slopes is None or slopes.dim() == 1
    return shared and seed is None and cu_seqlens_q is None and in_dims[3:] == (None,) * 6 and not any(wanted)


def _folded(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(entries * batch, ...)."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _one_by_one(op, size: int, in_dims: tuple, args: tuple) -> tuple:
    """The stacked results of a call for each entry."""
    calls = (op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims))) for i in range(size))
    return tuple(map(torch.stack, zip(*calls)))


def _forward_vmap(op, info, in_dims, *args):
    size, inputs = info.batch_size, args[:_TENSORS]
    if not _is_one_batch(in_dims[:_TENSORS], inputs):
        return _one_by_one(op, size, in_dims, args), (0, 0, 0)
    folded = (_folded(t, d, size) for t, d in zip(inputs[:3], in_dims))
    results = op(*folded, *args[3:])
    return tuple(result.unflatten(0, (size, -1)) for result in results), (0, 0, 0)


def _backward_vmap(op, info, in_dims, *args):
    size, first = info.batch_size, 5  # after grad_out, grad_lse, out, lse and statistics
    inputs, wanted = args[first : first + _TENSORS], args[first + _TENSORS : first + _TENSORS + 2]
    if not _is_one_batch(in_dims[first : first + _TENSORS], inputs, wanted):
        return _one_by_one(op, size, in_dims, args), (0,) * 5
    folded = (_folded(t, d, size) for t, d in zip(args[: first + 3], in_dims))
    *grads, grad_mask, grad_sinks = op(*folded, *args[first + 3 :])
    return (*(grad.unflatten(0, (size, -1)) for grad in grads), grad_mask, grad_sinks), (0, 0, 0, None, None)


# ---- a backend's pair of ops ------------------------------------------------------------------------------------------------


def _any_requires_grad(query, key, value, mask, sinks) -> bool:
    required = query.requires_grad or key.requires_grad or value.requires_grad
    return required or (mask is not None and mask.requires_grad) or (sinks is not None and sinks.requires_grad)


def attention_op(
    name: str, forward: Callable, backward: Callable, devices: tuple[str, ...], infer: Callable | None = None
) -> Callable:
    """Make a backend's ``attend``: (out, lse) by its torch op, with gradients where an input asks for them.

    ``infer`` is the forward for calls that need no gradient, without the statistics, where a backend can save them.
    """
    infer = infer or forward
    forward_op = define_op(
        name,
        f"({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor statistics)",
        forward,
        attention_fake,
        devices,
        _forward_vmap,
    )
    backward_op = define_op(
        f"{name}_backward",
        f"(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor statistics, {_INPUTS}, bool need_mask, "
        f"bool need_sinks, {_OPTIONS}) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)",
        backward,
        backward_fake,
        devices,
        _backward_vmap,
    )

    def save(ctx, args, outputs) -> None:
        ctx.save_for_backward(*args[:_TENSORS], *outputs)
        ctx.options = args[_TENSORS:]
        ctx.mark_non_differentiable(outputs[2])
        ctx.set_materialize_grads(False)

    def gradients(ctx, grad_out, grad_lse, _) -> tuple:
        *tensors, out, lse, statistics = ctx.saved_tensors
        needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
        given = (grad_out, grad_lse, out, lse, statistics, *tensors)
        run = backward if may_bypass_dispatcher(*given) else backward_op
        grads = run(*given, *needed[3:], *ctx.options)
        unused = (None,) * (_TENSORS - _DIFFERENTIABLE + len(ctx.options))
        return *(grad if need else None for grad, need in zip(grads, needed)), *unused

    differentiable = with_gradient(forward, forward_op, save, gradients)

    def attend(
        query, key, value, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap, dropout_p
    ) -> tuple[Tensor, Tensor]:
        tensors = (query, key, value, mask, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k)
        args = (*tensors, left, right, scale, softcap, dropout_p)
        direct = may_bypass_dispatcher(*tensors)
        if torch.is_grad_enabled() and _any_requires_grad(*tensors[:_DIFFERENTIABLE]):
            return differentiable(direct, *args)[:2]
        return (infer if direct else forward_op)(*args)[:2]

    return attend
