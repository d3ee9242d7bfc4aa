"""Make the torch op of linear for a backend: schema, fake tensors, vmap and autograd around the backend's function.

The gradients and tangents are products again, which are calls of linear: so there are derivatives of every order, and each
product runs on the backend that is fastest for its shape.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import autocast
from ..torch_op import (
    batch_first,
    define_op,
    leave_gradients_to_eager,
    may_bypass_dispatcher,
    save_for_both,
    sum_to,
    with_gradient,
    with_tangents,
)
from .call import INPUTS, TENSORS, LinearCall, requires_grad


def _fake(input, weight, bias):
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _vmap(op, info, in_dims, input, weight, bias):
    """Make a vmapped input's dimension one of the leading ones. For vmapped weights, use torch's own batched product."""
    if in_dims[1] is None and in_dims[2] is None:
        return op(input.movedim(in_dims[0], 0), weight, bias), 0

    input, weight, bias = (batch_first(t, d, info.batch_size) for t, d in zip((input, weight, bias), in_dims))
    rows = input.flatten(1, -2) if input.dim() > 2 else input.unsqueeze(1)  # (entries, M, K)
    out = rows @ weight.mT
    if bias is not None:
        out = out + bias.unsqueeze(1)
    return out.reshape(*input.shape[:-1], weight.shape[1]), 0


def _rows(tensor: Tensor) -> Tensor:
    """Return (..., K) as (M, K)."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


def _sum_rows(rows: Tensor) -> Tensor:
    """Sum rows (M, N) to (N,): the gradient of the bias."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return rows.sum(0)
    return sum_to(rows.float(), rows.new_empty(1, rows.shape[1])).view(-1)


def linear_op(forward: Callable, product: Callable, devices: tuple[str, ...]) -> Callable[[LinearCall], Tensor]:
    """Make a backend's ``run(call)``, which returns out by the torch op, with the required gradients.

    Args:
        forward: ``forward(input, weight, bias)`` runs the backend's kernel.
        product: ``product(call)`` is linear itself, for the products of the backward.
        devices: torch's names of the devices that it runs on.
    """
    op = define_op("linear", f"({INPUTS}) -> Tensor out", forward, _fake, devices, _vmap)

    def save(ctx, args, output) -> None:
        input, weight, _, ctx.backend = args
        need_input, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(input if need_weight else None, weight if need_input else None)
        ctx.set_materialize_grads(False)

    def gradients(ctx, grad_out) -> tuple:
        if grad_out is None:
            return (None,) * (TENSORS + 1)
        input, weight = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:TENSORS]
        rows = _rows(grad_out)  # (M, N)
        return (
            product(LinearCall(grad_out, weight.t(), None, ctx.backend)) if need_input else None,
            product(LinearCall(rows.t(), _rows(input).t(), None, ctx.backend)) if need_weight else None,
            _sum_rows(rows) if need_bias else None,
            None,
        )

    def save_with_tangents(ctx, args, output) -> None:
        save(ctx, args, output)
        save_for_both(ctx, *args[:2])

    def tangents(ctx, saved, of_input, of_weight, of_bias, _) -> Tensor:
        input, weight = saved
        products = []
        if of_input is not None:
            products.append(product(LinearCall(of_input, weight, of_bias, ctx.backend)))
        elif of_bias is not None:
            products.append(of_bias.expand(*input.shape[:-1], -1))
        if of_weight is not None:
            products.append(product(LinearCall(input, of_weight, None, ctx.backend)))
        return sum(products[1:], products[0])

    def run_op(input, weight, bias, _):
        return op(input, weight, bias)

    run_direct, run_dispatched = with_gradient(
        lambda input, weight, bias, _: forward(input, weight, bias), run_op, save, gradients, once=False
    )
    run_dual = with_tangents(run_op, save_with_tangents, gradients, tangents)

    def run(call: LinearCall) -> Tensor:
        call = LinearCall(*autocast(*call[:TENSORS]), call.backend)
        if forward_ad._current_level >= 0:
            return run_dual(*call)
        leave_gradients_to_eager()
        direct = may_bypass_dispatcher(*call[:TENSORS])
        if torch.is_grad_enabled() and requires_grad(*call[:TENSORS]):
            return (run_direct if direct else run_dispatched)(*call)
        return (forward if direct else op)(*call[:TENSORS])

    return run
