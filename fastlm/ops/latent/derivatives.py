"""Differentiate the Gaussian latent beyond the kernels' backward: in forward mode, and to any order.

The kernels compute z, kl and their gradients. All other derivatives are those of the reference's formulas, in torch's own ops
on tensors of mu's size. The kernel draws the noise again, which no derivative changes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...reference import latent as reference
from ...reference.latent import accumulation_dtype
from ..torch_op import may_have_tangents
from .call import DIFFERENTIABLE, TENSORS, LatentCall


class Ops(NamedTuple):
    """Hold a backend's torch ops."""

    forward: Callable
    backward: Callable


def run_in_torch(call: LatentCall, eps: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """Return (z, kl) by the reference. Noise ``eps``, if given, takes the place of the seed's."""
    return reference.reparameterize(
        *call[:TENSORS],
        eps=eps,
        with_kl=call.with_kl,
        event_dims=call.event_dims,
        free_bits=call.free_bits,
        logvar_clamp=None if (call.low, call.high) == (-math.inf, math.inf) else (call.low, call.high),
        num_samples=call.num_samples,
        temperature=call.temperature,
        first=call.first,
        sample_stride=call.sample_stride,
    )


def _draw_noise(ops: Ops, call: LatentCall) -> Tensor:
    """Return the noise of a call with a sample by the kernel, as the sample of a standard normal."""
    # The dtype in which a kernel adds the noise, so that it is not rounded.
    zero = call.seed.new_zeros((), dtype=accumulation_dtype(call.mu.dtype)).expand(call.mu.shape)
    standard = LatentCall.sample(zero, zero, call.seed, 1.0)
    place = {"num_samples": call.num_samples, "first": call.first, "sample_stride": call.sample_stride}
    return ops.forward(*standard._replace(**place))[0]


def run_with_tangents(ops: Ops, call: LatentCall) -> tuple[Tensor | None, Tensor | None]:
    """Return (z, kl) of a call in forward mode."""
    return run_in_torch(call.with_seed(None), None if call.seed is None else _draw_noise(ops, call))


# ---- the derivatives of the gradients ---------------------------------------------------------------------------------------

_GRADS = 2  # grad_z and grad_kl come before the tensors.


def _gradients_in_torch(
    ops: Ops, grad_z: Tensor | None, grad_kl: Tensor | None, need_prior_mu: bool, need_prior_logvar: bool, call: LatentCall
) -> tuple[Tensor, ...]:
    """Return what the backward op returns, by the reference."""
    grad_z, grad_kl = grad_z if call.seed is not None else None, grad_kl if call.with_kl else None
    *grads, of_prior_mu, of_prior_logvar = reference.gradients(
        grad_z,
        grad_kl,
        *call[:DIFFERENTIABLE],
        None if grad_z is None else _draw_noise(ops, call),
        event_dims=call.event_dims,
        free_bits=call.free_bits,
        logvar_clamp=(call.low, call.high),
        temperature=call.temperature,
    )
    unneeded = call.mu.new_empty(0)
    return *grads, of_prior_mu if need_prior_mu else unneeded, of_prior_logvar if need_prior_logvar else unneeded


class _Gradients(torch.autograd.Function):
    """Compute the gradients by the kernel, and their derivatives by the reference's closed form."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ops, *args):
        return ops.backward(*args)

    @staticmethod
    def setup_context(ctx, args, outputs):
        ctx.ops, *args = args
        grads, needed, call = args[:_GRADS], args[_GRADS : 2 * _GRADS], LatentCall._make(args[2 * _GRADS :])
        ctx.save_for_backward(*grads, *call[:TENSORS])
        ctx.needed, ctx.options = needed, call[TENSORS:]

    @staticmethod
    def backward(ctx, *cotangents):
        *inputs, seed = ctx.saved_tensors  # grad_z, grad_kl, and the differentiable tensors
        given = [i for i, tensor in enumerate(inputs) if tensor is not None]

        def gradients(*tensors):
            filled = dict(zip(given, tensors))
            grad_z, grad_kl, *call = (filled.get(i) for i in range(len(inputs)))
            return _gradients_in_torch(ctx.ops, grad_z, grad_kl, *ctx.needed, LatentCall(*call, seed, *ctx.options))

        _, pullback = torch.func.vjp(gradients, *(inputs[i] for i in given))
        found = dict(zip(given, pullback(cotangents)))
        grad_z, grad_kl, *grads = (found.get(i) for i in range(len(inputs)))
        return None, grad_z, grad_kl, None, None, *grads, None, *(None,) * len(ctx.options)


def gradients(
    ops: Ops, grad_z: Tensor | None, grad_kl: Tensor | None, need_prior_mu: bool, need_prior_logvar: bool, *call
) -> tuple[Tensor, ...]:
    """Return what the backward op returns, with derivatives where anybody may ask for them."""
    if may_have_tangents(grad_z, grad_kl, *call[:TENSORS]):
        return _gradients_in_torch(ops, grad_z, grad_kl, need_prior_mu, need_prior_logvar, LatentCall._make(call))
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Gradients.apply(ops, grad_z, grad_kl, need_prior_mu, need_prior_logvar, *call)
    return ops.backward(grad_z, grad_kl, need_prior_mu, need_prior_logvar, *call)
