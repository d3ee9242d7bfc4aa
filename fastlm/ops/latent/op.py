"""Make the torch ops of the Gaussian latent: schema, fake tensors, vmap and autograd around a backend's kernels.

fastlm::reparameterize returns (z, kl). fastlm::reparameterize_backward returns the gradients of the four tensors. An unwanted
output is an empty tensor, because an op cannot return None. The Triton kernels have ops of their own, because they serve the
same devices as the others.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ...reference.latent import accumulation_dtype
from ..torch_op import (
    batch_first,
    define_op,
    leave_gradients_to_eager,
    may_bypass_dispatcher,
    may_have_tangents,
    sum_to,
    with_gradient,
)
from .call import DIFFERENTIABLE, INPUTS, TENSORS, LatentCall
from .derivatives import Ops, run_with_tangents
from .derivatives import gradients as differentiable_gradients

# ---- forward and backward by a backend's kernels, which all take the same arguments -----------------------------------------


def _tensor_args(view: Callable, call: LatentCall) -> tuple:
    """Convert the inputs for the kernels, with the priors broadcast by strides of 0."""
    mu, logvar, prior_mu, prior_logvar = call[:DIFFERENTIABLE]
    prior_mu = None if prior_mu is None else prior_mu.expand(mu.shape)
    prior_logvar = None if prior_logvar is None else prior_logvar.expand(mu.shape)
    return view(mu), view(logvar), view(prior_mu), view(prior_logvar)


def _kernel_options(call: LatentCall) -> tuple:
    samples = call.num_samples or 0, call.first, call.sample_stride or 0
    return call.event_dims, samples, (call.free_bits, call.low, call.high, call.temperature)


def _forward(kernels: ModuleType, call: LatentCall) -> tuple[Tensor, Tensor]:
    """Return (z, kl)."""
    z_shape, kl_shape = call.output_shapes()
    z, kl = kernels.empty(call.mu, z_shape), kernels.empty(call.mu, kl_shape, accumulation_dtype(call.mu.dtype))
    if call.mu.numel() == 0:  # A sum over nothing is zero.
        return z, kl.zero_()
    seed = _contiguous(call.seed)
    kernels.launch(
        "reparameterize_forward",
        call.mu.device,
        _tensor_args(kernels.view, call),
        kernels.view(z if seed is not None else None),
        kernels.view(kl if call.with_kl else None),
        kernels.view(seed),
        *_kernel_options(call),
    )
    return z, kl


def _backward(
    kernels: ModuleType,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    need_prior_mu: bool,
    need_prior_logvar: bool,
    call: LatentCall,
) -> tuple[Tensor, ...]:
    """Return the gradients of mu, logvar, prior_mu and prior_logvar."""
    mu, _, prior_mu, prior_logvar = call[:DIFFERENTIABLE]
    empty, view, shape = kernels.empty, kernels.view, mu.shape
    grad_mu, grad_logvar = empty(mu, shape), empty(mu, shape)
    grad_prior_mu = empty(mu, shape, _prior_gradient_dtype(prior_mu, mu)) if need_prior_mu else None
    grad_prior_logvar = empty(mu, shape, _prior_gradient_dtype(prior_logvar, mu)) if need_prior_logvar else None
    # The kernels get addresses, so these tensors must live until the call returns: no temporaries below.
    seed = _contiguous(call.seed)
    grad_kl = _contiguous(grad_kl) if call.with_kl else None
    grad_z = grad_z if seed is not None else None
    kernels.launch(
        "reparameterize_backward",
        mu.device,
        _tensor_args(view, call),
        view(grad_z),
        view(grad_kl),
        (view(grad_mu), view(grad_logvar), view(grad_prior_mu), view(grad_prior_logvar)),
        view(seed),
        *_kernel_options(call),
    )
    return (
        grad_mu,
        grad_logvar,
        sum_to(grad_prior_mu, prior_mu) if need_prior_mu else mu.new_empty(0),
        sum_to(grad_prior_logvar, prior_logvar) if need_prior_logvar else mu.new_empty(0),
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _prior_gradient_dtype(prior: Tensor, mu: Tensor) -> torch.dtype:
    """Return the dtype of a prior's gradient. A broadcast prior's is summed from mu's shape, in full precision."""
    return prior.dtype if prior.shape == mu.shape else accumulation_dtype(mu.dtype)


# ---- fake tensors -----------------------------------------------------------------------------------------------------------

_GRADIENTS = 4  # A backward takes these before the call's arguments: grad_z, grad_kl, need_prior_mu, need_prior_logvar.


def _fake_forward(*args):
    call = LatentCall._make(args)
    z, kl = call.output_shapes()
    return call.mu.new_empty(z), call.mu.new_empty(kl, dtype=accumulation_dtype(call.mu.dtype))


def _fake_backward(grad_z, grad_kl, need_prior_mu, need_prior_logvar, mu, logvar, prior_mu, prior_logvar, *_):
    def like(tensor, needed):
        return tensor.new_empty(tensor.shape) if needed else mu.new_empty(0)

    return like(mu, True), like(logvar, True), like(prior_mu, need_prior_mu), like(prior_logvar, need_prior_logvar)


# ---- vmap: a batch of calls becomes one call with a leading dimension. Each entry has a stream of its own -------------------


def _batched(tensor: Tensor | None, dim: int | None, size: int, rank: int | None = None) -> Tensor | None:
    """Return (entries, ...), with ones behind the entries up to ``rank`` dimensions per call."""
    tensor = batch_first(tensor, dim, size)
    missing = 0 if rank is None or tensor is None else rank - (tensor.dim() - 1)
    return tensor.reshape(size, *(1,) * missing, *tensor.shape[1:]) if missing else tensor


def _batched_call(size: int, in_dims: tuple, call: LatentCall) -> LatentCall:
    """Return one call that has the entries of all tensors in a leading dimension."""
    rank = call.mu.dim() - (in_dims[0] is not None)
    ranks = (None, None, rank, rank, None)
    return LatentCall(*(_batched(t, d, size, r) for t, d, r in zip(call[:TENSORS], in_dims, ranks)), *call[TENSORS:])


def _forward_vmap(op, info, in_dims, *args):
    call = LatentCall._make(args)
    outputs = op(*_batched_call(info.batch_size, in_dims, call))
    z_dim = None if call.seed is None else 0 if call.num_samples is None else 1
    return outputs, (z_dim, 0 if call.with_kl else None)


def _backward_vmap(op, info, in_dims, grad_z, grad_kl, *args):
    needed, call = args[:2], LatentCall._make(args[2:])
    grad_z = _batched(grad_z, in_dims[0], info.batch_size)
    if grad_z is not None and call.num_samples is not None:
        grad_z = grad_z.movedim(0, 1)
    grad_kl = _batched(grad_kl, in_dims[1], info.batch_size)
    of_call = in_dims[_GRADIENTS:]
    grads = list(op(grad_z, grad_kl, *needed, *_batched_call(info.batch_size, of_call, call)))
    for i, (prior, dim) in enumerate(zip(call[2:DIFFERENTIABLE], of_call[2:DIFFERENTIABLE])):
        if needed[i]:  # Remove the ones that _batched inserted.
            shape = prior.shape if dim is None else prior.movedim(dim, 0).shape[1:]
            grads[2 + i] = grads[2 + i].reshape(info.batch_size, *shape)
    return tuple(grads), (0, 0, *(0 if need else None for need in needed))


# ---- a backend's ops --------------------------------------------------------------------------------------------------------


def latent_op(kernels: ModuleType, devices: tuple[str, ...], prefix: str = "") -> Callable[[LatentCall], tuple[Tensor, Tensor]]:
    """Make a backend's ``run(call)``, which returns (z, kl) by the torch op on those devices, with the required gradients.

    ``kernels`` is the backend's module. It makes outputs (empty), describes tensors (view) and runs kernels (launch).
    ``prefix`` begins the names of its ops.
    """

    def forward(*args):
        return _forward(kernels, LatentCall._make(args))

    def backward(*args):
        return _backward(kernels, *args[:_GRADIENTS], LatentCall._make(args[_GRADIENTS:]))

    forward_op = define_op(
        f"{prefix}reparameterize", f"({INPUTS}) -> (Tensor z, Tensor kl)", forward, _fake_forward, devices, _forward_vmap
    )
    backward_op = define_op(
        f"{prefix}reparameterize_backward",
        f"(Tensor? grad_z, Tensor? grad_kl, bool need_prior_mu, bool need_prior_logvar, {INPUTS}) "
        "-> (Tensor grad_mu, Tensor grad_logvar, Tensor grad_prior_mu, Tensor grad_prior_logvar)",
        backward,
        _fake_backward,
        devices,
        _backward_vmap,
        differentiated=False,
    )
    ops = Ops(forward_op, backward_op)

    def save(ctx, args, outputs) -> None:
        ctx.save_for_backward(*args[:TENSORS])
        ctx.options = args[TENSORS:]
        ctx.set_materialize_grads(False)

    def gradients(ctx, grad_z, grad_kl) -> tuple:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[:DIFFERENTIABLE]
        direct = may_bypass_dispatcher(grad_z, grad_kl, *tensors) and not torch.is_grad_enabled()
        run = backward if direct else partial(differentiable_gradients, ops)
        grads = run(grad_z, grad_kl, *needed[2:], *tensors, *ctx.options)
        return *(grad if need else None for grad, need in zip(grads, needed)), *(None,) * (1 + len(ctx.options))

    run_direct, run_dispatched = with_gradient(forward, forward_op, save, gradients, once=False)

    def run(call: LatentCall) -> tuple[Tensor | None, Tensor | None]:
        if may_have_tangents(*call[:TENSORS]):
            return run_with_tangents(ops, call)
        leave_gradients_to_eager()
        direct = may_bypass_dispatcher(*call[:TENSORS])
        if torch.is_grad_enabled() and call.requires_grad():
            return (run_direct if direct else run_dispatched)(*call)
        return _forward(kernels, call) if direct else forward_op(*call)

    return run
