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
    for k in reversed(range(24)):
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
) -> tuple[Tensor | None, Tensor | None]:
    """Return (z, kl) of a Gaussian latent; z is None without a ``seed`` and kl is None unless ``with_kl``.

    The arguments are those of ``fastlm.reparameterize_with_kl``, already checked. The seed is an int64 tensor, 0-d or (B,);
    noise ``eps`` that was drawn elsewhere may take its place.
    """
    if logvar_clamp is not None:
        logvar = clamp(logvar.to(accumulation_dtype(mu.dtype)), *logvar_clamp)
    z = kl = None
    if seed is not None:
        eps = normal_like(mu, seed, num_samples or 1)
        eps = eps[0] if num_samples is None else eps
    if eps is not None:
        z = sample(mu, logvar, eps, temperature=temperature)
    if with_kl:
        kl = kl_divergence(mu, logvar, prior_mu, prior_logvar, event_dims=event_dims, free_bits=free_bits)
    return z, kl
