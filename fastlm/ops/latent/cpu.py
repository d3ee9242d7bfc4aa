"""Run a call of the Gaussian latent without options on the CPU at the least cost: op.py's kernels, but none of its records."""

import math

import torch
from torch import Tensor

from ...backend import DEFAULT
from ...backend import cpu as native
from ...backend.cpu import empty, view
from ...reference.latent import accumulation_dtype
from ..checks import DTYPES
from ..noise import SEED_RANGE, seed_tensor
from ..torch_op import direct_apply, may_bypass_dispatcher
from .call import LatentCall
from .derivatives import Ops, gradients


def _forward(mu: Tensor, logvar: Tensor, seed: Tensor, event_dims: int) -> tuple[Tensor, Tensor]:
    """Return (z, kl)."""
    shape, dtype = mu.shape, mu.dtype
    z, kl = empty(mu, shape), empty(mu, shape[: len(shape) - event_dims], accumulation_dtype(dtype))
    native.C.latent_plain_forward(view(mu), view(logvar), view(seed), event_dims, view(z), view(kl))
    return z, kl


class _Plain(torch.autograd.Function):
    """Run the kernels, and in the backward the op where somebody looks at its gradients or differentiates them."""

    @staticmethod
    def forward(ctx, mu, logvar, seed, event_dims):
        ctx.save_for_backward(mu, logvar, seed)
        ctx.event_dims = event_dims
        ctx.set_materialize_grads(False)
        return _forward(mu, logvar, seed, event_dims)

    @staticmethod
    def backward(ctx, grad_z, grad_kl):
        mu, logvar, seed = ctx.saved_tensors
        if torch.is_grad_enabled() or not may_bypass_dispatcher(grad_z, grad_kl, mu, logvar, seed):
            call = LatentCall(mu, logvar, None, None, seed, True, ctx.event_dims, 0.0, -math.inf, math.inf, None, 1.0, 0, None)
            ops = Ops(torch.ops.fastlm.reparameterize.default, torch.ops.fastlm.reparameterize_backward.default)
            return *gradients(ops, grad_z, grad_kl, False, False, *call)[:2], None, None
        if grad_kl is not None and not grad_kl.is_contiguous():
            grad_kl = grad_kl.contiguous()
        shape = mu.shape
        grad_mu, grad_logvar = empty(mu, shape), empty(mu, shape)
        native.C.latent_plain_backward(
            view(mu), view(logvar), view(seed), ctx.event_dims, view(grad_z), view(grad_kl), view(grad_mu), view(grad_logvar)
        )
        return grad_mu, grad_logvar, None, None


_run = direct_apply(_Plain)


def fast_path(mu, logvar, event_dims, seed, backend) -> tuple[Tensor, Tensor] | None:
    """Return (z, kl) of a call without options, at the least cost; None for any other call, which the checks may refuse."""
    backend = backend or DEFAULT
    if native.C is None or (backend is not None and backend != "cpu"):
        return None
    if mu is None or logvar is None or not may_bypass_dispatcher(mu, logvar):
        return None
    if not (mu.is_cpu and logvar.is_cpu) or mu.dtype not in DTYPES or logvar.dtype is not mu.dtype:
        return None
    if mu.shape != logvar.shape or mu.numel() == 0 or type(event_dims) is not int or not 0 <= event_dims <= mu.dim():
        return None
    if seed is not None and (type(seed) is not int or seed not in SEED_RANGE):
        return None
    seed = seed_tensor(seed, mu)
    if torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad):
        return _run(mu, logvar, seed, event_dims)
    return _forward(mu, logvar, seed, event_dims)
