"""Compute the variational latent in plain PyTorch: the oracle of every backend, and the fallback where no backend runs.

z = mu + exp(logvar / 2) * eps is the reparameterization of Kingma & Welling, "Auto-Encoding Variational Bayes" (2013); the KL
divergence between the two normals is in closed form (their appendix B). Autograd can differentiate everything here.
"""

import math

import torch
from torch import Tensor

from .noise import normal_like


def expm1_minus(x: Tensor) -> Tensor:
    """Return e^x - 1 - x without cancellation: never negative, and right to the last bits for small x, where it is x^2/2.

    Near zero it is the Taylor series of (e^x - 1 - x) / x^2 = sum of x^k / (k + 2)!, times x^2.
    """
    near = x.abs() < 1.5
    small = torch.where(near, x, 0.0)  # Both branches stay finite, so that where() has no NaN in its gradients.
    large = torch.where(near, 1.0, x)
    series = torch.zeros_like(small)
    for k in reversed(range(24 if x.dtype == torch.float64 else 13)):  # As many terms as the second derivative needs, too.
        series = series * small + 1.0 / math.factorial(k + 2)
    # The last term is capped so that x = inf gives inf, not inf - inf.
    return torch.where(near, small * small * series, torch.exp(large) - 1.0 - large.clamp(max=1e30))


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp x to [low, high], with no gradient outside. NaN stays, and so does its gradient, which torch.clamp would hide."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic and of the KL: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sample(mu: Tensor, logvar: Tensor, eps: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return z = mu + temperature * exp(logvar / 2) * eps in mu's dtype; eps and z are (*mu.shape) or (K, *mu.shape)."""
    dtype = accumulation_dtype(mu.dtype)
    std = temperature * torch.exp(0.5 * logvar.to(dtype))
    return (mu.to(dtype) + std * eps.to(dtype)).to(mu.dtype)


def kl_divergence(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, *, event_dims: int, free_bits: float
) -> Tensor:
    """Return KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)) in nats, summed over the last ``event_dims`` dimensions.

    With x = logvar - prior_logvar and d = mu - prior_mu, a dimension contributes (d^2 e^-prior_logvar + e^x - 1 - x) / 2, and
    never less than ``free_bits`` (Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016).
    """
    dtype = accumulation_dtype(mu.dtype)
    difference, log_ratio = mu.to(dtype), logvar.to(dtype)
    if prior_mu is not None:
        difference = difference - prior_mu.to(dtype)
    scaled = difference * difference
    if prior_logvar is not None:
        log_ratio = log_ratio - prior_logvar.to(dtype)
        scaled = scaled * torch.exp(-prior_logvar.to(dtype))
    kl = 0.5 * (scaled + expm1_minus(log_ratio))
    if free_bits > 0.0:
        kl = torch.where(kl < free_bits, free_bits, kl)
    return kl.sum(dim=tuple(range(-event_dims, 0))) if event_dims else kl


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    eps: Tensor | None = None,
    with_kl: bool = True,
    event_dims: int = 1,
    free_bits: float = 0.0,
    logvar_clamp: tuple[float, float] | None = None,
    num_samples: int | None = None,
    temperature: float = 1.0,
    first: int = 0,
    sample_stride: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return (z, kl) of a Gaussian latent; z is None without a ``seed`` and kl is None unless ``with_kl``.

    The arguments are those of ``fastlm.reparameterize_with_kl``, already checked. The seed is an int64 tensor, 0-d or (B,);
    noise ``eps`` that was drawn elsewhere may take its place. ``first`` and ``sample_stride`` are those of `normal_like`.
    """
    if logvar_clamp is not None:
        logvar = clamp(logvar.to(accumulation_dtype(mu.dtype)), *logvar_clamp)
    z = kl = None
    if seed is not None:
        eps = normal_like(mu, seed, num_samples or 1, first, sample_stride)
        eps = eps[0] if num_samples is None else eps
    if eps is not None:
        z = sample(mu, logvar, eps, temperature=temperature)
    if with_kl:
        kl = kl_divergence(mu, logvar, prior_mu, prior_logvar, event_dims=event_dims, free_bits=free_bits)
    return z, kl


def gradients(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    eps: Tensor | None,
    *,
    event_dims: int,
    free_bits: float,
    logvar_clamp: tuple[float, float],
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of mu, logvar, prior_mu and prior_logvar in closed form, given those of z and kl.

    ``eps`` is the noise of z, and may be None without grad_z. Autograd can differentiate the gradients to any order, with a few
    tensors of mu's size at a time, where the derivatives of `expm1_minus` would take dozens.
    """
    dtype = accumulation_dtype(mu.dtype)
    low, high = logvar_clamp
    unclamped = logvar.to(dtype)
    clamped = clamp(unclamped, low, high)
    of_mu = of_logvar = torch.zeros_like(unclamped)
    of_prior_mu = of_prior_logvar = None
    if grad_z is not None:  # Samples are summed over.
        grad_z = grad_z.to(dtype)
        std = temperature * torch.exp(0.5 * clamped)
        of_mu = grad_z.sum_to_size(mu.shape)
        of_logvar = 0.5 * std * (grad_z * eps.to(dtype)).sum_to_size(mu.shape)
    if grad_kl is not None:
        grad_kl = grad_kl.to(dtype).reshape((*grad_kl.shape, *(1,) * event_dims))
        difference = mu.to(dtype) if prior_mu is None else mu.to(dtype) - prior_mu.to(dtype)
        log_ratio, scaled = clamped, difference
        if prior_logvar is not None:
            log_ratio = clamped - prior_logvar.to(dtype)
            scaled = difference * torch.exp(-prior_logvar.to(dtype))
        if free_bits > 0.0:
            kl = 0.5 * (scaled * difference + expm1_minus(log_ratio)).detach()
            grad_kl = torch.where(kl < free_bits, 0.0, grad_kl)
        kl_mu, kl_logvar = grad_kl * scaled, 0.5 * grad_kl * torch.expm1(log_ratio)
        of_mu, of_logvar = of_mu + kl_mu, of_logvar + kl_logvar
        of_prior_mu, of_prior_logvar = -kl_mu, -kl_logvar - 0.5 * kl_mu * difference
    of_logvar = torch.where((unclamped < low) | (unclamped > high), 0.0, of_logvar)
    return (
        of_mu.to(mu.dtype),
        of_logvar.to(logvar.dtype),
        _of_prior(of_prior_mu, prior_mu),
        _of_prior(of_prior_logvar, prior_logvar),
    )


def _of_prior(gradient: Tensor | None, prior: Tensor | None) -> Tensor | None:
    """Sum a prior's gradient over what the prior was broadcast along."""
    if prior is None:
        return None
    return torch.zeros_like(prior) if gradient is None else gradient.sum_to_size(prior.shape).to(prior.dtype)
