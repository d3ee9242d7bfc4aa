"""The launchers of the Gaussian latent's Triton kernels.

`plan_forward` and `plan_backward` return launches, which `run` starts one after the other, without waiting for the GPU. Calls
that are alike share a plan. Ahead-of-time compilation reads the same plans. Tensors are checked (fastlm/ops), and there is an
element at least.

A tile has as many elements on every GPU, so that the KL is the same on all of them, bit for bit.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.launch import Launch, make_launch, run
from ..common.plans import Scratch, planned_once
from .arguments import Options, make_inputs, make_noise, merged, view_of
from .backward import latent_backward
from .device import GROUP, Noise
from .forward import Split, latent_forward
from .row_sums import latent_total

__all__ = ["TILE", "Launch", "Options", "lanes_of", "plan_backward", "plan_forward", "run"]

TILE = 1024  # Elements of a program; a power of 2.
_TOTAL_LEVELS = 7  # log2 of the number of a row's pieces that are added at a time.


class _Plan(NamedTuple):
    """How rows are split among programs, and the constants that follow."""

    split: Split
    grid: int
    constants: dict


@functools.lru_cache(1024)
def _plan_rows(elements: int, event: int) -> _Plan:
    """Plan the programs for rows of `event` elements.

    Where units are no multiples of GROUP, tiles need room to start at one before.
    """
    rows, pieces = TILE // event, None
    if rows * event % GROUP.value:
        rows = (TILE - GROUP.value) // event
    if rows:
        unit, length, grid = rows * event, event, -(-elements // (rows * event))
    else:  # A program has a piece of a row.
        rows, unit = 1, TILE - GROUP.value
        pieces, length = -(-event // unit), unit
        grid = elements // event * pieces
    shifted = (event if pieces else unit) % GROUP.value != 0
    levels = (length - 1).bit_length()
    constants = {
        "TILE": TILE, "ROWS": 1 << (rows - 1).bit_length(), "LEVELS": levels, "SHIFTED": shifted,
        "GATHER": shifted or (rows > 1 and length != 1 << levels),
    }  # fmt: skip
    return _Plan(Split(event, unit, rows, pieces), grid, constants)


@functools.cache
def lanes_of(device: torch.device) -> int:
    """Return the number of threads of a warp: AMD's datacenter GPUs have 64."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def _num_warps(mu: Tensor, noise: Noise | None, lanes: int) -> int:
    """Return the number of warps of a program: a thread has 4 elements, or 8, which are 16 bytes, in half precision.

    If each element takes a block of the noise of its own, a thread has registers for 2.
    """
    per_thread = 2 if noise is not None and not noise.aligned else 8 if mu.element_size() == 2 else 4
    return TILE // (per_thread * lanes)


@planned_once
def plan_forward(tensors: tuple, z: Tensor | None, kl: Tensor | None, options: Options) -> list[Launch]:
    """Plan launches that write z, (K, *shape) or (*shape), and kl, (*batch); both are contiguous, or None if not wanted.

    Args:
        tensors: mu, logvar, prior_mu and prior_logvar, of mu's shape and any strides; a prior may be None.
    """
    mu = tensors[0]
    elements, (free_bits, low, high, temperature) = mu.numel(), options.numbers
    event = options.event_size(mu) if kl is not None else 1
    split, grid, constants = _plan_rows(elements, event)
    pieces = None
    if kl is not None and split.pieces:
        pieces = Scratch(grid, dtype=torch.float64)
    shape, views = merged(mu.shape, tensors)
    noise = make_noise(options.seed, elements, options.samples)
    arguments = {
        "inputs": make_inputs(shape, views, tensors), "z": z, "kl": kl, "pieces": pieces,
        "noise": noise, "samples": max(1, options.samples[0]), "split": split, "elements": elements,
        "free_bits": free_bits, "low": low, "high": high, "temperature": temperature, **constants,
    }  # fmt: skip
    launches = [make_launch(latent_forward, grid, arguments, _num_warps(mu, noise, options.lanes))]
    if pieces is not None:
        arguments = {"pieces": pieces, "count": split.pieces, "kl": kl, "LEVELS": _TOTAL_LEVELS}
        launches.append(make_launch(latent_total, elements // event, arguments))
    return launches


@planned_once
def plan_backward(
    tensors: tuple, grad_z: Tensor | None, grad_kl: Tensor | None, grads: tuple, options: Options
) -> list[Launch]:
    """Plan the launch that writes the gradients of mu, logvar and, unless None, the priors: contiguous, of mu's shape.

    tensors are those of the forward. grad_z has z's shape and any strides, grad_kl is contiguous, of kl's shape; each may be
    None.
    """
    mu = tensors[0]
    elements, (free_bits, low, high, temperature) = mu.numel(), options.numbers
    grad_z_sample = 0
    one_grad_z = grad_z
    if grad_z is not None and options.samples[0]:
        grad_z_sample, one_grad_z = grad_z.stride(0), grad_z[0]
    shape, views = merged(mu.shape, (*tensors, one_grad_z))
    noise = make_noise(options.seed, elements, options.samples)
    grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar = grads
    arguments = {
        "inputs": make_inputs(shape, views, tensors), "grad_z": view_of(grad_z, views[-1], shape, grad_z_sample),
        "grad_z_sample": grad_z_sample, "grad_kl": grad_kl, "grad_mu": grad_mu, "grad_logvar": grad_logvar,
        "grad_prior_mu": grad_prior_mu, "grad_prior_logvar": grad_prior_logvar, "noise": noise,
        "samples": max(1, options.samples[0]), "event": options.event_size(mu), "elements": elements,
        "free_bits": free_bits, "low": low, "high": high, "half_temperature": 0.5 * temperature, "TILE": TILE,
    }  # fmt: skip
    return [make_launch(latent_backward, -(-elements // TILE), arguments, _num_warps(mu, noise, options.lanes))]
