"""The arithmetic of one element of a Gaussian latent, that of csrc/common/gaussian.h: the same operations in the same order.

    z  = mu + temperature e^(logvar/2) eps
    kl = max(free_bits, (d^2 w + e^x - 1 - x) / 2)   with d = mu - prior_mu, x = logvar - prior_logvar, w = e^-prior_logvar

All tiles are (TILE,), float32, or float64 for float64 tensors.
"""

import triton
import triton.language as tl

from ..common.math import constant, exp, expm1, larger, smaller


@triton.jit
def clamp(x, low, high):
    """Return x between two numbers. NaN stays NaN."""
    return smaller(high, larger(low, x))


@triton.jit
def clamp_gradient(gradient, x, low, high):
    """Return the gradient, or 0 where x was clamped."""
    return tl.where(x < low, 0.0, tl.where(high < x, 0.0, gradient))


@triton.jit
def standard_deviation(logvar):
    return exp(constant(0.5, logvar) * logvar)


@triton.jit
def kl_of(inputs, mu, logvar, deviation, prior_mu, prior_logvar):
    """Return (kl before free bits, e^x - 1, d w, d^2 w); `inputs` tells which priors there are.

    Without a prior, e^x is the square of the deviation, which sampling needs anyway.
    """
    if inputs.prior_mu.data is not None:
        mu = mu - prior_mu
    scaled = mu
    if inputs.prior_logvar.data is None:
        ratio = deviation * deviation
    else:
        logvar = logvar - prior_logvar
        ratio = exp(logvar)
        scaled = mu * exp(constant(0.0, mu) - prior_logvar)
    squared = mu * scaled
    minus_x, expm1_x = expm1(logvar, ratio)
    return constant(0.5, mu) * (squared + minus_x), expm1_x, scaled, squared


@triton.jit
def kl_gradient(value, expm1_x, scaled, squared, free_bits, gradient):
    """Return the gradients of mu, logvar, prior_mu and prior_logvar, given what `kl_of` returns and the gradient of the KL.

    A dimension below its free bits has none.
    """
    gradient = tl.where(value < free_bits, 0.0, gradient)
    zero = constant(0.0, gradient)
    of_mu, half = gradient * scaled, constant(0.5, gradient) * gradient
    return of_mu, half * expm1_x, zero - of_mu, zero - half * (squared + expm1_x)
