"""The pair of torch ops behind the Gaussian latent: schema, implementation, fake tensors, vmap and autograd.

fastlm::reparameterize returns (z, kl) and fastlm::reparameterize_backward the gradients of the four tensors; an output that is
not wanted is an empty tensor, as an op returns no None. The seed may have the shape of any leading dimensions of mu: one
stream per entry.
"""

import torch
from torch import Tensor

from ...backend import cpu as native
from ...backend import cuda as cuda_kernels
from ...reference.latent import accumulation_dtype
from ..torch_op import define_op, may_bypass_dispatcher, sum_to, with_gradient

# By a device's type: what makes outputs and launches kernels there. They are told the same.
KERNELS = {"cpu": native, "cuda": cuda_kernels}

# ---- the schemas, fake tensors and kernels ----------------------------------------------------------------------------------

_OPTIONS = "bool with_kl, int event_dims, float free_bits, float low, float high, SymInt? num_samples, float temperature"
_INPUTS = "Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor? seed"


def _output_shapes(mu, seed, with_kl, event_dims, num_samples) -> tuple[tuple, tuple]:
    """The shapes of (z, kl)."""
    shape = tuple(mu.shape)
    z = (0,) if seed is None else shape if num_samples is None else (num_samples, *shape)
    return z, shape[: len(shape) - event_dims] if with_kl else (0,)


def _forward_fake(mu, logvar, prior_mu, prior_logvar, seed, *options):
    with_kl, event_dims, *_, num_samples, _ = options
    z, kl = _output_shapes(mu, seed, with_kl, event_dims, num_samples)
    return mu.new_empty(z), mu.new_empty(kl, dtype=accumulation_dtype(mu.dtype))


def _views(view, mu, logvar, prior_mu, prior_logvar) -> tuple:
    """The inputs as kernels take them, the priors broadcast by strides of 0."""
    prior_mu = None if prior_mu is None else prior_mu.expand(mu.shape)
    prior_logvar = None if prior_logvar is None else prior_logvar.expand(mu.shape)
    return view(mu), view(logvar), view(prior_mu), view(prior_logvar)


def _run_forward(mu, logvar, prior_mu, prior_logvar, seed, with_kl, event_dims, free_bits, low, high, num_samples, temperature):
    device = mu.device
    kernels = KERNELS[device.type]
    z_shape, kl_shape = _output_shapes(mu, seed, with_kl, event_dims, num_samples)
    z, kl = kernels.empty(mu, z_shape), kernels.empty(mu, kl_shape, accumulation_dtype(mu.dtype))
    if mu.numel() == 0:  # a sum over nothing is zero
        return z, kl.zero_()
    seed = _contiguous(seed)
    kernels.launch(
        "reparameterize_forward",
        device,
        _views(kernels.view, mu, logvar, prior_mu, prior_logvar),
        kernels.view(z if seed is not None else None),
        kernels.view(kl if with_kl else None),
        kernels.view(seed),
        event_dims,
        num_samples or 0,
        (free_bits, low, high, temperature),
    )
    return z, kl


def _backward_fake(grad_z, grad_kl, mu, logvar, prior_mu, prior_logvar, seed, need_prior_mu, need_prior_logvar, *options):
    def like(tensor, needed):
        return tensor.new_empty(tensor.shape) if needed else mu.new_empty(0)

    return like(mu, True), like(logvar, True), like(prior_mu, need_prior_mu), like(prior_logvar, need_prior_logvar)


def _run_backward(
    grad_z, grad_kl, mu, logvar, prior_mu, prior_logvar, seed, need_prior_mu, need_prior_logvar,
    with_kl, event_dims, free_bits, low, high, num_samples, temperature,
):  # fmt: skip
    device = mu.device
    kernels = KERNELS[device.type]
    empty, view, shape = kernels.empty, kernels.view, mu.shape
    grad_mu, grad_logvar = empty(mu, shape), empty(mu, shape)
    grad_prior_mu = empty(mu, shape, _prior_gradient_dtype(prior_mu, mu)) if need_prior_mu else None
    grad_prior_logvar = empty(mu, shape, _prior_gradient_dtype(prior_logvar, mu)) if need_prior_logvar else None
    # What has its address taken below must live until the call returns: no temporaries there.
    seed = _contiguous(seed)
    grad_kl = _contiguous(grad_kl) if with_kl else None
    grad_z = grad_z if seed is not None else None
    kernels.launch(
        "reparameterize_backward",
        device,
        _views(view, mu, logvar, prior_mu, prior_logvar),
        view(grad_z),
        view(grad_kl),
        (view(grad_mu), view(grad_logvar), view(grad_prior_mu), view(grad_prior_logvar)),
        view(seed),
        event_dims,
        num_samples or 0,
        (free_bits, low, high, temperature),
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
    """A prior that was broadcast gets its gradient at mu's shape first, to be summed at full precision."""
    return prior.dtype if prior.shape == mu.shape else accumulation_dtype(mu.dtype)


# ---- vmap: a batch of calls is one call with a leading dimension, each entry with a stream of its own -----------------------


def _batched(tensor: Tensor | None, dim: int | None, size: int, rank: int | None = None) -> Tensor | None:
    """The tensor with the vmapped dimension first, padded with ones behind it up to ``rank`` dimensions per call."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    missing = 0 if rank is None else rank - (tensor.dim() - 1)
    return tensor.reshape(size, *(1,) * missing, *tensor.shape[1:]) if missing else tensor


def _batched_inputs(size: int, in_dims: tuple, inputs: tuple) -> tuple:
    mu, logvar, prior_mu, prior_logvar, seed = inputs
    rank = mu.dim() - (in_dims[0] is not None)
    ranks = (None, None, rank, rank, None)
    return tuple(_batched(t, d, size, r) for t, d, r in zip(inputs, in_dims, ranks))


def _forward_vmap(op, info, in_dims, *args):
    inputs, options = args[:5], args[5:]
    with_kl, num_samples, seed = options[0], options[5], inputs[4]
    outputs = op(*_batched_inputs(info.batch_size, in_dims[:5], inputs), *options)
    z_dim = None if seed is None else 0 if num_samples is None else 1
    return outputs, (z_dim, 0 if with_kl else None)


def _backward_vmap(op, info, in_dims, grad_z, grad_kl, *args):
    inputs, needed, options = args[:5], args[5:7], args[7:]
    num_samples = options[5]
    grad_z = _batched(grad_z, in_dims[0], info.batch_size)
    if grad_z is not None and num_samples is not None:
        grad_z = grad_z.movedim(0, 1)
    grad_kl = _batched(grad_kl, in_dims[1], info.batch_size)
    grads = list(op(grad_z, grad_kl, *_batched_inputs(info.batch_size, in_dims[2:7], inputs), *needed, *options))
    for i, (prior, dim) in enumerate(zip(inputs[2:4], in_dims[4:6])):
        if needed[i]:  # without the ones that _batched put in
            shape = prior.shape if dim is None else prior.movedim(dim, 0).shape[1:]
            grads[2 + i] = grads[2 + i].reshape(info.batch_size, *shape)
    return tuple(grads), (0, 0, *(0 if need else None for need in needed))


# ---- the torch ops ----------------------------------------------------------------------------------------------------------

_DEVICES = ("CPU", "CUDA")
_forward_op = define_op(
    "reparameterize",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor z, Tensor kl)",
    _run_forward,
    _forward_fake,
    _DEVICES,
    vmap=_forward_vmap,
)
_backward_op = define_op(
    "reparameterize_backward",
    f"(Tensor? grad_z, Tensor? grad_kl, {_INPUTS}, bool need_prior_mu, bool need_prior_logvar, {_OPTIONS}) "
    "-> (Tensor grad_mu, Tensor grad_logvar, Tensor grad_prior_mu, Tensor grad_prior_logvar)",
    _run_backward,
    _backward_fake,
    _DEVICES,
    vmap=_backward_vmap,
)

# ---- autograd -------------------------------------------------------------------------------------------------------------


def _save(ctx, args, outputs) -> None:
    ctx.save_for_backward(*args[:5])
    ctx.options = args[5:]
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_z, grad_kl) -> tuple:
    needed = ctx.needs_input_grad[:4]
    given = (grad_z, grad_kl, *ctx.saved_tensors)
    run = _run_backward if may_bypass_dispatcher(*given) else _backward_op
    grads = run(*given, *needed[2:], *ctx.options)
    return *(grad if need else None for grad, need in zip(grads, needed)), *(None,) * (1 + len(ctx.options))


_differentiable = with_gradient(_run_forward, _forward_op, _save, _gradients)


def latent(tensors: tuple, options: tuple) -> tuple[Tensor, Tensor]:
    """Run (z, kl) by the op, with gradients where an input asks for them. Tensors and options in the order of the schema."""
    direct = may_bypass_dispatcher(*tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:4]):
        return _differentiable(direct, *tensors, *options)
    return (_run_forward if direct else _forward_op)(*tensors, *options)
