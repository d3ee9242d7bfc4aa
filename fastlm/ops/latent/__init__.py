"""Sample the Gaussian latent of a VAE and compute its KL divergence, in one pass over the inputs, forward and backward.

    z = mu + temperature * exp(logvar / 2) * eps,   eps ~ N(0, 1) from the stream of the seed
    kl = sum over the event of max(free_bits, (d^2 e^-prior_logvar + e^x - 1 - x) / 2)
    with d = mu - prior_mu and x = logvar - prior_logvar

`reparameterize`, `reparameterize_with_kl` and `gaussian_kl` call one op (op.py). Its backward draws the noise again, so that
only the inputs and the seed are saved. On the CPU, a call without options takes a shorter way to the same kernels (cpu.py).
Forward mode and derivatives of higher order are closed forms in torch's own ops (derivatives.py).
Sources: Kingma & Welling, "Auto-Encoding Variational Bayes" (2013); free bits: Kingma et al., "Improved variational inference
with inverse autoregressive flow" (2016), appendix C.8.
"""

import math

import torch
from torch import Tensor

from ...backend import Implementation, select
from ...backend import cpu as native
from ...backend import cuda as cuda_kernels
from ...backend import triton as triton_kernels
from ..checks import check_integer, check_number, check_tensor
from ..noise import check_seed, seed_tensor
from ..tensor_classes import runner
from ..torch_op import export_only
from . import cpu, triton
from .call import DIFFERENTIABLE, LatentCall
from .derivatives import run_in_torch
from .op import latent_op

# ---- checks -----------------------------------------------------------------------------------------------------------------


def _posterior(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Check mu and logvar, and return them. Under autocast they are promoted to one dtype, as torch does there."""
    check_tensor("mu", mu)
    check_tensor("logvar", logvar)
    if logvar.dtype is not mu.dtype and torch.is_autocast_enabled(mu.device.type):
        wider = torch.promote_types(mu.dtype, logvar.dtype)
        mu, logvar = mu.to(wider), logvar.to(wider)
    if logvar.shape != mu.shape:
        raise ValueError(f"logvar must have mu's shape {tuple(mu.shape)}; got {tuple(logvar.shape)}")
    if logvar.dtype != mu.dtype:
        raise TypeError(f"logvar must have mu's dtype {mu.dtype}; got {logvar.dtype}")
    if logvar.device != mu.device:
        raise ValueError(f"logvar must be on mu's device {mu.device}; got {logvar.device}")
    return mu, logvar


def _check_prior(name: str, prior: Tensor | None, mu: Tensor) -> None:
    if prior is None:
        return
    check_tensor(name, prior)
    if prior.device != mu.device:
        raise ValueError(f"{name} must be on mu's device {mu.device}; got {prior.device}")
    fits = prior.dim() <= mu.dim() and all(p in (1, m) for p, m in zip(reversed(prior.shape), reversed(mu.shape)))
    if not fits:
        raise ValueError(f"{name} must broadcast to mu's shape {tuple(mu.shape)}; got {tuple(prior.shape)}")


def _clamp(logvar_clamp: tuple[float, float] | None) -> tuple[float, float]:
    if logvar_clamp is None:
        return -math.inf, math.inf
    if not isinstance(logvar_clamp, (tuple, list)) or len(logvar_clamp) != 2:
        raise TypeError(f"logvar_clamp must be a pair (low, high); got {logvar_clamp!r}")
    low, high = logvar_clamp
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        raise TypeError(f"logvar_clamp must be a pair of numbers (low, high); got {logvar_clamp!r}")
    if not low <= high:  # NaN is refused, too.
        raise ValueError(f"logvar_clamp must be (low, high) with low <= high; got {logvar_clamp!r}")
    return float(low), float(high)


# ---- the public functions -------------------------------------------------------------------------------------------------


def reparameterize(
    mu: Tensor, logvar: Tensor, *, seed: int | Tensor | None = None, temperature: float = 1.0, backend: str | None = None
) -> Tensor:
    """Sample ``z = mu + temperature * exp(logvar / 2) * eps`` with eps ~ N(0, 1): the reparameterization trick.

    Args:
        mu: means, any shape, float32, bfloat16, float16 or float64, any strides.
        logvar: logarithms of the variances; shape, dtype and device of ``mu``.
        seed: an int, a 0-d int64 tensor, or an int64 tensor (B,), B = mu.shape[0]. The last gives each example a stream of its
            own, so that its noise does not depend on the batch around it. None draws a seed from torch's default generator.
        temperature: multiplies the standard deviation; 0 returns ``mu``.
        backend: 'cpu', 'cuda', 'triton' or 'reference'; None picks the fastest one that can run the call.

    Returns:
        z, contiguous, with ``mu``'s shape and dtype. The same seed gives the same noise on every backend.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        UnsupportedError: the named ``backend`` cannot run the call.
    """
    mu, logvar = _posterior(mu, logvar)
    call = LatentCall.sample(mu, logvar, None, check_number("temperature", temperature, 0.0))
    check_seed(seed, mu)
    return run("reparameterize", call, seed, backend)[0]


def reparameterize_with_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    event_dims: int = 1,
    free_bits: float = 0.0,
    logvar_clamp: tuple[float, float] | None = None,
    num_samples: int | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a Gaussian latent and compute its KL divergence from the prior, in one pass.

    Args:
        mu, logvar, seed, backend: as in `reparameterize`.
        prior_mu, prior_logvar: the prior's mean and log-variance, of any floating dtype, broadcastable to ``mu``'s shape; None
            means 0. They get gradients.
        event_dims: how many trailing dimensions make up one latent; kl is summed over them. 0 keeps every element.
        free_bits: the least number of nats that a latent dimension contributes; below it, the dimension gets no gradient.
        logvar_clamp: (low, high), the bounds of ``logvar`` for both z and kl; outside them it gets no gradient.
        num_samples: K draws per latent in one pass. None draws one, without a leading dimension.

    Returns:
        z: ``mu``'s shape, or (num_samples, *mu.shape), in ``mu``'s dtype, contiguous.
        kl: mu.shape without its last ``event_dims`` dimensions, in nats, never negative; float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        UnsupportedError: the named ``backend`` cannot run the call.
    """
    no_option = prior_mu is None and prior_logvar is None and logvar_clamp is None and num_samples is None
    if no_option and type(free_bits) is float and free_bits == 0.0:
        results = cpu.fast_path(mu, logvar, event_dims, seed, backend)
        if results is not None:
            return results
    if num_samples is not None:
        num_samples = check_integer("num_samples", num_samples, 1, 2**31 - 1)
    mu, logvar = _posterior(mu, logvar)
    call = _call_with_kl(mu, logvar, prior_mu, prior_logvar, event_dims, free_bits, logvar_clamp, num_samples)
    check_seed(seed, mu)
    return run("reparameterize_with_kl", call, seed, backend)


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    event_dims: int = 1,
    free_bits: float = 0.0,
    logvar_clamp: tuple[float, float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)) in nats, summed over the last ``event_dims`` dimensions.

    Arguments, result and errors are those of `reparameterize_with_kl`, without the sampling.
    """
    mu, logvar = _posterior(mu, logvar)
    call = _call_with_kl(mu, logvar, prior_mu, prior_logvar, event_dims, free_bits, logvar_clamp)
    return run("gaussian_kl", call, _NO_SAMPLE, backend)[1]


def _call_with_kl(mu, logvar, prior_mu, prior_logvar, event_dims, free_bits, logvar_clamp, num_samples=None) -> LatentCall:
    """Check the arguments that the two functions with a KL share, and return the call, without a seed yet."""
    _check_prior("prior_mu", prior_mu, mu)
    _check_prior("prior_logvar", prior_logvar, mu)
    event_dims = check_integer("event_dims", event_dims, 0, mu.dim())
    free_bits = check_number("free_bits", free_bits, 0.0)
    return LatentCall(
        mu, logvar, prior_mu, prior_logvar, None, True, event_dims, free_bits, *_clamp(logvar_clamp), num_samples, 1.0, 0, None
    )


# ---- the backends ---------------------------------------------------------------------------------------------------------


IMPLEMENTATIONS = (
    Implementation("cuda", latent_op(cuda_kernels, ("CUDA",)), cuda_kernels.why_not),
    Implementation("cpu", latent_op(native, ("CPU",)), native.why_not),
    Implementation("triton", latent_op(triton, ("CPU", "CUDA"), "triton_"), triton_kernels.why_not),
    Implementation("reference", run_in_torch, lambda tensor: None),
)


def _exported_noise(call: LatentCall) -> Tensor:
    """Draw noise from torch's generator, because ONNX has one, but not ours."""
    shape, samples = call.mu.shape, call.num_samples
    return torch.randn(shape if samples is None else (samples, *shape), dtype=torch.float32, device=call.mu.device)


_NO_SAMPLE = object()  # Stands in place of a seed if only the KL is wanted.


def run(op: str, call: LatentCall, seed, backend: str | None) -> tuple:
    """Choose the backend, draw the seed, and run the call. In this order, explain() leaves torch's generator alone."""
    elsewhere = runner("latent", call[:DIFFERENTIABLE])
    if elsewhere is not None:
        return elsewhere(lambda local, seed: run(op, local, seed, backend), call, seed, seed is not _NO_SAMPLE)
    exports = export_only()
    sample = select(op, IMPLEMENTATIONS, (call.mu,), backend, exports)
    if seed is None and exports:
        return run_in_torch(call, _exported_noise(call))
    return sample(call if seed is _NO_SAMPLE else call.with_seed(seed_tensor(seed, call.mu)))


def standard_normal(shape: tuple[int, ...], dtype: torch.dtype, seed: Tensor) -> Tensor:
    """Return the noise of that shape and dtype that `reparameterize` adds.

    Its checks are skipped, because torch.compile takes no check of a layout in a backward. A seed (B,) gives each of
    B = shape[0] examples a stream of its own.
    """
    zero = seed.new_zeros((), dtype=dtype).expand(shape)
    return select("reparameterize", IMPLEMENTATIONS, (zero,), None)(LatentCall.sample(zero, zero, seed, 1.0))[0]
