"""The backward: all gradients in one pass, with the noise drawn again.

The limit is the memory: an element of s bytes is read 2 + K times, mu, logvar and the gradient of each sample, and written
twice, (4 + K) s bytes, 20 for one sample in float32. A row's gradient of the KL takes 4, a prior what it holds, and a gradient
of a prior another s.
"""

import triton
import triton.language as tl

from ..common.math import constant
from .device import accumulator, divide, draw, load_inputs, locate, store, stream_of
from .gaussian import clamp, clamp_gradient, kl_gradient, kl_of, standard_deviation


@triton.jit
def sum_samples(grad_z, grad_z_sample, shape, noise, samples, first, i, left, like, TILE: tl.constexpr):
    """Return sum_k g_k, which is mu's gradient, and sum_k g_k eps_k, each (TILE,), with the gradients g_k of the samples."""
    total = tl.zeros([TILE], like.dtype)
    noisy_total = tl.zeros([TILE], like.dtype)
    seed, position = stream_of(noise, first, i, TILE)
    offset = locate(grad_z, shape, first, i, TILE)
    for k in range(samples):
        data = grad_z.data + k * tl.cast(grad_z_sample, tl.int64)
        g = tl.load(data + offset, mask=i < left, other=0.0).to(like.dtype)
        total += g
        noisy_total += g * draw(noise, seed, position, k, like)
    return total, noisy_total


@triton.jit
def latent_backward(
    inputs, grad_z, grad_z_sample, grad_kl, grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar, noise, samples, event,
    elements, free_bits: tl.float64, low: tl.float64, high: tl.float64, half_temperature: tl.float64, TILE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a tile: those through z, with d z / d logvar = temperature deviation eps / 2, and the KL's.

    grad_z is a view of the inputs' shape, whose samples lie grad_z_sample apart; grad_kl is (rows,). Its data, and each
    gradient but those of mu and logvar, may be None.
    """
    first = tl.program_id(0).to(tl.int64) * TILE
    i = tl.arange(0, TILE)
    left = tl.minimum(elements - first, TILE).to(tl.int32)
    inside = i < left
    like = accumulator(inputs.mu.data)
    mu, logvar, prior_mu, prior_logvar = load_inputs(inputs, first, i, left, like, TILE)
    low, high = constant(low, like), constant(high, like)
    clamped = clamp(logvar, low, high)
    deviation = standard_deviation(clamped)
    of_mu = tl.zeros([TILE], like.dtype)
    of_logvar = tl.zeros([TILE], like.dtype)
    of_prior_mu, of_prior_logvar = of_mu, of_mu

    if grad_z.data is not None:
        of_mu, noisy = sum_samples(grad_z, grad_z_sample, inputs.shape, noise, samples, first, i, left, like, TILE)
        of_logvar = noisy * (constant(half_temperature, like) * deviation)
    if grad_kl is not None:
        row, above, _ = divide(first, i, event, TILE)
        gradient = tl.load(grad_kl + row + above, mask=inside, other=0.0)  # (TILE,)
        value, expm1_x, scaled, squared = kl_of(inputs, mu, clamped, deviation, prior_mu, prior_logvar)
        least = constant(free_bits, like)
        kl_mu, kl_logvar, of_prior_mu, of_prior_logvar = kl_gradient(value, expm1_x, scaled, squared, least, gradient)
        of_mu += kl_mu
        of_logvar += kl_logvar

    store(grad_mu, first, i, of_mu, inside)
    store(grad_logvar, first, i, clamp_gradient(of_logvar, logvar, low, high), inside)
    if grad_prior_mu is not None:
        store(grad_prior_mu, first, i, of_prior_mu, inside)
    if grad_prior_logvar is not None:
        store(grad_prior_logvar, first, i, of_prior_logvar, inside)
